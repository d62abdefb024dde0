"""What CG and MINRES share: the scaled system, the true residual, and the loop that judges it (docs/math.md, M14).

Every image has its own state. A product with the matrix is taken for all images at once, with zeros in the
place of those that have ended, and its result is read only where it was asked for. Kernels skip those that have ended.

Memory: some ten images for each image of the batch, whatever the number of iterations, and what `matvec` takes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from .. import backend, checks
from ..batched.graphs import GraphedLoop, Reuse, records, worthwhile
from ..batched.linalg import dot, exp2_int, expand, norm, select
from ..batched.loop import AnyActive, attach_partial_result
from ..status import Status

Map = Callable[[torch.Tensor], torch.Tensor]

RUNNING = -1
REPLACEMENTS = 8


@dataclass
class LinearSolution:
    """Answers of `A_b x_b = b_b`, per image.

    `x` like `b`; `status` `[B]` (see `deepreg_fast.Status`); `iterations` `[B]`, products with A that the recurrence
    took; `residual` `[B]`, float64: `||b - A x|| / ||b||` evaluated at `x`, plus `eps ||A|| ||x|| / ||b||` for the
    rounding of that evaluation (`inf` where it is not finite, 0 where `b = 0`). `CONVERGED` means that it is at or
    below the tolerance.
    """

    x: torch.Tensor
    status: torch.Tensor
    iterations: torch.Tensor
    residual: torch.Tensor


class KrylovMethod(Protocol):
    """One iterative method on a `System`, stepping all images in `system.running`."""

    preconditioner: Map | None

    def restart(self) -> None:
        """Begin anew, for the running images, from `system.x` and its true residual `system.r`."""
        ...

    def step(self) -> None:
        """One step; images that end get a status or leave `system.running` to have their residual checked."""
        ...


class System:
    """`A x = b` with each right-hand side scaled by a power of two, so that no bit depends on its size.

    Images of the batch that are not at work where this begins (`backend.only`) have `b = 0` here, which ends them.
    """

    def __init__(self, matvec: Map, b: torch.Tensor, x0: torch.Tensor | None, tolerance: float) -> None:
        _check(b, x0)
        at_work = backend.active_mask(b)
        with backend.active_images(None):
            self._begin(matvec, b if at_work is None else select(at_work, b, 0.0), x0, tolerance)

    def _begin(self, matvec: Map, b: torch.Tensor, x0: torch.Tensor | None, tolerance: float) -> None:
        self.matvec, self.tolerance = matvec, tolerance
        flat = b.flatten(1)
        finite = torch.isfinite(flat).all(1)
        largest = torch.where(finite[:, None], flat, 0.0).abs().amax(1).double()
        exponent = torch.where(largest > 0, torch.frexp(largest).exponent, 0).clamp(-1000, 1000)
        self.scale = exp2_int(exponent.long())
        self.b = self._divide(select(finite, b, 0.0))
        self.b_norm = norm(self.b)
        zero = self.b_norm == 0
        self.x = torch.zeros_like(b)
        if x0 is not None:
            start = self._divide(x0)
            usable = torch.isfinite(start).flatten(1).all(1) & ~(zero & finite)
            self.x = select(usable, start, 0.0)
        self.r = self.b.clone()
        self.cold = x0 is None
        self.eps = torch.finfo(b.dtype).eps
        # Vectors this long are about to leave the number range, or their squares that of float64.
        self.max_norm = 1e38 if b.dtype == torch.float32 else 1e150
        self.a_norm = torch.zeros_like(self.b_norm)
        self.residual = torch.where(finite, (~zero).to(torch.float64), torch.inf)
        self.status = torch.full_like(zero, RUNNING, dtype=torch.int64)
        self.iterations = torch.zeros_like(self.status)
        self.running = finite & ~zero
        self.end(zero, Status.CONVERGED)
        self.status = torch.where(finite, self.status, int(Status.NON_FINITE))

    def _divide(self, v: torch.Tensor) -> torch.Tensor:
        return (v.double() / expand(self.scale, v.double())).to(v.dtype)

    def end(self, rows: torch.Tensor, status: Status) -> None:
        """Give these images their status; they stop running."""
        self.status = torch.where(rows, int(status), self.status)
        self.running = self.running & ~rows

    def end_as(self, status: torch.Tensor) -> None:
        """Give the running images this status `[B]`; those where it is not `RUNNING` stop running."""
        self.status = torch.where(self.running, status, self.status)
        self.running = self.running & (status == RUNNING)

    def apply(self, v: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """`A v` for `rows`, undefined elsewhere. `v` must be zero there."""
        with backend.active_images(rows):
            out = self.matvec(v)
        if out.shape != v.shape or out.dtype != v.dtype:
            raise checks.InputError(
                f"matvec must return a {v.dtype} tensor of shape {list(v.shape)} like its argument, "
                f"but returned {checks.describe(out)}."
            )
        return out

    def record_norm(self, v2: torch.Tensor, av2: torch.Tensor, rows: torch.Tensor) -> None:
        """Raise the estimate of `||A||` to `||A v|| / ||v||`, given the squares."""
        ratio = torch.sqrt(av2 / v2)
        seen = rows & torch.isfinite(ratio)
        self.a_norm = torch.where(seen, torch.maximum(self.a_norm, ratio), self.a_norm)

    def true_residual(self, rows: torch.Tensor) -> None:
        """The true residual of `rows` at `x`, plus the rounding `eps ||A|| ||x||` that its evaluation may hide."""
        product = self.apply(select(rows, self.x, 0.0), rows)
        size = dot(self.x, self.x)
        self.record_norm(size, dot(product, product), rows)
        self.r = select(rows, self.b - product, self.r)
        value = (norm(self.r) + self.eps * self.a_norm * torch.sqrt(size)) / self.b_norm
        self.residual = torch.where(rows, torch.where(torch.isfinite(value), value, torch.inf), self.residual)

    def begin(self, by_energy: bool) -> None:
        """Residual of the start, which is dropped where it is worse than zero.

        Worse is a residual above `||b||` and, `by_energy`, no less energy `1/2 <x, Ax> - <b, x>` either.
        """
        if self.cold or not bool((self.running & (self.x != 0).flatten(1).any(1)).any()):
            return
        rows = self.running
        self.true_residual(rows)
        energy = -0.5 * dot(self.x, self.b + self.r)
        drop = rows & (self.residual > 1.0)
        if by_energy:
            drop = drop & (~(energy < 0.0) | torch.isinf(self.residual))
        self.x = select(~drop, self.x, 0.0)
        self.r = select(drop, self.b, self.r)
        self.residual = torch.where(drop, 1.0, self.residual)
        self.end(rows & (self.residual <= self.tolerance), Status.CONVERGED)

    def partial_solution(self) -> LinearSolution:
        """The iterates, with the residual of the last start."""
        status = torch.where(self.status == RUNNING, int(Status.MAX_ITERATIONS), self.status)
        return LinearSolution(self.x * expand(self.scale, self.x), status, self.iterations, self.residual)

    def finish(self) -> LinearSolution:
        """The answer in the caller's scale; where that costs bits (underflow) the residual is taken once more."""
        x = (self.x.double() * expand(self.scale, self.x.double())).to(self.x.dtype)
        over = ~torch.isfinite(x).flatten(1).all(1)
        x = select(~over, x, 0.0)
        back = self._divide(x)
        changed = (back != self.x).flatten(1).any(1)
        if bool(changed.any()):
            self.x = back
            self.true_residual(changed)
            lost = changed & (self.status == int(Status.CONVERGED)) & (self.residual > self.tolerance)
            self.end(lost, Status.STAGNATED)
            self.end(over, Status.NON_FINITE)
        return LinearSolution(x, self.status, self.iterations, self.residual)


def empty(b: torch.Tensor) -> LinearSolution:
    """The answer to no systems at all."""
    none = torch.zeros(0, dtype=torch.int64, device=b.device)
    return LinearSolution(b.clone(), none, none.clone(), torch.zeros(0, dtype=torch.float64, device=b.device))


def solve_system(  # noqa: PLR0913 - a method on a system, and what a step may be
    system: System,
    method: KrylovMethod,
    max_iterations: int,
    *,
    monotone: bool = False,
    fallback: Map | None = None,
    capturable: bool = False,
    reuse: Reuse | None = None,
) -> LinearSolution:
    """Run `method` until every image has ended, and let only true residuals say "converged".

    When the recurrence of an image says that it is done, its true residual is taken; if that disagrees, the method
    restarts from it (at most `REPLACEMENTS` times, each of which must halve it, else the image has stagnated).
    `monotone`: the method minimizes the residual, so the start is kept where rounding made the end worse than it.
    `fallback(b)` replaces an iterate that is still zero where the method gave up. `capturable`: a step may be replayed
    as a CUDA graph; `reuse`: also in later solves of this method with these limits.
    """
    s = system

    def step() -> None:
        s.iterations = s.iterations + s.running
        with backend.active_images(s.running):
            method.step()
        s.running = s.running & (s.iterations < max_iterations)

    if reuse is not None:
        kind = (type(method), method.preconditioner is None, max_iterations, s.tolerance)
        reuse = replace(reuse, key=(*kind, reuse.key))
    worth_it = capturable and records(s.b) and worthwhile(max_iterations, reuse)
    device = s.b.device if worth_it else None
    with (
        backend.active_images(None),
        attach_partial_result(s.partial_solution),
        GraphedLoop(step, (s, method), device, reuse=reuse) as step_graphed,
    ):
        best = s.residual if monotone else torch.full_like(s.residual, torch.inf)
        for _ in range(REPLACEMENTS + 1):
            s.running = (s.status == RUNNING) & (s.iterations < max_iterations)
            rows = s.running
            if not bool(rows.any()):
                break
            # A step may change x and r in place.
            best_x, best_r, before = s.x.clone(), s.r.clone(), s.residual
            method.restart()
            any_active = AnyActive()
            while any_active(s.running):
                step_graphed()
            if fallback is not None:
                _fall_back(s, rows, fallback)
            s.true_residual(rows)
            worse = rows & (s.residual > best) & (s.status != int(Status.NON_FINITE))
            s.x, s.r = select(~worse, s.x, best_x), select(~worse, s.r, best_r)
            s.residual = torch.where(worse, best, s.residual)
            best = torch.where(rows, s.residual, best)
            good = rows & (s.residual <= s.tolerance) & (s.status != int(Status.NON_FINITE))
            s.end(good, Status.CONVERGED)
            out = (s.status == RUNNING) & (s.iterations >= max_iterations)
            s.end(out, Status.MAX_ITERATIONS)
            s.end(rows & (s.status == RUNNING) & ~(s.residual <= 0.5 * before), Status.STAGNATED)
        s.end(s.status == RUNNING, Status.STAGNATED)
        end = s.finish()
        return LinearSolution(*map(step_graphed.own, (end.x, end.status, end.iterations, end.residual)))


def _fall_back(s: System, rows: torch.Tensor, fallback: Map) -> None:
    gave_up = (s.status == int(Status.NEGATIVE_CURVATURE)) | (s.status == int(Status.STAGNATED))
    empty = rows & gave_up & (s.x == 0).flatten(1).all(1)
    if not bool(empty.any()):
        return
    with backend.active_images(empty):
        x = fallback(select(empty, s.b, 0.0))
    usable = empty & torch.isfinite(x).flatten(1).all(1)
    s.x = select(usable, x, s.x)


def _check(b: torch.Tensor, x0: torch.Tensor | None) -> None:
    if not isinstance(b, torch.Tensor) or b.ndim < 2 or b.dtype not in checks.FLOATS or b[:1].numel() == 0:
        raise checks.InputError(
            f"b must be a float32 or float64 tensor [B, ...] with at least one image of at least one entry, "
            f"but is {checks.describe(b)}."
        )
    if x0 is not None:
        checks.same_kind(x0, b, "x0 and b")
        if x0.shape != b.shape:
            raise checks.InputError(f"x0 must have the shape {list(b.shape)} of b, but has {list(x0.shape)}.")
