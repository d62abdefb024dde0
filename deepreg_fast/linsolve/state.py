"""What CG and MINRES share: options, the answer, and the per-image bookkeeping (docs/math.md, M17)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .. import checks
from ..errors import InputError
from ..status import Status
from .batch import expand, norm, power_of_two, select

Linear = Callable[[torch.Tensor], torch.Tensor]
"""A linear map of a batch, image by image, `[B, ...] -> [B, ...]`."""

STILL = 3
"""Steps in a row that leave x where it was before its residual is recomputed."""


@dataclass(frozen=True)
class KrylovOptions:
    """Options that CG and MINRES share.

    Attributes
    ----------
    max_iterations : int
        Limit on the steps of each image, >= 1; recomputed residuals cost one product each and are not counted.
    tolerance : float
        In (0, 1]; an image has converged when `||b - Ax|| + rounding <= tolerance ||b||`.
    replacements : int
        How often an image may start anew from its recomputed residual when that one turns out larger than
        the recurrence said, >= 0.
    """

    max_iterations: int = 100
    tolerance: float = 1e-6
    replacements: int = 5

    def __post_init__(self) -> None:
        checks.integer(self.max_iterations, "max_iterations", 1)
        checks.number(self.tolerance, "tolerance", 0.0, 1.0, open_low=True)
        checks.integer(self.replacements, "replacements", 0)


@dataclass(frozen=True)
class LinearSolution:
    """The answer to a batch of systems `A x = b`.

    Attributes
    ----------
    x : `[B, ...]`, the last finite iterate of each image.
    status : `[B]` int64, see `deepreg_fast.Status`.
    iterations : `[B]` int64, the steps taken.
    residual : `[B]` float64, `||b - Ax|| / ||b||` recomputed at `x`; infinite where it could not be.
    """

    x: torch.Tensor
    status: torch.Tensor
    iterations: torch.Tensor
    residual: torch.Tensor


class Progress:
    """Where each image of a batch stands.

    Right-hand sides are scaled by powers of two to entries of about one, which is exact, so that 1e-30 and 1e30
    behave alike. In a round an image either steps or is `checking`: its place in the product is then taken by `x`,
    so a recomputed residual costs no product of the whole batch. Only that check says `CONVERGED`.

    The residual that a check computes carries the rounding of the product, about `u ||A|| ||x||` (u the unit
    roundoff; Higham 2002, sec. 3.5; Greenbaum 1997); the check adds it before it compares with the tolerance.
    `||A||` is taken as the largest `||Av||/||v||` met.
    """

    def __init__(self, matvec: Linear, b: torch.Tensor, x0: torch.Tensor | None, options: KrylovOptions) -> None:
        _check_input(b, x0)
        self.matvec, self.options = matvec, options
        self.unit = torch.finfo(b.dtype).eps / 2.0
        b = b.detach()
        bad = ~torch.isfinite(b).flatten(1).all(1)
        start = torch.zeros_like(b)
        if x0 is not None:
            bad = bad | ~torch.isfinite(x0).flatten(1).all(1)
            start = x0.detach()
        b = select(bad, torch.zeros_like(b), b)
        top = b.abs().flatten(1).amax(1) if b[0:1].numel() else b.new_zeros(b.shape[0])
        self.exponent = torch.frexp(top).exponent.to(torch.int64)
        self.b = self._scale(b, -self.exponent)
        self.size = torch.where(top > 0, norm(self.b), 1.0)
        start = self._scale(start, -self.exponent)
        usable = (top > 0) & torch.isfinite(norm(start))
        self.x = select(usable, start, torch.zeros_like(start))
        self.r = self.b.clone()
        per_image = {"dtype": torch.int64, "device": b.device}
        self.status = torch.where(bad, int(Status.NON_FINITE), int(Status.MAX_ITERATIONS)).to(torch.int64)
        self.status = torch.where(~bad & (top == 0), int(Status.CONVERGED), self.status)
        self.active = ~bad & (top > 0)
        self.checking = self.active.clone() if x0 is not None else torch.zeros_like(bad)
        self.ending = torch.full_like(self.status, -1)
        self.iterations = torch.zeros(b.shape[0], **per_image)
        self.still = torch.zeros(b.shape[0], **per_image)
        self.replaced = torch.full((b.shape[0],), -1 if x0 is not None else 0, **per_image)
        self.residual = torch.where(bad, torch.inf, torch.zeros_like(self.size))
        self.checked = torch.full_like(self.size, torch.inf)
        self.norm_a = torch.zeros_like(self.size)

    def _scale(self, v: torch.Tensor, exponent: torch.Tensor) -> torch.Tensor:
        return (v.double() * expand(power_of_two(exponent), v.double())).to(v.dtype)

    def multiply(self, direction: torch.Tensor) -> torch.Tensor:
        """`A` times x for the images being checked, times `direction` for those that step, times 0 for the rest."""
        probe = select(self.checking, self.x, direction)
        product = self.matvec(select(self.active, probe, torch.zeros_like(probe)))
        if product.shape != probe.shape or product.dtype != probe.dtype:
            raise InputError(
                f"matvec must return {checks.describe(probe)} like its argument, but returned "
                f"{checks.describe(product)}; make it keep shape and dtype."
            )
        return product.detach()

    def see(self, rows: torch.Tensor, length: torch.Tensor, image: torch.Tensor) -> None:
        """Note `||Av|| = image` for `||v|| = length`: a lower bound of `||A||`."""
        ratio = image / length.clamp_min(1e-300)
        ok = rows & (length > 0) & torch.isfinite(ratio)
        self.norm_a = torch.where(ok, torch.maximum(self.norm_a, ratio), self.norm_a)

    def rounding(self, x_norm: torch.Tensor) -> torch.Tensor:
        """The relative rounding of a residual computed at x, `[B]`."""
        return self.unit * self.norm_a * x_norm / self.size

    def end(self, rows: torch.Tensor, status: Status) -> None:
        """These images end now, with this status."""
        rows = rows & self.active
        self.status = torch.where(rows, int(status), self.status)
        if status == Status.NON_FINITE:
            self.residual = torch.where(rows, torch.inf, self.residual)
        self.active = self.active & ~rows
        self.checking = self.checking & ~rows

    def close(self, rows: torch.Tensor, status: Status) -> None:
        """These images end after one last check of their residual, with this status."""
        rows = rows & self.active
        self.ending = torch.where(rows & (self.ending < 0), int(status), self.ending)
        self.checking = self.checking | rows

    def judge(self, product: torch.Tensor) -> torch.Tensor:
        """Judge the images being checked from `product = Ax`; true where one begins anew from its `r`, `[B]`."""
        rows = self.checking
        r = select(rows, self.b - product, self.r)
        x_norm, ax_norm = norm(self.x), norm(select(rows, product, torch.zeros_like(product)))
        self.see(rows, x_norm, ax_norm)
        residual = norm(r) / self.size
        self.end(rows & ~torch.isfinite(residual), Status.NON_FINITE)
        rows = rows & self.active
        self.residual = torch.where(rows, residual, self.residual)
        # A truncated iterate of an indefinite matrix keeps its warning, however small its residual.
        reached = residual + self.rounding(x_norm) <= self.options.tolerance
        self.end(rows & reached & (self.ending != int(Status.NEGATIVE_CURVATURE)), Status.CONVERGED)
        for status in (Status.MAX_ITERATIONS, Status.NEGATIVE_CURVATURE, Status.STAGNATED):
            self.end(rows & (self.ending == int(status)), status)
        again = rows & self.active & (residual < 0.5 * self.checked) & (self.replaced < self.options.replacements)
        self.end(rows & ~again, Status.STAGNATED)
        self.r = select(again, r, self.r)
        self.checked = torch.where(again, residual, self.checked)
        self.replaced = self.replaced + again
        self.still = torch.where(again, 0, self.still)
        self.checking = self.checking & ~rows
        return again

    def advance(self, rows: torch.Tensor, x: torch.Tensor, r: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
        """Let the images `rows` step to `x` with recurrence residual `r`, a way of `length`; true where one did."""
        x_norm, r_norm = norm(x), norm(r)
        finite = torch.isfinite(x_norm) & torch.isfinite(r_norm)
        self.end(rows & ~finite, Status.NON_FINITE)
        rows = rows & finite
        self.x, self.r = select(rows, x, self.x), select(rows, r, self.r)
        self.iterations = self.iterations + rows
        resting = (length <= self.unit * x_norm) & (x_norm > 0)
        self.still = torch.where(rows, torch.where(resting, self.still + 1, 0), self.still)
        tolerance = self.options.tolerance
        target = (tolerance - self.rounding(x_norm)).clamp_min(0.5 * tolerance)
        self.checking = self.checking | (rows & ((r_norm <= target * self.size) | (self.still >= STILL)))
        self.close(rows & (self.iterations >= self.options.max_iterations), Status.MAX_ITERATIONS)
        return rows

    def solution(self) -> LinearSolution:
        """The answer in the units of the right-hand side."""
        x = self._scale(self.x, self.exponent)
        lost = ~torch.isfinite(x).flatten(1).all(1)
        x = select(lost, torch.zeros_like(x), x)
        self.active = self.status == int(Status.CONVERGED)
        self.end(lost, Status.NON_FINITE)
        back = self._scale(x, -self.exponent)
        self.checking = self.active & (back != self.x).flatten(1).any(1)
        if bool(self.checking.any()):
            # The way back to b's units underflowed somewhere: ask again about the x that is returned.
            self.x = back
            self.ending = torch.where(self.checking, int(Status.STAGNATED), self.ending)
            self.judge(self.multiply(torch.zeros_like(back)))
        return LinearSolution(x, self.status, self.iterations, self.residual)


def _check_input(b: torch.Tensor, x0: torch.Tensor | None) -> None:
    if not isinstance(b, torch.Tensor) or b.ndim < 2 or b.dtype not in checks.FLOATS:
        raise InputError(
            f"b must be a float32 or float64 tensor [B, ...], but is {checks.describe(b)}; "
            "add the batch dimension with b[None]."
        )
    if x0 is not None and (not isinstance(x0, torch.Tensor) or x0.shape != b.shape or x0.dtype != b.dtype):
        raise InputError(f"x0 must be like b, {checks.describe(b)}, but is {checks.describe(x0)}.")
