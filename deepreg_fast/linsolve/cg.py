"""Batched preconditioned conjugate gradients (Hestenes & Stiefel 1952) with per-image ends (docs/math.md, M14)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .. import checks
from ..status import Status
from .batch import add, dot, select
from .system import LinearSolution, Map, System, drive, empty


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
        checks.integer(self.max_iterations, "max_iterations", 1)
        checks.number(self.tolerance, "tolerance", 0.0)
        if not isinstance(self.truncated_fallback, bool):
            raise checks.InputError(f"truncated_fallback must be True or False, but is {self.truncated_fallback!r}.")


@torch.no_grad()
def cg(
    matvec: Map,
    b: torch.Tensor,
    options: CGOptions | None = None,
    x0: torch.Tensor | None = None,
    preconditioner: Map | None = None,
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
    return drive(system, _ConjugateGradients(system, preconditioner), options.max_iterations, fallback=fallback)


class _ConjugateGradients:
    def __init__(self, system: System, preconditioner: Map | None) -> None:
        self.system, self.preconditioner = system, preconditioner
        self.p = torch.zeros_like(system.b)
        self.rz = torch.ones_like(system.b_norm)
        self.fresh = torch.ones_like(system.running)
        self.idle = torch.zeros_like(system.iterations)

    def restart(self) -> None:
        self.fresh = self.fresh | self.system.running
        self.idle = torch.where(self.system.running, 0, self.idle)

    def step(self) -> None:
        s = self.system
        self._direct()
        rows = s.running
        product = s.apply(self.p, rows)
        pp, bend, size = dot(self.p, self.p), dot(self.p, product), dot(product, product)
        s.end(rows & ~(torch.isfinite(bend) & torch.isfinite(size)), Status.NON_FINITE)
        s.note_norm(pp, size, rows)
        # <p, A p> carries the rounding of A p: below it the sign says nothing.
        noise = 0.5 * s.eps * s.a_norm * pp
        s.end(s.running & (bend < -noise), Status.NEGATIVE_CURVATURE)
        s.end(s.running & (bend <= noise), Status.STAGNATED)
        self._move(product, torch.where(s.running, self.rz / bend, 0.0), pp)

    def _direct(self) -> None:
        """Next search direction `p = z + (rz / rz_old) p`, `z = M^{-1} r`."""
        s = self.system
        r = s.r if bool(s.running.all()) else select(s.running, s.r, 0.0)
        z = self.preconditioner(r) if self.preconditioner else r
        rz = dot(r, z)
        s.end(s.running & ~torch.isfinite(rz), Status.NON_FINITE)
        s.end(s.running & ~(rz > 0), Status.NEGATIVE_CURVATURE)
        factor = torch.where(self.fresh, 0.0, rz / self.rz)
        p, _ = add(z, factor, self.p, s.running)
        self.p = p if bool(s.running.all()) else select(s.running, p, self.p)
        self.rz = torch.where(s.running, rz, self.rz)
        self.fresh = self.fresh & ~s.running

    def _move(self, product: torch.Tensor, length: torch.Tensor, pp: torch.Tensor) -> None:
        s = self.system
        x, xx = add(s.x, length, self.p, s.running)
        r, rr = add(s.r, -length, product, s.running)
        bad = s.running & ~(torch.isfinite(xx) & torch.isfinite(rr))
        if bool(bad.any()):
            x, r = select(bad, s.x, x), select(bad, s.r, r)
            s.end(bad, Status.NON_FINITE)
        s.x, s.r = x, r
        still = length * torch.sqrt(pp) <= 0.25 * s.eps * torch.sqrt(xx)
        self.idle = torch.where(still, self.idle + 1, 0)
        done = (torch.sqrt(rr) <= 0.9 * s.tolerance * s.b_norm) | (rr == 0) | (self.idle >= 3)
        s.running = s.running & ~done
