"""The gradient of the recovery error in the parameters, through the solution (docs/math.md, M7).

Invariant: at `xhat = argmin 1/2||y - Ax||^2 + mu r(x)`, `A^T(A xhat - y) + mu grad r(xhat) = 0`. Differentiating it
gives, for `L = sum_b ||xhat_b - x_b||^2` and `H = A^T A + mu hess r(xhat)`:
`H gamma = x - xhat`, `dL/dtheta = 2 mu d/dtheta <grad r(xhat), gamma>`, `dL/dlog mu = 2 mu <grad r(xhat), gamma>`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from .. import checks
from ..ambient import detached, eager, full_precision, outside_inference
from ..backend import Linearization
from ..batched.graphs import Reuse, records, reuse_of
from ..batched.linalg import dot, expand, norm
from ..batched.loop import attach_partial_result
from ..errors import InputError
from ..operators.base import LinearOperator
from ..regularizers.base import Regularizer, as_regularizer
from ..solvers import CGOptions, LinearSolution, MinresOptions, PGDOptions, Solution, cg, minres, pgd
from ..status import Status
from .data_term import resolve_mu

METHODS = ("cg", "minres", "jfb", "unrolled")


@dataclass(frozen=True)
class AdjointOptions:
    """Options of the adjoint solve `H gamma = x - xhat` (docs/math.md, M7).

    Parameters
    ----------
    method : "cg", "minres", "jfb" or "unrolled"
        Preconditioned CG; preconditioned MINRES (for indefinite H: beta > 1 + alpha); Jacobian-free backpropagation
        (Fung et al. 2022: the preconditioner alone, no Hessian product); or backpropagation through `unrolled_steps`
        plain PGD steps.
    max_iterations : int
    tolerance : float
        Relative residual of CG and MINRES. float32 reaches 1e-4 for mu down to about 1e-3; use float64 for less.
    bound : float
        `||gamma|| <= bound ||x - xhat|| / mu`; longer solutions (H nearly singular) are scaled to this norm.
    unrolled_steps : int
        Steps that "unrolled" differentiates; memory grows with them.

    Raises
    ------
    InputError
        If an option is out of range.

    Examples
    --------
    >>> import deepreg_fast as dr
    >>> dr.AdjointOptions(method="minres").max_iterations
    100
    """

    method: str = "cg"
    max_iterations: int = 100
    tolerance: float = 1e-4
    bound: float = 10.0
    unrolled_steps: int = 100

    def __post_init__(self) -> None:
        checks.plain_fields(self)
        checks.choice(self.method, "method", METHODS)
        checks.integer(self.max_iterations, "max_iterations", 1)
        checks.number(self.tolerance, "tolerance", 0.0)
        checks.number(self.bound, "bound", 0.0, open_low=True)
        checks.integer(self.unrolled_steps, "unrolled_steps", 1)


@dataclass
class Hypergradient:
    """Result of `hypergradient`.

    Attributes
    ----------
    theta : dict of Tensor
        Gradient by parameter name.
    log_mu : Tensor, 0-d
        Gradient in log mu, summed over the images.
    loss : Tensor `[B]`
        `||xhat_b - x_b||^2`.
    solution : Solution
        The recovery.
    adjoint : LinearSolution or None
        gamma with its status; None for "unrolled".

    Examples
    --------
    >>> import torch, deepreg_fast as dr
    >>> A, x = dr.Identity((1, 8, 8)), torch.rand(2, 1, 8, 8)
    >>> dr.hypergradient(x, A.A(x), A, dr.TV(0.1), mu=0.01).loss.shape
    torch.Size([2])
    """

    theta: dict[str, torch.Tensor]
    log_mu: torch.Tensor
    loss: torch.Tensor
    solution: Solution
    adjoint: LinearSolution | None


def solve_adjoint(  # noqa: PLR0913 - the system is five things
    lin: Linearization,
    A: LinearOperator,
    mu: torch.Tensor,
    b: torch.Tensor,
    options: AdjointOptions,
    gamma0: torch.Tensor | None = None,
    curvature: float = 1.0,
) -> LinearSolution:
    """Solve `(A^T A + mu hess r) gamma = b` for each image, preconditioned by `(A^T A + mu c I)^{-1}`.

    If CG finds negative curvature, the truncated iterate is returned (Steihaug 1983) with status NEGATIVE_CURVATURE.
    """
    adjoint = _Adjoint(lin, A, mu, curvature)
    matvec, preconditioner = adjoint.matvec, adjoint.precondition if A.preconditioned else None
    capturable = records(b) and A.capturable(b) and getattr(lin, "capturable", False)
    reuse = adjoint.reuse(b) if capturable else None
    if options.method == "unrolled":
        raise InputError("method must be 'cg', 'minres' or 'jfb' for an adjoint solve, but is 'unrolled'.")
    if options.method == "jfb":
        x = preconditioner(b) if preconditioner else b / expand(mu * curvature, b)
        zero = torch.zeros(len(b), dtype=torch.int64, device=b.device)
        residual = norm(b - matvec(x)) / norm(b).clamp_min(1e-300)
        sol = LinearSolution(x, torch.full_like(zero, int(Status.MAX_ITERATIONS)), zero, residual)
    elif options.method == "minres":
        sol = minres(
            matvec,
            b,
            MinresOptions(options.max_iterations, options.tolerance),
            x0=gamma0,
            preconditioner=preconditioner,
            capturable=capturable,
            reuse=reuse,
        )
    else:
        cg_options = CGOptions(options.max_iterations, options.tolerance, truncated_fallback=True)
        sol = cg(matvec, b, cg_options, x0=gamma0, preconditioner=preconditioner, capturable=capturable, reuse=reuse)
    length = norm(sol.x)
    max_norm = options.bound * norm(b) / mu.double()
    factor = torch.where(length > max_norm, max_norm / length.clamp_min(1e-300), 1.0)
    sol.x = torch.where(expand(length > max_norm, sol.x), expand(factor, sol.x) * sol.x, sol.x)
    shortened = (length > max_norm) & (sol.status == int(Status.CONVERGED))
    sol.status = torch.where(shortened, int(Status.STAGNATED), sol.status)
    return sol


class _Adjoint:
    """The operator `A^T A + mu hess r` at a point, and its preconditioner."""

    def __init__(self, lin: Linearization, A: LinearOperator, mu: torch.Tensor, curvature: float) -> None:
        self.lin, self.A, self.mu, self.curvature = lin, A, mu.detach(), curvature

    def matvec(self, v: torch.Tensor) -> torch.Tensor:
        """`(A^T A + mu hess r) v`."""
        return self.A.normal(v) + expand(self.mu, v) * self.lin.hvp(v)

    def precondition(self, v: torch.Tensor) -> torch.Tensor:
        """`(A^T A + mu c I)^{-1} v`."""
        return self.A.precondition(v, self.mu * self.curvature)

    def reuse(self, b: torch.Tensor) -> Reuse | None:
        """Key for reusing a graph of products in later solves, at other points and with other parameter values."""
        signature = getattr(self.lin, "signature", lambda: None)()
        return reuse_of(("adjoint", float(self.curvature)), self, signature, self.A.signature(b))

    def place(self, put: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Replace the input tensors; see `graphs.Inputs`."""
        self.mu, self.lin = put(self.mu), self.lin.moved(put)  # type: ignore[attr-defined]


@full_precision
@torch.no_grad()
def hypergradient(  # noqa: PLR0913 - the problem, then the options
    x_true: torch.Tensor,
    y: torch.Tensor,
    A: LinearOperator,
    reg: nn.Module,
    mu: float | torch.Tensor | None = None,
    *,
    lam: float | None = None,
    sigma: float | None = None,
    options: PGDOptions | None = None,
    adjoint: AdjointOptions | None = None,
) -> Hypergradient:
    """Gradient of `sum_b ||xhat_b - x_b||^2` in theta and log mu, where `xhat` is the recovery from y.

    Implicit differentiation: the adjoint system `H gamma = x - xhat` with `H = A^T A + mu hess r(xhat)`, then one
    parameter product (docs/math.md, M7). Images whose recovery is not finite contribute nothing.

    Parameters
    ----------
    x_true : Tensor `[B, C, H, W]`
    y : Tensor `[B, m]`
        Measurements made by `A`.
    A : LinearOperator
    reg : Regularizer, or an nn.Module that maps images to one energy each
    mu : float or Tensor `[B]`, > 0
        Weight of the regularizer. Alternatively give `lam` and `sigma`.
    lam, sigma : float, optional
        Weight and noise level, `mu = lam sigma^2`.
    options : PGDOptions, optional
        Of the recovery; default: tolerance 1e-6, Anderson acceleration.
    adjoint : AdjointOptions, optional
        Of the linear solve.

    Returns
    -------
    Hypergradient

    Raises
    ------
    InputError
        If a shape, dtype or value is invalid.
    OutOfMemory
        If the device's memory is too small; its `partial` is the recovery so far.

    Examples
    --------
    >>> import torch, deepreg_fast as dr
    >>> A, x = dr.SRM((1, 8, 8), ratio=0.5), torch.rand(2, 1, 8, 8)
    >>> hg = dr.hypergradient(x, A.A(x), A, dr.Ridge(filters=2, kernel_size=3), mu=0.1)
    >>> sorted(hg.theta)
    ['net.filters', 'net.raw']
    """
    reg = as_regularizer(reg)
    x_true = checks.finite(checks.images(x_true, "x_true", A.image_shape), "x_true").detach()
    y = checks.finite(checks.measured(y, A.measurement_shape), "y").detach()
    options = options or PGDOptions(max_iterations=1000, tolerance=1e-6, acceleration="anderson")
    adjoint = adjoint or AdjointOptions()
    mu_b = resolve_mu(mu, lam, sigma, like=y)
    x0 = initial_point(y, A, reg)
    sol = pgd(y, A, reg, mu_b, options, x0)
    loss = dot(sol.x - x_true, sol.x - x_true)
    if adjoint.method == "unrolled":
        with attach_partial_result(lambda: sol):
            theta, log_mu = unrolled_gradients(x_true, y, A, reg, mu_b, x0, sol.tau, adjoint.unrolled_steps)
        return Hypergradient(theta, log_mu, loss, sol, None)
    with attach_partial_result(lambda: sol):
        lin = reg.linearize(sol.x)
        gamma = solve_adjoint(lin, A, mu_b, x_true - sol.x, adjoint, curvature=1.0 + reg.alpha)
        theta, log_mu = parameter_gradients(lin, mu_b, gamma.x)
    return Hypergradient(theta, log_mu, loss, sol, gamma)


def initial_point(y: torch.Tensor, A: LinearOperator, reg: Regularizer) -> torch.Tensor:
    """The start of a recovery: `prox_l2(c, y, 1/mu0)` at the regularizer's center c, with `mu0 = 1e-3 ||A||^2`.

    If `A A^T = g I`, it is the limit for `mu0 = 0`, the point closest to c that matches the measurements, `c + A^+ (y -
    A c)`. For other operators, such as a blur, that point would be made of amplified noise.
    """
    c = y.new_full((y.shape[0], *A.image_shape), reg.center)
    if A.gram_scale is not None:
        return c + A.A_dagger(y - A.A(c))
    return A.prox_l2(c, y, 1e3 / A.sqnorms(y.dtype))


def parameter_gradients(
    lin: Linearization, mu: torch.Tensor, gamma: torch.Tensor
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """`2 mu d/dtheta <grad r, gamma>` by name and `2 mu <grad r, gamma>`, summed over images."""
    theta = lin.param_vjp(expand(2.0 * mu, gamma) * gamma)
    log_mu = (2.0 * mu.double() * dot(lin.grad, gamma)).sum().to(gamma.dtype)
    return theta, log_mu


@outside_inference
@full_precision
def unrolled_gradients(  # noqa: PLR0913 - a problem, a start and a schedule
    x_true: torch.Tensor,
    y: torch.Tensor,
    A: LinearOperator,
    reg: Regularizer,
    mu: torch.Tensor,
    x0: torch.Tensor,
    tau: torch.Tensor,
    steps: int,
    weights: torch.Tensor | None = None,
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Gradients of `sum_b w_b ||x_b - x_true_b||^2` in theta and log mu, by backpropagation through `steps` plain PGD
    steps of size `tau/2` from `x0`. `weights` is `w` `[B]`, 1 by default. This is the oracle for the implicit gradient.
    Memory grows with the number of steps."""
    named = [(n, p) for n, p in reg.named_parameters() if p.requires_grad]
    names, params = [n for n, _ in named], [p for _, p in named]
    x_true, y, x0, tau = (detached(t) for t in (x_true, y, x0, tau))
    log_mu = torch.log(detached(mu)).requires_grad_()
    step = expand(0.5 * tau, x0)
    x = x0.requires_grad_()
    with torch.enable_grad(), eager():
        for _ in range(steps):
            (g,) = torch.autograd.grad(reg.energy(x).sum(), x, create_graph=True)
            x = A.prox_l2(x - step * g, y, 0.5 * tau.to(x0.dtype) / torch.exp(log_mu))
        error = (x - x_true).square()
        loss = (error if weights is None else expand(detached(weights), error) * error).sum()
        grads = torch.autograd.grad(loss, [*params, log_mu], allow_unused=True)
    gradients = [torch.zeros_like(p) if g is None else g for g, p in zip(grads, [*params, log_mu], strict=True)]
    return dict(zip(names, gradients[:-1], strict=True)), gradients[-1].sum()
