"""Peer deepinv (0.5): its CG, MINRES and PGD on our problem, with the energy in the best eager formulation."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any, cast

import torch

from ..operators import SRM
from ..regularizers import RED
from .peers import BestTorch, Images

STEPS = 500
"""Iteration limit of each solver; it is not reached for the default problem."""


def unsupported_reason() -> str | None:
    """None, or why deepinv is missing and how to get it."""
    if importlib.util.find_spec("deepinv") is None:
        return "pip install 'deepreg-fast[bench]'; deepinv needs the release of torchvision that belongs to your torch"
    try:
        importlib.import_module("deepinv.optim")
    except Exception as error:  # a torchvision for another torch fails in many ways
        lines = str(error).splitlines() or [""]
        return f"cannot be imported ({lines[0][:80]}); install the release of torchvision that belongs to your torch"
    return None


def physics(A: SRM, center: float) -> Any:
    """Our operator as a deepinv `LinearPhysics`; its products run in torch under the reference backend.

    It includes what a careful user would add: `A^T A` and the proximal map in closed form instead of deepinv's inner
    CG, and an `A_dagger` about the regularizer's center, so that all solvers start at the same point.
    """
    base = cast(Any, importlib.import_module("deepinv.physics")).LinearPhysics

    class Wrapped(base):  # type: ignore[misc, valid-type]
        def __init__(self) -> None:
            super().__init__()
            self.srm = A

        def A(self, x: Images, **_: Any) -> torch.Tensor:
            return self.srm.A(x)

        def A_adjoint(self, y: torch.Tensor, **_: Any) -> Images:
            return self.srm.A_adjoint(y)

        def A_adjoint_A(self, x: Images, **_: Any) -> Images:
            return self.srm.normal(x)

        def prox_l2(self, z: Images, y: torch.Tensor, gamma: float, **_: Any) -> Images:
            return self.srm.prox_l2(z, y, float(gamma))

        def A_dagger(self, y: torch.Tensor, **_: Any) -> Images:
            c = y.new_full((len(y), *self.srm.image_shape), center)
            return c + self.srm.A_dagger(y - self.srm.A(c))

    return Wrapped()


class EnergyPrior(torch.nn.Module):
    """Our energy as a prior of deepinv and LearnedRegularizers, with their interface `g`, `grad`, `fn`."""

    explicit_prior = True

    def __init__(self, reg: RED) -> None:
        super().__init__()
        self.best = BestTorch(reg)

    def g(self, x: Images) -> torch.Tensor:
        """`r(x_b)`, `[B]`."""
        return self.best.energy(x)

    def fn(self, x: Images, *_: Any) -> torch.Tensor:
        """`r(x_b)` under deepinv's name."""
        return self.best.energy(x)

    def forward(self, x: Images, *_: Any) -> torch.Tensor:
        """`r(x_b)`."""
        return self.best.energy(x)

    def grad(self, x: Images, *_: Any, get_energy: bool = False) -> Any:
        """`grad r(x)`, or `(r(x_b), grad r(x))` with `get_energy`. With a graph only if x requires gradients, as for a
        Hessian product."""
        graph = x.requires_grad
        with torch.enable_grad():
            point = x if graph else x.detach().requires_grad_()
            energy = self.best.energy(point)
            grad = torch.autograd.grad(energy.sum(), point, create_graph=graph)[0]
        return (energy.detach(), grad) if get_energy else grad


class DeepinvSystem:
    """`(A^T A + mu hess r(x)) gamma = b` by `deepinv.optim.linear`, with Hessian products from one reused graph."""

    def __init__(self, reg: RED, A: SRM, mu: float, x: Images) -> None:
        self.linear = cast(Any, importlib.import_module("deepinv.optim.linear"))
        self.A, self.mu, self.curvature = A, mu, mu * (1.0 + reg.alpha)
        self.hvp = BestTorch(reg).products(x)[0]

    def _product(self, v: Images) -> Images:
        return self.A.normal(v) + self.mu * self.hvp(v)

    def cg(self, b: Images, tolerance: float) -> Images:
        """`conjugate_gradient` without preconditioner. It stops when the recurrences of all images have converged."""
        return self.linear.conjugate_gradient(self._product, b, max_iter=STEPS, tol=tolerance)

    def minres(self, b: Images, tolerance: float) -> Images:
        """`minres` with our preconditioner. It stops when no image moves by more than the tolerance."""

        def precondition(v: Images) -> Images:
            return self.A.shifted_inverse(v, self.curvature)

        return self.linear.minres(self._product, b, max_iter=STEPS, tol=tolerance, precon=precondition)


class DeepinvPGD:
    """`deepinv.optim.PGD(g_first=True)` with backtracking: gradient step of the prior, then data proximal map."""

    def __init__(self, reg: RED, A: SRM, mu: float) -> None:
        self.optim = cast(Any, importlib.import_module("deepinv.optim"))
        self.prior, self.physics, self.mu = EnergyPrior(reg), physics(A, reg.center), mu
        self.fidelity = self.optim.L2()

    def solve(self, y: torch.Tensor, tolerance: float) -> Images:
        """Solve from our initial point with our first step size (`stepsize mu = 1`) and deepinv's default backtracking.

        A new object is created each time, because an object that has run continues with its last step size.
        """
        optimizer = self.optim.PGD(
            data_fidelity=self.fidelity,
            prior=self.prior,
            lambda_reg=self.mu,
            stepsize=1.0 / self.mu,
            max_iter=STEPS,
            early_stop=True,
            thres_conv=tolerance,
            backtracking=self.optim.BacktrackingConfig(),
            g_first=True,
        )
        return optimizer(y, self.physics, init=self.physics.A_dagger(y))
