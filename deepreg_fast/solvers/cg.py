"""Batched preconditioned conjugate gradients (Hestenes & Stiefel 1952) with per-image stopping (docs/math.md, M14)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .. import checks
from ..ambient import full_precision
from ..backend.gpu.graphs import retry_after_freeing_graphs
from ..batched.fused import decision, fused
from ..batched.graphs import Reuse
from ..batched.linalg import add, dot, dots, select
from ..status import Status
from .linear_system import RUNNING, LinearSolution, Map, System, empty, ended_as, raised_norm, solve_system


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
        self.squared_norms = dots((s.x, s.x), (s.r, s.r))

    def step(self) -> None:
        s = self.system
        z, rz = self._precondition()
        beta, self.rz, self.restarted, s.status, s.running = cg_beta(rz, self.rz, self.restarted, s.status, s.running)
        self.p = cg_direction(self.p, z, beta, s.running)
        p = select(s.running, self.p, 0.0)
        q = s.apply(p, s.running)
        sums = dots((p, p), (p, q), (q, q))
        alpha, s.a_norm, s.status, s.running = cg_alpha(
            sums, self.squared_norms, self.rz, s.a_norm, s.status, s.running, s.eps, s.max_norm
        )
        s.x, s.r, self.squared_norms = cg_move(s.x, s.r, p, q, alpha, s.running)
        self.stagnant_steps, s.running = cg_has_converged(
            self.squared_norms, sums, alpha, self.stagnant_steps, self.target_norm, s.running, s.eps
        )

    def _precondition(self) -> tuple[torch.Tensor, torch.Tensor]:
        """`z = M^{-1} r` and `<r, z>`; without a preconditioner `||r||^2`, which is known."""
        s = self.system
        if not self.preconditioner:
            return s.r, self.squared_norms[1]
        r = select(s.running, s.r, 0.0)
        z = self.preconditioner(r)
        return z, dot(r, z)


@fused("p", "z", in_place=True)
def cg_direction(p: torch.Tensor, z: torch.Tensor, beta: torch.Tensor, active: torch.Tensor) -> torch.Tensor:
    """`p = z + beta p`; donates p, which is not read if `beta` is zero."""
    new, _ = add(z, beta, select(beta.to(p.dtype) != 0, p, 0.0), active)
    return select(active, new, p)


@fused("x", "r", "p", "q", in_place=True)
def cg_move(
    x: torch.Tensor, r: torch.Tensor, p: torch.Tensor, q: torch.Tensor, alpha: torch.Tensor, active: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`x + alpha p`, `r - alpha q`, and `<x, x>`, `<r, r>` of them, `[2, B]`; donates x and r."""
    (x, xx), (r, rr) = add(x, alpha, p, active), add(r, -alpha, q, active)
    return x, r, torch.stack([xx, rr])


# The decisions of a step, on vectors [B].


@decision
def cg_beta(
    rz: torch.Tensor, rz_old: torch.Tensor, restarted: torch.Tensor, status: torch.Tensor, running: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The factor of the old direction from the current and the previous `<r, M^{-1} r>`; and the new rz_old,
    restarted, status and running."""
    failure = torch.where(torch.isfinite(rz), int(Status.NEGATIVE_CURVATURE), int(Status.NON_FINITE))
    outcome = torch.where(torch.isfinite(rz) & (rz > 0), RUNNING, failure)
    beta = torch.where(restarted, 0.0, rz / rz_old)
    status, running = ended_as(outcome, status, running)
    return beta, torch.where(running, rz, rz_old), restarted & ~running, status, running


@decision
def cg_alpha(  # noqa: PLR0913 - all of a step's numbers
    sums: torch.Tensor,
    squared_norms: torch.Tensor,
    rz: torch.Tensor,
    a_norm: torch.Tensor,
    status: torch.Tensor,
    running: torch.Tensor,
    eps: float,
    max_norm: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The step length from `<p, p>, <p, A p>, <A p, A p>`, `[3, B]`, zero if there is no step; and the new a_norm,
    status and running. `squared_norms` are `<x, x>, <r, r>`; a step that may make x or r overflow is not taken."""
    pp, curvature, apap = sums
    a_norm = raised_norm(a_norm, pp, apap, running)
    # <p, A p> contains the rounding of A p; below it the sign has no meaning.
    noise = 0.5 * eps * a_norm * pp
    outcome = torch.where(curvature < -noise, int(Status.NEGATIVE_CURVATURE), int(Status.STAGNATED))
    outcome = torch.where(curvature > noise, RUNNING, outcome)
    finite = torch.isfinite(curvature) & torch.isfinite(apap)
    status, running = ended_as(torch.where(finite, outcome, int(Status.NON_FINITE)), status, running)
    alpha = torch.where(running, rz / curvature, 0.0)
    x = torch.sqrt(squared_norms[0]) + alpha * torch.sqrt(pp)
    r = torch.sqrt(squared_norms[1]) + alpha * torch.sqrt(apap)
    outcome = torch.where((x <= max_norm) & (r <= max_norm), RUNNING, int(Status.NON_FINITE))
    status, running = ended_as(outcome, status, running)
    return torch.where(running, alpha, 0.0), a_norm, status, running


@decision
def cg_has_converged(  # noqa: PLR0913 - all of a step's numbers
    squared_norms: torch.Tensor,
    sums: torch.Tensor,
    alpha: torch.Tensor,
    stagnant_steps: torch.Tensor,
    target_norm: torch.Tensor,
    running: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Consecutive steps that did not change x, and the images whose recursive residual has neither converged nor
    stagnated. `squared_norms` are `<x, x>, <r, r>` after the step, the first of `sums` is `<p, p>`."""
    xx, rr = squared_norms
    step = alpha * torch.sqrt(sums[0])
    stagnant_steps = torch.where(step <= 0.25 * eps * torch.sqrt(xx), stagnant_steps + 1, 0)
    return stagnant_steps, running & ~((torch.sqrt(rr) <= target_norm) | (rr == 0) | (stagnant_steps >= 3))
