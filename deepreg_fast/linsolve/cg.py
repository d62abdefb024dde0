"""Batched preconditioned conjugate gradients (Hestenes & Stiefel 1952) with per-image ends (docs/math.md, M14)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .. import checks
from ..ambient import full_precision
from ..backend.gpu_graphs import giving_way
from ..status import Status
from . import passes
from .batch import dot, select
from .graphs import Reuse
from .system import OPEN, LinearSolution, Map, System, drive, empty


@dataclass(frozen=True)
class CGOptions:
    """Options of `cg`.

    Attributes
    ----------
    max_iterations : int
        Limit on the products with A of each image.
    tolerance : float
        On `||b - A x|| / ||b||`, taken truly at the returned x.
    truncated_fallback : bool
        Return `M^{-1} b` where negative or no curvature shows before the first step, instead of zero.
    """

    max_iterations: int = 100
    tolerance: float = 1e-6
    truncated_fallback: bool = False

    def __post_init__(self) -> None:
        checks.plain_fields(self)
        checks.integer(self.max_iterations, "max_iterations", 1)
        checks.number(self.tolerance, "tolerance", 0.0)
        checks.boolean(self.truncated_fallback, "truncated_fallback")


@giving_way
@full_precision
@torch.no_grad()
def cg(  # noqa: PLR0913 - the system, then the options
    matvec: Map,
    b: torch.Tensor,
    options: CGOptions | None = None,
    x0: torch.Tensor | None = None,
    preconditioner: Map | None = None,
    capturable: bool = False,
    reuse: Reuse | None = None,
) -> LinearSolution:
    """Solve `A_b x_b = b_b` for each image, A symmetric positive definite.

    Parameters
    ----------
    matvec : callable
        `v -> A v`, both like `b`, for all images at once; images that have ended get zeros.
    b : Tensor `[B, ...]`, float32 or float64
    options : CGOptions
    x0 : Tensor like `b`, optional
        Start. One that is not finite, or worse than zero, is dropped.
    preconditioner : callable, optional
        `v -> M^{-1} v`, symmetric positive definite.
    capturable : bool
        On a CUDA device: `matvec` and `preconditioner` may be replayed as parts of a CUDA graph (they look at no
        number and keep nothing).
    reuse : Reuse, optional
        Lets that graph serve later solves (`graphs.py`).

    Returns
    -------
    LinearSolution
        `CONVERGED` only where the true residual says so. Where `<p, A p> < 0` beyond rounding, the iterate before it
        (Steihaug 1983) and `NEGATIVE_CURVATURE`; where it is zero to rounding (singular), or where steps no longer
        change x or its residual, `STAGNATED`.

    Raises
    ------
    InputError
        If a shape or dtype does not fit.
    """
    options = options or CGOptions()
    if isinstance(b, torch.Tensor) and b.ndim and len(b) == 0:
        return empty(b)
    system = System(matvec, b, x0, options.tolerance)
    system.begin(by_energy=True)
    fallback = None
    if options.truncated_fallback:
        fallback = preconditioner or torch.clone
    method = _ConjugateGradients(system, preconditioner)
    return drive(system, method, options.max_iterations, fallback=fallback, capturable=capturable, reuse=reuse)


class _ConjugateGradients:
    def __init__(self, system: System, preconditioner: Map | None) -> None:
        self.system, self.preconditioner = system, preconditioner
        self.p = torch.zeros_like(system.b)
        self.rz = torch.ones_like(system.b_norm)
        self.fresh = torch.ones_like(system.running)
        self.idle = torch.zeros_like(system.iterations)
        self.aim = 0.9 * system.tolerance * system.b_norm
        self.moved = torch.zeros(2, len(self.rz), dtype=torch.float64, device=self.rz.device)

    def restart(self) -> None:
        s = self.system
        self.fresh = self.fresh | s.running
        self.idle = torch.where(s.running, 0, self.idle)
        self.moved = passes.dots((s.x, s.x), (s.r, s.r))

    def step(self) -> None:
        s = self.system
        # Without a preconditioner <r, z> is the square of r, which is known.
        z, rz = s.r, self.moved[1]
        if self.preconditioner:
            r = select(s.running, s.r, 0.0)
            z = self.preconditioner(r)
            rz = dot(r, z)
        factor = self._turn(rz)
        self.p = passes.cg_direction(self.p, z, factor, s.running)
        p = select(s.running, self.p, 0.0)
        product = s.apply(p, s.running)
        sums = passes.dots((p, p), (p, product), (product, product))
        length = self._stride(sums)
        s.x, s.r, self.moved = passes.cg_move(s.x, s.r, p, product, length, s.running)
        self._arrive(sums, length)

    # Each decision is a single launch where the backend has a kernel for it.

    def _turn(self, rz: torch.Tensor) -> torch.Tensor:
        s = self.system
        if (kernel := passes.kernel_for("cg_turn", s.b)) is not None:
            factor, self.rz, self.fresh, s.status, s.running = kernel(rz, self.rz, self.fresh, s.status, s.running)
            return factor
        factor, status = turn(rz, self.rz, self.fresh)
        s.end_as(status)
        self.rz = torch.where(s.running, rz, self.rz)
        self.fresh = self.fresh & ~s.running
        return factor

    def _stride(self, sums: torch.Tensor) -> torch.Tensor:
        s = self.system
        if (kernel := passes.kernel_for("cg_stride", s.b)) is not None:
            length, s.a_norm, s.status, s.running = kernel(
                sums, self.moved, self.rz, s.a_norm, s.status, s.running, s.eps, s.longest
            )
            return length
        s.note_norm(sums[0], sums[2], s.running)
        length, status = stride(sums, self.rz, s.a_norm, s.eps)
        s.end_as(status)
        length = torch.where(s.running, length, 0.0)
        s.end_as(overflow(self.moved, sums, length, s.longest))
        return torch.where(s.running, length, 0.0)

    def _arrive(self, sums: torch.Tensor, length: torch.Tensor) -> None:
        s = self.system
        if (kernel := passes.kernel_for("cg_arrived", s.b)) is not None:
            self.idle, s.running = kernel(self.moved, sums, length, self.idle, self.aim, s.running, s.eps)
            return
        self.idle, done = arrived(self.moved, length * torch.sqrt(sums[0]), self.idle, self.aim, s.eps)
        s.running = s.running & ~done


# The decisions of a step, on numbers [B]. A status of OPEN means go on.


def turn(rz: torch.Tensor, rz_old: torch.Tensor, fresh: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The factor of the old direction, from `<r, M^{-1} r>` and the one before; and the status."""
    status = torch.where(torch.isfinite(rz), int(Status.NEGATIVE_CURVATURE), int(Status.NON_FINITE))
    return torch.where(fresh, 0.0, rz / rz_old), torch.where(torch.isfinite(rz) & (rz > 0), OPEN, status)


def stride(sums: torch.Tensor, rz: torch.Tensor, a_norm: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The length of the step from `<p, p>, <p, A p>, <A p, A p>`, `[3, B]`; and the status."""
    pp, bend, size = sums
    # <p, A p> carries the rounding of A p: below it the sign says nothing.
    noise = 0.5 * eps * a_norm * pp
    status = torch.where(bend < -noise, int(Status.NEGATIVE_CURVATURE), int(Status.STAGNATED))
    status = torch.where(bend > noise, OPEN, status)
    finite = torch.isfinite(bend) & torch.isfinite(size)
    return rz / bend, torch.where(finite, status, int(Status.NON_FINITE))


def overflow(moved: torch.Tensor, sums: torch.Tensor, length: torch.Tensor, longest: float) -> torch.Tensor:
    """The status: whether x or r could leave the number range with this step, from `<x, x>, <r, r>` before it."""
    x = torch.sqrt(moved[0]) + length * torch.sqrt(sums[0])
    r = torch.sqrt(moved[1]) + length * torch.sqrt(sums[2])
    return torch.where((x <= longest) & (r <= longest), OPEN, int(Status.NON_FINITE))


def arrived(
    moved: torch.Tensor, step: torch.Tensor, idle: torch.Tensor, aim: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """How often in a row a step of this length has left x unchanged, and whether the recurrence is done."""
    xx, rr = moved
    idle = torch.where(step <= 0.25 * eps * torch.sqrt(xx), idle + 1, 0)
    return idle, (torch.sqrt(rr) <= aim) | (rr == 0) | (idle >= 3)
