"""Methods for the gradient through a recovery, as small objects whose fields are their options (docs/math.md, M7)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from .. import checks
from ..backend import Linearization
from ..batched.graphs import Reuse, records, reuse_of
from ..batched.linalg import expand, norm
from ..errors import InputError
from ..operators.base import LinearOperator
from ..solvers import CGOptions, LinearSolution, MinresOptions, cg, minres
from ..status import Status

METHODS = ("cg", "minres", "jfb", "unrolled")
"""The names of the methods in settings files and on the command line."""


@dataclass(frozen=True)
class ImplicitAdjoint:
    """Implicit differentiation: `H gamma = x - xhat` with `H = A^T A + mu hess r(xhat)` by a Krylov method.

    Parameters
    ----------
    solver : CGOptions or MinresOptions
        Preconditioned CG, or preconditioned MINRES for an indefinite H (beta > 1 + alpha). float32 reaches a tolerance
        of 1e-4 for mu down to about 1e-3; use float64 for less. If CG finds negative curvature, its truncated iterate
        is used (Steihaug 1983).
    bound : float
        `||gamma|| <= bound ||x - xhat|| / mu`; longer solutions (H nearly singular) are scaled to this norm.

    Raises
    ------
    InputError
        If an option is invalid.

    Examples
    --------
    >>> import deepreg_fast as dr
    >>> dr.ImplicitAdjoint(dr.MinresOptions(tolerance=1e-3)).bound
    10.0
    """

    solver: CGOptions | MinresOptions = CGOptions(100, 1e-4)
    bound: float = 10.0

    def __post_init__(self) -> None:
        if not isinstance(self.solver, (CGOptions, MinresOptions)):
            raise InputError(f"solver must be CGOptions or MinresOptions, but is {checks.describe(self.solver)}.")
        checks.plain_fields(self)
        checks.number(self.bound, "bound", 0.0, open_low=True)


@dataclass(frozen=True)
class JacobianFree:
    """Jacobian-free backpropagation (Fung et al. 2022): `gamma = (A^T A + mu (1+alpha) I)^{-1} (x - xhat)`.

    This is the preconditioner of the implicit gradient alone, without a Hessian product.

    Parameters
    ----------
    bound : float
        As in `ImplicitAdjoint`.

    Raises
    ------
    InputError
        If the bound is invalid.

    Examples
    --------
    >>> import deepreg_fast as dr
    >>> dr.JacobianFree().bound
    10.0
    """

    bound: float = 10.0

    def __post_init__(self) -> None:
        checks.plain_fields(self)
        checks.number(self.bound, "bound", 0.0, open_low=True)


@dataclass(frozen=True)
class Unrolled:
    """Backpropagation through the last plain steps of the recovery: the reference for the implicit gradient.

    Parameters
    ----------
    steps : int
        Number of PGD steps that are differentiated; memory grows with it.

    Raises
    ------
    InputError
        If the number is invalid.

    Examples
    --------
    >>> import deepreg_fast as dr
    >>> dr.Unrolled(50).steps
    50
    """

    steps: int = 100

    def __post_init__(self) -> None:
        checks.plain_fields(self)
        checks.integer(self.steps, "steps", 1)


Adjoint = ImplicitAdjoint | JacobianFree | Unrolled


def adjoint_named(method: str, max_iterations: int = 100, tolerance: float = 1e-4, steps: int = 100) -> Adjoint:
    """The method that settings name: "cg", "minres", "jfb" or "unrolled".

    Raises
    ------
    InputError
        If the name or an option is invalid.
    """
    checks.choice(method, "method", METHODS)
    if method == "jfb":
        return JacobianFree()
    if method == "unrolled":
        return Unrolled(steps)
    return ImplicitAdjoint((CGOptions if method == "cg" else MinresOptions)(max_iterations, tolerance))


def solve_adjoint(  # noqa: PLR0913 - the system is five things
    lin: Linearization,
    A: LinearOperator,
    mu: torch.Tensor,
    b: torch.Tensor,
    adjoint: ImplicitAdjoint | JacobianFree,
    gamma0: torch.Tensor | None = None,
    curvature: float = 1.0,
) -> LinearSolution:
    """Solve `(A^T A + mu hess r) gamma = b` for each image, preconditioned by `(A^T A + mu c I)^{-1}`.

    A gamma longer than `adjoint.bound ||b|| / mu` is shortened. If it had converged, its status becomes STAGNATED.
    """
    system = _System(lin, A, mu, curvature)
    if isinstance(adjoint, JacobianFree):
        sol = _precondition_only(system, b)
    else:
        sol = _solve(system, b, adjoint.solver, gamma0)
    length = norm(sol.x)
    max_norm = adjoint.bound * norm(b) / mu.double()
    factor = torch.where(length > max_norm, max_norm / length.clamp_min(1e-300), 1.0)
    sol.x = torch.where(expand(length > max_norm, sol.x), expand(factor, sol.x) * sol.x, sol.x)
    shortened = (length > max_norm) & (sol.status == int(Status.CONVERGED))
    sol.status = torch.where(shortened, int(Status.STAGNATED), sol.status)
    return sol


def _precondition_only(system: _System, b: torch.Tensor) -> LinearSolution:
    x = system.precondition(b) if system.A.preconditioned else b / expand(system.mu * system.curvature, b)
    zero = torch.zeros(len(b), dtype=torch.int64, device=b.device)
    residual = norm(b - system.matvec(x)) / norm(b).clamp_min(1e-300)
    return LinearSolution(x, torch.full_like(zero, int(Status.MAX_ITERATIONS)), zero, residual)


def _solve(
    system: _System, b: torch.Tensor, solver: CGOptions | MinresOptions, gamma0: torch.Tensor | None
) -> LinearSolution:
    capturable = records(b) and system.A.capturable(b) and getattr(system.lin, "capturable", False)
    rest = {
        "x0": gamma0,
        "preconditioner": system.precondition if system.A.preconditioned else None,
        "capturable": capturable,
        "reuse": system.reuse(b) if capturable else None,
    }
    if isinstance(solver, MinresOptions):
        return minres(system.matvec, b, solver, **rest)  # type: ignore[arg-type]
    return cg(system.matvec, b, replace(solver, truncated_fallback=True), **rest)  # type: ignore[arg-type]


class _System:
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
