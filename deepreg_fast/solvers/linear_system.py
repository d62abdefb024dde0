"""The common part of CG and MINRES: the scaled system, the true residual and the loop (docs/math.md, M14).

Every image has its own state. A product with the matrix is computed for all images at once. Inactive images are zero
in it, kernels skip them, and their results are not read.

Memory: about ten images per image of the batch, independent of the number of iterations, plus that of `matvec`.
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
    """Solutions of `A_b x_b = b_b`, per image.

    `x` like `b`; `status` `[B]` (see `deepreg_fast.Status`); `iterations` `[B]`, products with A in the recurrence;
    `residual` `[B]`, float64: `||b - A x|| / ||b||` evaluated at `x`, plus `eps ||A|| ||x|| / ||b||` for the rounding
    of that evaluation (`inf` if it is not finite, 0 if `b = 0`). `CONVERGED` means that it is at or below the
    tolerance.
    """

    x: torch.Tensor
    status: torch.Tensor
    iterations: torch.Tensor
    residual: torch.Tensor


class KrylovMethod(Protocol):
    """An iterative method on a `System`; it steps all images in `system.running`."""

    preconditioner: Map | None

    def restart(self) -> None:
        """Restart the active images from `system.x` and its true residual `system.r`."""
        ...

    def step(self) -> None:
        """One step. A finished image gets a status, or leaves `system.running` so that its residual is checked."""
        ...


class System:
    """`A x = b` with each right-hand side scaled by a power of two, so that no bit depends on its magnitude.

    Images that are already inactive (`backend.active_images`) get `b = 0`, which finishes them at once.
    """

    def __init__(self, matvec: Map, b: torch.Tensor, x0: torch.Tensor | None, tolerance: float) -> None:
        _check(b, x0)
        active = backend.active_mask(b)
        with backend.active_images(None):
            self._begin(matvec, b if active is None else select(active, b, 0.0), x0, tolerance)

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
        # Vectors of this norm are close to overflow, or their squares are close to overflow in float64.
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
        """Give these images the status and make them inactive."""
        self.status = torch.where(rows, int(status), self.status)
        self.running = self.running & ~rows

    def apply(self, v: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """`A v` for the images `rows`. For the others `v` must be zero and the result is undefined."""
        with backend.active_images(rows):
            out = self.matvec(v)
        if out.shape != v.shape or out.dtype != v.dtype:
            raise checks.InputError(
                f"matvec must return a {v.dtype} tensor of shape {list(v.shape)} like its argument, "
                f"but returned {checks.describe(out)}."
            )
        return out

    def record_norm(self, v2: torch.Tensor, av2: torch.Tensor, rows: torch.Tensor) -> None:
        """Raise the estimate of `||A||` to at least `||A v|| / ||v||`, given the squares."""
        self.a_norm = raised_norm(self.a_norm, v2, av2, rows)

    def true_residual(self, rows: torch.Tensor) -> None:
        """Compute the true residual of `rows` at `x`, plus a bound `eps ||A|| ||x||` of its rounding error."""
        product = self.apply(select(rows, self.x, 0.0), rows)
        size = dot(self.x, self.x)
        self.record_norm(size, dot(product, product), rows)
        self.r = select(rows, self.b - product, self.r)
        value = (norm(self.r) + self.eps * self.a_norm * torch.sqrt(size)) / self.b_norm
        self.residual = torch.where(rows, torch.where(torch.isfinite(value), value, torch.inf), self.residual)

    def begin(self, by_energy: bool) -> None:
        """Compute the residual of the initial guess; replace it by zero if it is worse than zero.

        It is worse if its residual exceeds `||b||` and, with `by_energy`, its energy `1/2 <x, Ax> - <b, x>` is not
        negative.
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
        """The current iterates, with the residual of the last restart."""
        status = torch.where(self.status == RUNNING, int(Status.MAX_ITERATIONS), self.status)
        return LinearSolution(self.x * expand(self.scale, self.x), status, self.iterations, self.residual)

    def finish(self) -> LinearSolution:
        """The solution in the caller's scale; if scaling loses bits (underflow), the residual is computed again."""
        x = (self.x.double() * expand(self.scale, self.x.double())).to(self.x.dtype)
        overflow = ~torch.isfinite(x).flatten(1).all(1)
        x = select(~overflow, x, 0.0)
        rescaled = self._divide(x)
        changed = (rescaled != self.x).flatten(1).any(1)
        if bool(changed.any()):
            self.x = rescaled
            self.true_residual(changed)
            missed = changed & (self.status == int(Status.CONVERGED)) & (self.residual > self.tolerance)
            self.end(missed, Status.STAGNATED)
            self.end(overflow, Status.NON_FINITE)
        return LinearSolution(x, self.status, self.iterations, self.residual)


def raised_norm(a_norm: torch.Tensor, v2: torch.Tensor, av2: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """The estimate of `||A||`, raised for `rows` to at least `||A v|| / ||v||`, given the squares."""
    ratio = torch.sqrt(av2 / v2)
    return torch.where(rows & torch.isfinite(ratio), torch.maximum(a_norm, ratio), a_norm)


def ended_as(outcome: torch.Tensor, status: torch.Tensor, running: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The status and the mask after the active images have this outcome `[B]`: `RUNNING`, or a final status."""
    return torch.where(running, outcome, status), running & (outcome == RUNNING)


def empty(b: torch.Tensor) -> LinearSolution:
    """The solution of an empty batch."""
    none = torch.zeros(0, dtype=torch.int64, device=b.device)
    return LinearSolution(b.clone(), none, none.clone(), torch.zeros(0, dtype=torch.float64, device=b.device))


def solve_system(  # noqa: PLR0913 - a method, a system and their options
    system: System,
    method: KrylovMethod,
    max_iterations: int,
    *,
    monotone: bool = False,
    fallback: Map | None = None,
    capturable: bool = False,
    reuse: Reuse | None = None,
) -> LinearSolution:
    """Run `method` until every image is inactive. Only true residuals decide on convergence.

    When the recurrence of an image stops, its true residual is computed. If it exceeds the tolerance, the method
    restarts from it, at most `REPLACEMENTS` times. Each restart must halve the residual, otherwise the image has
    stagnated. `monotone`: the method minimizes the residual, so if rounding increased it, the earlier iterate is
    restored. `fallback(b)` replaces an iterate that is still zero when the method fails. `capturable`: a step may be
    replayed as a CUDA graph; `reuse`: also in later solves of this method with these limits.
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
    graphed = capturable and records(s.b) and worthwhile(max_iterations, reuse)
    device = s.b.device if graphed else None
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
            exhausted = (s.status == RUNNING) & (s.iterations >= max_iterations)
            s.end(exhausted, Status.MAX_ITERATIONS)
            s.end(rows & (s.status == RUNNING) & ~(s.residual <= 0.5 * before), Status.STAGNATED)
        s.end(s.status == RUNNING, Status.STAGNATED)
        result = s.finish()
        return LinearSolution(*map(step_graphed.own, (result.x, result.status, result.iterations, result.residual)))


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
