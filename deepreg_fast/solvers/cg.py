"""Batched preconditioned conjugate gradients (Hestenes & Stiefel 1952) with per-image stopping (docs/math.md, M14)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .. import checks
from ..ambient import full_precision
from ..backend.gpu.graphs import retry_after_freeing_graphs
from ..batched import fused
from ..batched.graphs import Reuse
from ..batched.linalg import dot, select
from ..status import Status
from .linear_system import RUNNING, LinearSolution, Map, System, empty, solve_system


@dataclass(frozen=True)
class CGOptions:
    """Options of `cg`.

    Parameters
    ----------
    max_iterations : int
        Maximum number of products with A per image.
    tolerance : float
        Relative tolerance on the true residual `||b - A x|| / ||b||` at the returned `x`.
    truncated_fallback : bool
        If negative or zero curvature shows before the first step, return `M^{-1} b` instead of zero.

    Raises
    ------
    InputError
        If an option is out of range.

    Examples
    --------
    >>> import deepreg_fast as dr
    >>> dr.CGOptions(tolerance=1e-4).max_iterations
    100
    """

    max_iterations: int = 100
    tolerance: float = 1e-6
    truncated_fallback: bool = False

    def __post_init__(self) -> None:
        checks.plain_fields(self)
        checks.integer(self.max_iterations, "max_iterations", 1)
        checks.number(self.tolerance, "tolerance", 0.0)
        checks.boolean(self.truncated_fallback, "truncated_fallback")


@retry_after_freeing_graphs
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
    """Solve `A_b x_b = b_b` for each image by preconditioned conjugate gradients; A is symmetric positive definite.

    Hestenes & Stiefel (1952), with recomputation of the true residual (docs/math.md, M14).

    Parameters
    ----------
    matvec : callable
        `v -> A v`, both shaped like `b`, for all images at once; inactive images receive zeros.
    b : Tensor `[B, ...]`, float32 or float64
    options : CGOptions, optional
    x0 : Tensor like `b`, optional
        Initial guess. Ignored if non-finite or worse than the zero vector.
    preconditioner : callable, optional
        `v -> M^{-1} v`, symmetric positive definite.
    capturable : bool
        Whether, on a CUDA device, `matvec` and `preconditioner` can be captured in a CUDA graph: they do not
        synchronize and keep no state.
    reuse : Reuse, optional
        What the products depend on besides tensors, so that later solves can replay the same CUDA graph
        (docs/device_loops.md).

    Returns
    -------
    LinearSolution
        `x`, `status`, `iterations` and `residual` per image. `CONVERGED` is reported only for the true residual. If
        `<p, A p> < 0` beyond rounding, the result is the previous iterate (Steihaug 1983) with `NEGATIVE_CURVATURE`.
        If it is zero up to rounding (singular A), or steps no longer change x or its residual, the status is
        `STAGNATED`.

    Raises
    ------
    InputError
        If a shape or dtype is invalid.
    OutOfMemory
        If the device's memory is too small; its `partial` is the `LinearSolution` so far.

    Examples
    --------
    >>> import torch, deepreg_fast as dr
    >>> d = torch.tensor([1.0, 2.0, 4.0])
    >>> sol = dr.cg(lambda v: d * v, torch.ones(2, 3))
    >>> torch.allclose(sol.x, torch.ones(2, 3) / d)
    True
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
    return solve_system(system, method, options.max_iterations, fallback=fallback, capturable=capturable, reuse=reuse)


class _ConjugateGradients:
    def __init__(self, system: System, preconditioner: Map | None) -> None:
        self.system, self.preconditioner = system, preconditioner
        self.p = torch.zeros_like(system.b)
        self.rz = torch.ones_like(system.b_norm)
        self.restarted = torch.ones_like(system.running)
        self.stagnant_steps = torch.zeros_like(system.iterations)
        self.target_norm = 0.9 * system.tolerance * system.b_norm
        self.squared_norms = torch.zeros(2, len(self.rz), dtype=torch.float64, device=self.rz.device)

    def restart(self) -> None:
        s = self.system
        self.restarted = self.restarted | s.running
        self.stagnant_steps = torch.where(s.running, 0, self.stagnant_steps)
        self.squared_norms = fused.dots((s.x, s.x), (s.r, s.r))

    def step(self) -> None:
        s = self.system
        # Without a preconditioner <r, z> is ||r||^2, which is known.
        z, rz = s.r, self.squared_norms[1]
        if self.preconditioner:
            r = select(s.running, s.r, 0.0)
            z = self.preconditioner(r)
            rz = dot(r, z)
        factor = self._beta(rz)
        self.p = fused.cg_direction(self.p, z, factor, s.running)
        p = select(s.running, self.p, 0.0)
        product = s.apply(p, s.running)
        sums = fused.dots((p, p), (p, product), (product, product))
        length = self._alpha(sums)
        s.x, s.r, self.squared_norms = fused.cg_move(s.x, s.r, p, product, length, s.running)
        self._test_convergence(sums, length)

    # Each decision is a single launch if the backend has a kernel for it.

    def _beta(self, rz: torch.Tensor) -> torch.Tensor:
        s = self.system
        if (kernel := fused.kernel_for("cg_beta", s.b)) is not None:
            factor, self.rz, self.restarted, s.status, s.running = kernel(
                rz, self.rz, self.restarted, s.status, s.running
            )
            return factor
        factor, status = cg_beta(rz, self.rz, self.restarted)
        s.end_as(status)
        self.rz = torch.where(s.running, rz, self.rz)
        self.restarted = self.restarted & ~s.running
        return factor

    def _alpha(self, sums: torch.Tensor) -> torch.Tensor:
        s = self.system
        if (kernel := fused.kernel_for("cg_alpha", s.b)) is not None:
            length, s.a_norm, s.status, s.running = kernel(
                sums, self.squared_norms, self.rz, s.a_norm, s.status, s.running, s.eps, s.max_norm
            )
            return length
        s.record_norm(sums[0], sums[2], s.running)
        length, status = cg_alpha(sums, self.rz, s.a_norm, s.eps)
        s.end_as(status)
        length = torch.where(s.running, length, 0.0)
        s.end_as(would_overflow(self.squared_norms, sums, length, s.max_norm))
        return torch.where(s.running, length, 0.0)

    def _test_convergence(self, sums: torch.Tensor, length: torch.Tensor) -> None:
        s = self.system
        if (kernel := fused.kernel_for("cg_has_converged", s.b)) is not None:
            self.stagnant_steps, s.running = kernel(
                self.squared_norms, sums, length, self.stagnant_steps, self.target_norm, s.running, s.eps
            )
            return
        self.stagnant_steps, done = cg_has_converged(
            self.squared_norms, length * torch.sqrt(sums[0]), self.stagnant_steps, self.target_norm, s.eps
        )
        s.running = s.running & ~done


# The decisions of a step, on vectors [B]. The status RUNNING means that the image continues.


def cg_beta(rz: torch.Tensor, rz_old: torch.Tensor, restarted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The factor of the old direction, from the current and the previous `<r, M^{-1} r>`, and the status."""
    status = torch.where(torch.isfinite(rz), int(Status.NEGATIVE_CURVATURE), int(Status.NON_FINITE))
    return torch.where(restarted, 0.0, rz / rz_old), torch.where(torch.isfinite(rz) & (rz > 0), RUNNING, status)


def cg_alpha(
    sums: torch.Tensor, rz: torch.Tensor, a_norm: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The step length from `<p, p>, <p, A p>, <A p, A p>`, `[3, B]`, and the status."""
    pp, curvature, apap = sums
    # <p, A p> contains the rounding of A p; below it the sign has no meaning.
    noise = 0.5 * eps * a_norm * pp
    status = torch.where(curvature < -noise, int(Status.NEGATIVE_CURVATURE), int(Status.STAGNATED))
    status = torch.where(curvature > noise, RUNNING, status)
    finite = torch.isfinite(curvature) & torch.isfinite(apap)
    return rz / curvature, torch.where(finite, status, int(Status.NON_FINITE))


def would_overflow(
    squared_norms: torch.Tensor, sums: torch.Tensor, length: torch.Tensor, max_norm: float
) -> torch.Tensor:
    """`NON_FINITE` if x or r could overflow with this step, else `RUNNING`; `<x, x>, <r, r>` are those before it."""
    x = torch.sqrt(squared_norms[0]) + length * torch.sqrt(sums[0])
    r = torch.sqrt(squared_norms[1]) + length * torch.sqrt(sums[2])
    return torch.where((x <= max_norm) & (r <= max_norm), RUNNING, int(Status.NON_FINITE))


def cg_has_converged(
    squared_norms: torch.Tensor, step: torch.Tensor, stagnant_steps: torch.Tensor, target_norm: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Consecutive steps that did not change x, and whether the recursive residual has converged or stagnated."""
    xx, rr = squared_norms
    stagnant_steps = torch.where(step <= 0.25 * eps * torch.sqrt(xx), stagnant_steps + 1, 0)
    return stagnant_steps, (torch.sqrt(rr) <= target_norm) | (rr == 0) | (stagnant_steps >= 3)
