"""Batched MINRES (Paige & Saunders 1975) for symmetric systems, definite or not (docs/math.md, M14)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .. import checks
from ..ambient import full_precision
from ..backend.gpu.graphs import retry_after_freeing_graphs
from ..batched.fused import fused
from ..batched.graphs import Reuse
from ..batched.linalg import dot, expand, hypot, select
from ..status import Status
from .linear_system import LinearSolution, Map, System, empty, solve_system


@dataclass(frozen=True)
class MinresOptions:
    """Options of `minres`.

    Parameters
    ----------
    max_iterations : int
        Maximum number of products with A per image.
    tolerance : float
        Relative tolerance on the true residual `||b - A x|| / ||b||` at the returned `x`.

    Raises
    ------
    InputError
        If an option is out of range.

    Examples
    --------
    >>> import deepreg_fast as dr
    >>> dr.MinresOptions(tolerance=1e-4).max_iterations
    100
    """

    max_iterations: int = 100
    tolerance: float = 1e-6

    def __post_init__(self) -> None:
        checks.plain_fields(self)
        checks.integer(self.max_iterations, "max_iterations", 1)
        checks.number(self.tolerance, "tolerance", 0.0)


@retry_after_freeing_graphs
@full_precision
@torch.no_grad()
def minres(  # noqa: PLR0913 - the system, then the options
    matvec: Map,
    b: torch.Tensor,
    options: MinresOptions | None = None,
    x0: torch.Tensor | None = None,
    preconditioner: Map | None = None,
    capturable: bool = False,
    reuse: Reuse | None = None,
) -> LinearSolution:
    """Solve `A_b x_b = b_b` for each image by preconditioned MINRES; A is symmetric.

    Paige & Saunders (1975) (docs/math.md, M14).

    Parameters
    ----------
    matvec : callable
        `v -> A v`, both shaped like `b`, for all images at once; inactive images receive zeros.
    b : Tensor `[B, ...]`, float32 or float64
    options : MinresOptions, optional
    x0 : Tensor like `b`, optional
        Initial guess. Ignored if non-finite or worse than the zero vector.
    preconditioner : callable, optional
        `v -> M^{-1} v`, symmetric positive definite. MINRES then decreases the `M^{-1}`-norm of the residual
        monotonically; convergence is still tested in the Euclidean norm.
    capturable : bool
        Whether, on a CUDA device, `matvec` and `preconditioner` can be captured in a CUDA graph: they do not
        synchronize and keep no state.
    reuse : Reuse, optional
        What the products depend on besides tensors, so that later solves can replay the same CUDA graph
        (docs/device_loops.md).

    Returns
    -------
    LinearSolution
        `x`, `status`, `iterations` and `residual` per image. `CONVERGED` is reported only for the true residual. The
        status is `STAGNATED` at a least-squares solution of a singular system or at the rounding of this precision,
        and `NEGATIVE_CURVATURE` if the preconditioner is not positive definite.

    Raises
    ------
    InputError
        If a shape or dtype is invalid.
    OutOfMemory
        If the device's memory is too small; its `partial` is the `LinearSolution` so far.

    Examples
    --------
    >>> import torch, deepreg_fast as dr
    >>> d = torch.tensor([1.0, -2.0, 4.0])
    >>> sol = dr.minres(lambda v: d * v, torch.ones(2, 3))
    >>> torch.allclose(sol.x, torch.ones(2, 3) / d, atol=1e-5)
    True
    """
    options = options or MinresOptions()
    if isinstance(b, torch.Tensor) and b.ndim and len(b) == 0:
        return empty(b)
    system = System(matvec, b, x0, options.tolerance)
    system.begin(by_energy=False)
    method = _Minres(system, preconditioner)
    return solve_system(system, method, options.max_iterations, monotone=True, capturable=capturable, reuse=reuse)


class _Minres:
    """Names as in Paige & Saunders: `r1, r2, y` are the Lanczos vectors times their betas, `w` the search direction,
    `(cs, sn)` the last rotation, `phibar` the residual in the norm of `M^{-1}`. `moved` holds the squared norms of x,
    r, w and the previous w."""

    def __init__(self, system: System, preconditioner: Map | None) -> None:
        self.system, self.preconditioner = system, preconditioner
        self.r1, self.r2, self.y, self.w, self.w_old = (torch.zeros_like(system.b) for _ in range(5))
        none = torch.zeros_like(system.b_norm)
        self.beta, self.beta_old, self.dbar, self.epsln = none, none, none, none
        self.phibar, self.cs, self.sn, self.a_est = none, none, none, none
        self.moved = torch.zeros(4, len(none), dtype=torch.float64, device=none.device)

    def _solve(self, r: torch.Tensor, rr: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`M^{-1} r` and `sqrt(<r, M^{-1} r>)`; an image with a negative or non-finite square ends. `rr = <r, r>`."""
        s = self.system
        rows = s.running
        y, square, yy = r, rr, rr
        if self.preconditioner:
            y = self.preconditioner(select(rows, r, 0.0))
            square, yy = dot(r, y), dot(y, y)
        s.end(rows & ~torch.isfinite(square), Status.NON_FINITE)
        s.end(rows & (square < -10.0 * s.eps * torch.sqrt(rr) * torch.sqrt(yy)), Status.NEGATIVE_CURVATURE)
        return y, torch.sqrt(square.clamp_min(0.0))

    def restart(self) -> None:
        s = self.system
        rows = s.running
        r = select(rows, s.r, 0.0)
        rr = dot(r, r)
        y, beta = self._solve(r, rr)
        self.r1, self.w, self.w_old = (select(~rows, v, 0.0) for v in (self.r1, self.w, self.w_old))
        # The Lanczos vector gets its own memory.
        self.r2, self.y = torch.where(expand(rows, r), r, self.r2), select(rows, y, self.y)
        none = torch.zeros_like(beta)
        self._keep(rows, beta_old=none + 1.0, beta=beta, phibar=beta, cs=none - 1.0, sn=none)
        self._keep(rows, dbar=none, epsln=none, a_est=none)
        self.moved = torch.stack([dot(s.x, s.x), rr, none, none])
        s.end(s.running & ~(beta > 0), Status.STAGNATED)

    def step(self) -> None:
        s = self.system
        v, vv, alfa, r2r2 = self._lanczos()
        y, beta = self._solve(self.r2, r2r2)
        rows = s.running
        oldeps, delta = self.epsln, self.cs * self.dbar + self.sn * alfa
        gbar, epsln, dbar = self.sn * self.dbar - self.cs * alfa, self.sn * beta, -self.cs * beta
        self.a_est = torch.where(rows, torch.maximum(self.a_est, hypot(alfa, beta)), self.a_est)
        tiny = s.eps * self.a_est
        gamma = hypot(gbar, beta)
        # ||A r|| = phibar ||(gbar, dbar)||. If it vanishes, x is a least-squares solution of a singular system.
        s.end(rows & (torch.minimum(hypot(gbar, dbar), gamma) <= 10.0 * tiny), Status.STAGNATED)
        gamma = torch.where(gamma > 0, gamma, 1.0)
        cs, sn = gbar / gamma, beta / gamma
        phi, phibar = cs * self.phibar, sn * self.phibar
        tail = torch.where(beta > 0, phibar * cs / torch.where(beta > 0, beta, 1.0), 0.0)
        numbers = (oldeps, delta, gamma, phi, sn**2, tail)
        s.end(s.running & ~self._fits(vv, r2r2, numbers), Status.NON_FINITE)
        rows = s.running
        state = (s.x, s.r, self.w, self.w_old)
        (s.x, s.r, self.w, self.w_old), moved = minres_move(state, v, self.r2, numbers, rows)
        self.y = select(rows, y, self.y)
        self.moved = torch.stack([*moved, self.moved[2]])
        self._keep(rows, beta_old=self.beta, beta=beta, dbar=dbar, epsln=epsln, phibar=phibar, cs=cs, sn=sn)
        xx, rr, ww, _ = self.moved
        stagnated = phi.abs() * torch.sqrt(ww) <= 0.01 * s.eps * torch.sqrt(xx)
        done = (torch.sqrt(rr) <= 0.9 * s.tolerance * s.b_norm) | (beta <= tiny) | (stagnated & (phi != 0))
        s.running = s.running & ~done

    def _fits(self, vv: torch.Tensor, r2r2: torch.Tensor, numbers: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Whether x, r and w cannot overflow, from bounds by the triangle inequality."""
        oldeps, delta, gamma, phi, a, b = (t.abs() for t in numbers)
        x, r, w, w_old = torch.sqrt(self.moved)
        w = (torch.sqrt(vv) + oldeps * w_old + delta * w) / gamma
        x, r = x + phi * w, a * r + b * torch.sqrt(r2r2)
        return (x <= self.system.max_norm) & (r <= self.system.max_norm) & (w <= self.system.max_norm)

    def _lanczos(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """`v`, `<v, v>`, `<v, A v>` and `<r2, r2>`; `r2` is now the next Lanczos vector times its beta."""
        s = self.system
        v = select(s.running, self.y / expand(torch.where(s.running, self.beta, 1.0), self.y), 0.0)
        u = s.apply(v, s.running)
        u, sums = lanczos_first(u, self.beta / self.beta_old, self.r1, v, s.running)
        vv, uu, alfa = sums
        s.record_norm(vv, uu, s.running)
        s.end(s.running & ~torch.isfinite(alfa), Status.NON_FINITE)
        factor = torch.where(s.running, alfa / self.beta, 0.0)
        self.r1, self.r2, r2r2 = lanczos_second(u, factor, self.r1, self.r2, s.running)
        return v, vv, alfa, r2r2

    def _keep(self, rows: torch.Tensor, **values: torch.Tensor) -> None:
        for name, value in values.items():
            setattr(self, name, torch.where(rows, value, getattr(self, name)))


Vectors = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


@fused("u", "r1", "v", in_place=True)
def lanczos_first(
    u: torch.Tensor, c: torch.Tensor, r1: torch.Tensor, v: torch.Tensor, active: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`u - c r1`, and `[3, B]`: `<v, v>`, the old `<u, u>`, the new `<v, u>`; donates u."""
    new = select(active, u - expand(c, u) * r1, u)
    return new, torch.stack([dot(v, v), dot(u, u), dot(v, new)])


@fused("u", "r1", "r2", in_place=True)
def lanczos_second(
    u: torch.Tensor, c: torch.Tensor, r1: torch.Tensor, r2: torch.Tensor, active: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`r1, r2 = r2, u - c r2`, and `<r2, r2>`; donates r1 and r2."""
    new = select(active, u - expand(c, u) * r2, r2)
    return select(active, r2, r1), new, dot(new, new)


@fused("state", "v", "r2", in_place=True)
def minres_move(
    state: Vectors, v: torch.Tensor, r2: torch.Tensor, numbers: tuple[torch.Tensor, ...], active: torch.Tensor
) -> tuple[Vectors, torch.Tensor]:
    """The next `state` x, r, w, w_old, and `<x, x>`, `<r, r>`, `<w, w>`, `[3, B]`; donates `state`.

    `w_old, w = w, (v - oldeps w_old - delta w) / gamma`, `x + phi w`, `a r - b r2`. `numbers` are oldeps, delta,
    gamma, phi, a, b.
    """
    x, r, w, w_old = state
    oldeps, delta, gamma, phi, a, b = (expand(t, v) for t in numbers)
    new = (v - oldeps * w_old - delta * w) / gamma
    x, r = select(active, x + phi * new, x), select(active, a * r - b * r2, r)
    w_old, w = select(active, w, w_old), select(active, new, w)
    return (x, r, w, w_old), torch.stack([dot(x, x), dot(r, r), dot(w, w)])
