"""The gradient of the recovery error in the parameters, through the solution (docs/math.md, M7).

Invariant: at `xhat = argmin 1/2||y - Ax||^2 + mu r(x)`, `A^T(A xhat - y) + mu grad r(xhat) = 0`. Differentiating it
gives, for `L = sum_b ||xhat_b - x_b||^2` and `H = A^T A + mu hess r(xhat)`:
`H gamma = x - xhat`, `dL/dtheta = 2 mu d/dtheta <grad r(xhat), gamma>`, `dL/dlog mu = 2 mu <grad r(xhat), gamma>`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from .. import checks
from ..ambient import detached, eager, full_precision, outside_inference
from ..backend import Linearization
from ..batched.linalg import dot, expand
from ..batched.loop import attach_partial_result
from ..errors import InputError
from ..operators.base import LinearOperator
from ..regularizers.base import Regularizer, as_regularizer
from ..solvers import LinearSolution, PGDOptions, Solution, pgd
from .adjoint import Adjoint, ImplicitAdjoint, Unrolled, solve_adjoint
from .data_term import initial_point, resolve_mu


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
        gamma with its status; None for `Unrolled`.

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
    adjoint: Adjoint | None = None,
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
    adjoint : ImplicitAdjoint, JacobianFree or Unrolled, optional
        How the gradient passes through the recovery; default `ImplicitAdjoint()`.

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
    adjoint = adjoint or ImplicitAdjoint()
    if not isinstance(adjoint, Adjoint):
        raise InputError(
            f"adjoint must be an ImplicitAdjoint, JacobianFree or Unrolled, but is {checks.describe(adjoint)}."
        )
    mu_b = resolve_mu(mu, lam, sigma, like=y)
    x0 = initial_point(y, A, reg)
    sol = pgd(y, A, reg, mu_b, options, x0)
    loss = dot(sol.x - x_true, sol.x - x_true)
    if isinstance(adjoint, Unrolled):
        with attach_partial_result(lambda: sol):
            theta, log_mu = unrolled_gradients(x_true, y, A, reg, mu_b, x0, sol.tau, adjoint.steps)
        return Hypergradient(theta, log_mu, loss, sol, None)
    with attach_partial_result(lambda: sol):
        lin = reg.linearize(sol.x)
        gamma = solve_adjoint(lin, A, mu_b, x_true - sol.x, adjoint, curvature=1.0 + reg.alpha)
        theta, log_mu = parameter_gradients(lin, mu_b, gamma.x)
    return Hypergradient(theta, log_mu, loss, sol, gamma)


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
    steps of size `tau/2` from `x0`. `weights` is `w` `[B]`, 1 by default. This is the reference for the implicit
    gradient. Memory grows with the number of steps."""
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
