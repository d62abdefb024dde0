"""Recovery as a differentiable function of the measurements, the parameters and the weight (docs/math.md, M7)."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from .. import checks
from ..ambient import full_precision, outside_inference
from ..batched.linalg import dot, expand
from ..errors import InputError
from ..operators.base import LinearOperator
from ..regularizers.base import Regularizer, as_regularizer
from ..solvers import PGDOptions, Solution
from ..status import Status
from .adjoint import ImplicitAdjoint, JacobianFree, solve_adjoint
from .data_term import resolve_mu
from .recovery import recover as solve


@full_precision
def recover(  # noqa: PLR0913 - the problem, then what is optional
    y: torch.Tensor,
    A: LinearOperator,
    reg: nn.Module,
    mu: float | torch.Tensor,
    *,
    options: PGDOptions | None = None,
    adjoint: ImplicitAdjoint | JacobianFree | None = None,
    x0: torch.Tensor | None = None,
    return_solution: bool = False,
) -> Any:
    """`xhat_b = argmin_x 1/2 ||y_b - A x||^2 + mu_b r(x)`, differentiable in y, the parameters of r, and mu.

    The backward pass solves one linear system, `H gamma = v` with `H = A^T A + mu hess r(xhat)` for the incoming
    gradient v: `dL/dy = A gamma`, `dL/dtheta = -mu d/dtheta <grad r(xhat), gamma>`, `dL/dmu = -<grad r(xhat), gamma>`
    (docs/math.md, M7). Memory does not grow with the iterations of the recovery. There are no second derivatives.

    Parameters
    ----------
    y : Tensor `[B, *A.measurement_shape]`
        Measurements made by `A`.
    A : LinearOperator
    reg : Regularizer, or an nn.Module that maps images to one energy each
    mu : float or Tensor `[B]` or 0-d, > 0
        Weight of the regularizer.
    options : PGDOptions, optional
        Of the recovery; default: tolerance 1e-6, Anderson acceleration.
    adjoint : ImplicitAdjoint or JacobianFree, optional
        How the gradient passes through the recovery; default `ImplicitAdjoint()`.
    x0 : Tensor `[B, C, H, W]`, optional
        Initial guess. The result does not depend on it if r is convex.
    return_solution : bool
        Whether to return the `Solution`, with the status of each image, as well.

    Returns
    -------
    Tensor `[B, C, H, W]`, or this and a Solution

    Raises
    ------
    InputError
        If a shape, dtype or value is invalid.

    Warns
    -----
    UserWarning
        If the recovery or the linear solve of an image fails. Its gradients are zero, and the other images keep theirs.

    Examples
    --------
    >>> import torch, deepreg_fast as dr
    >>> A, x = dr.SRM((1, 8, 8), ratio=0.5), torch.rand(2, 1, 8, 8)
    >>> reg = dr.Ridge(filters=2, kernel_size=3)
    >>> log_mu = torch.tensor(-3.0, requires_grad=True)
    >>> loss = (dr.ops.recover(A.A(x), A, reg, log_mu.exp()) - x).square().mean()
    >>> loss.backward()
    >>> bool(log_mu.grad != 0)
    True
    """
    regularizer = as_regularizer(reg)
    options = options or PGDOptions(max_iterations=1000, tolerance=1e-6, acceleration="anderson")
    adjoint = adjoint or ImplicitAdjoint()
    if not isinstance(adjoint, (ImplicitAdjoint, JacobianFree)):
        raise InputError(f"adjoint must be an ImplicitAdjoint or JacobianFree here, but is {checks.describe(adjoint)}.")
    if not isinstance(A, LinearOperator):
        raise InputError(f"A must be a deepreg_fast operator such as SRM or Blur, but is {type(A).__name__}.")
    y = checks.measured(y, A.measurement_shape)
    weight = resolve_mu(mu.detach() if isinstance(mu, torch.Tensor) else mu, like=y)
    if isinstance(mu, torch.Tensor):
        weight = mu.to(dtype=y.dtype, device=y.device).expand(len(y))
    named = [(n, p) for n, p in regularizer.named_parameters() if p.requires_grad]
    problem = _Problem(A, regularizer, options, adjoint, x0, [n for n, _ in named])
    x = _Recover.apply(problem, y, weight, *[p for _, p in named])
    assert problem.solution is not None
    return (x, problem.solution) if return_solution else x


class _Problem:
    """What `_Recover` needs besides tensors, and the solution of its forward pass."""

    def __init__(
        self,
        A: LinearOperator,
        reg: Regularizer,
        options: PGDOptions,
        adjoint: ImplicitAdjoint | JacobianFree,
        x0: torch.Tensor | None,
        names: list[str],
    ) -> None:
        self.A, self.reg, self.options, self.adjoint, self.x0, self.names = A, reg, options, adjoint, x0, names
        self.solution: Solution | None = None


class _Recover(torch.autograd.Function):
    """`(y, mu, theta) -> xhat`, by the implicit function theorem."""

    @staticmethod
    @outside_inference
    def forward(ctx: Any, problem: _Problem, y: torch.Tensor, mu: torch.Tensor, *theta: torch.Tensor) -> torch.Tensor:
        sol = solve(y, problem.A, problem.reg, mu.detach(), options=problem.options, x0=problem.x0)
        problem.solution = sol
        failed = sol.status == int(Status.NON_FINITE)
        _warn(failed, "recovery", "its image is the last finite iterate, and its gradients are zero")
        # theta is saved, too, so that autograd notices if it changes before the backward pass.
        ctx.save_for_backward(sol.x, mu.detach(), failed, *theta)
        ctx.problem = problem
        return sol.x.clone()

    @staticmethod
    @once_differentiable
    @outside_inference
    @full_precision
    def backward(ctx: Any, v: torch.Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        x, mu, failed, *_ = ctx.saved_tensors
        p: _Problem = ctx.problem
        v = torch.where(expand(failed, v), 0.0, v)
        lin = p.reg.linearize(x)
        gamma = solve_adjoint(lin, p.A, mu, v, p.adjoint, None, 1.0 + p.reg.alpha).x
        non_finite = ~torch.isfinite(gamma).flatten(1).all(1)
        _warn(non_finite, "linear solve", "its gradients are zero")
        gamma = torch.where(expand(non_finite, gamma), 0.0, gamma)
        needs_y, needs_mu, *needs_theta = ctx.needs_input_grad[1:]
        by_y = p.A.A(gamma) if needs_y else None
        by_mu = (-dot(lin.grad, gamma)).to(mu.dtype) if needs_mu else None
        by_theta: list[torch.Tensor | None] = [None] * len(p.names)
        if any(needs_theta):
            products = lin.param_vjp(-expand(mu, gamma) * gamma)
            by_theta = [products[name] for name in p.names]
        return (None, by_y, by_mu, *by_theta)


def _warn(failed: torch.Tensor, what: str, consequence: str) -> None:
    count = int(failed.sum())
    if count:
        warnings.warn(
            f"The {what} of {count} of {len(failed)} images failed (NON_FINITE): {consequence}.", stacklevel=3
        )


__all__ = ["recover"]
