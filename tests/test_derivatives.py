"""Every derivative against central differences in float64 (relative error at most 1e-6)."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import deepreg_fast as dr
from deepreg_fast.inverse.adjoint import adjoint_named
from deepreg_fast.regularizers import Scaled

from .helpers import central, grad_s, images, moved, normal, random_red, relative


class Quartic(torch.nn.Module):
    """An energy of a user's: a weighted quartic."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([0.7], dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.weight * x.diff(dim=-1) ** 4 + 0.1 * x[..., 1:] ** 2).flatten(1).sum(1)


def _icnn() -> dr.ICNN:
    return dr.ICNN(channels=3, depth=3, gain=2.0).double()


CASES = {
    **{
        f"{h}-{n}": (lambda h=h, n=n: random_red(head=h, norm=n))
        for h in ("red", "residual", "norm")
        for n in ("none", "pixel", "image")
    },
    **{f"after-{n}": (lambda n=n: random_red(norm=n, norm_place="after")) for n in ("pixel", "image")},
    "alpha": lambda: random_red(alpha=0.3),
    "deep": lambda: random_red(depth=5, kernel_size=5),
    "icnn": _icnn,
    "ridge": lambda: dr.Ridge(3, 5, 1).double(),
    "ridge-weak": lambda: dr.Ridge(3, 3, 2, convex=False).double(),
    "tv": lambda: dr.TV(0.1),
    "user-r": lambda: dr.EnergyRegularizer(Quartic()),
    "scaled": lambda: Scaled(random_red(alpha=0.2), 1.7),
    "scaled-tv": lambda: Scaled(dr.TV(0.1), 0.6),
    "user-s": lambda: dr.EnergyRegularizer(Quartic(), models="s", alpha=0.2),
}


@pytest.fixture(params=list(CASES), name="reg")
def _reg(request: pytest.FixtureRequest) -> dr.Regularizer:
    return CASES[request.param]()


def test_gradient(reg: dr.Regularizer) -> None:
    x, v = images(2, 1, 7, 6), normal(2, 1, 7, 6)
    value, grad = reg.value_and_grad(x)
    with torch.no_grad():
        assert torch.equal(value, reg.energy(x))
        slope = central(lambda t: reg.energy(x + t * v))
    assert relative((grad * v).flatten(1).sum(1), slope) <= 1e-6


def test_hessian_product(reg: dr.Regularizer) -> None:
    x, v = images(2, 1, 7, 6), normal(2, 1, 7, 6)
    hv = reg.linearize(x).hvp(v)
    assert relative(hv, central(lambda t: reg.value_and_grad(x + t * v)[1])) <= 1e-6


def test_parameter_product(reg: dr.Regularizer) -> None:
    if not list(reg.parameters()):
        assert reg.linearize(images(1, 1, 7, 6)).param_vjp(normal(1, 1, 7, 6)) == {}
        return
    x, v = images(2, 1, 7, 6), normal(2, 1, 7, 6)
    product = reg.linearize(x).param_vjp(v)
    direction = {k: normal(*p.shape, seed=i) for i, (k, p) in enumerate(reg.named_parameters())}
    assert set(product) == set(direction)
    found = sum((product[k] * direction[k]).sum() for k in product)
    wanted = central(lambda t: moved(reg, direction, t, lambda: (reg.value_and_grad(x)[1] * v).sum()))
    assert relative(torch.as_tensor(found), wanted) <= 1e-6


@settings(max_examples=15)
@given(seed=st.integers(0, 1000), norm=st.sampled_from(["none", "pixel", "image"]), n=st.integers(3, 9))
def test_hessian_is_symmetric(seed: int, norm: str, n: int) -> None:
    reg = random_red(seed, norm=norm)
    lin = reg.linearize(images(2, 1, n, n + 1, seed=seed))
    v, w = normal(2, 1, n, n + 1, seed=seed + 1), normal(2, 1, n, n + 1, seed=seed + 2)
    a, b = (lin.hvp(v) * w).sum(), (lin.hvp(w) * v).sum()
    assert abs(float(a - b)) <= 1e-12 * float(lin.hvp(v).norm() * w.norm())


def _hypergradient(
    reg: dr.RED, A: dr.SRM, x: torch.Tensor, mu: float, method: str = "cg", steps: int = 100
) -> dr.Hypergradient:
    options = dr.PGDOptions(2000, 1e-12, acceleration="anderson")
    chosen = adjoint_named(method, 1000, 1e-12, steps)
    return dr.hypergradient(x, A.A(x), A, reg, mu, options=options, adjoint=chosen)


@pytest.mark.parametrize("norm", ["none", "pixel", "image"])
@pytest.mark.parametrize("head", ["red", "residual"])
def test_hypergradient(norm: str, head: str) -> None:
    # Weights small enough that the problem is strongly convex: LayerNorm of a nearly flat image is steep.
    scale = {"none": 0.08, "pixel": 0.02, "image": 0.05}[norm]
    reg, A = random_red(norm=norm, head=head, scale=scale, alpha=1.0), dr.SRM((1, 6, 7), 0.4)
    x, mu = images(2, 1, 6, 7), 0.1
    hg = _hypergradient(reg, A, x, mu)
    assert hg.adjoint is not None and hg.adjoint.status.eq(0).all() and hg.solution.status.eq(0).all()
    direction = {k: normal(*p.shape, seed=i) for i, (k, p) in enumerate(reg.named_parameters())}

    def loss(m: float) -> torch.Tensor:
        options = dr.PGDOptions(2000, 1e-12, acceleration="anderson")
        near = hg.solution.x
        return (dr.recover(A.A(x), A, reg, m, options=options, x0=near).x - x).square().sum()

    found = torch.as_tensor(sum((hg.theta[k] * direction[k]).sum() for k in direction))
    wanted = central(lambda t: moved(reg, direction, t, lambda: loss(mu)), 2e-4)
    assert relative(found, wanted) <= 1e-6
    assert (
        relative(hg.log_mu, central(lambda t: loss(mu * float(torch.exp(torch.tensor(t, dtype=torch.float64))))))
        <= 1e-6
    )


def test_implicit_against_unrolled_and_minres() -> None:
    reg, A, x = random_red(scale=0.08), dr.SRM((1, 6, 7), 0.4), images(2, 1, 6, 7)
    implicit = _hypergradient(reg, A, x, 0.1)
    for other in (
        _hypergradient(reg, A, x, 0.1, method="unrolled", steps=400),
        _hypergradient(reg, A, x, 0.1, method="minres"),
    ):
        for k, g in implicit.theta.items():
            assert relative(other.theta[k], g) <= 1e-5
        assert relative(other.log_mu, implicit.log_mu) <= 1e-5


def test_jacobian_free_points_the_same_way() -> None:
    reg, A, x = random_red(scale=0.05), dr.SRM((1, 6, 7), 0.4), images(2, 1, 6, 7)
    exact, cheap = _hypergradient(reg, A, x, 0.1), _hypergradient(reg, A, x, 0.1, method="jfb")
    a, b = (torch.cat([g.flatten() for g in h.theta.values()]) for h in (exact, cheap))
    assert float((a @ b) / (a.norm() * b.norm())) > 0.9


@pytest.mark.parametrize("norm", ["none", "pixel"])
def test_penalty_derivatives(norm: str) -> None:
    reg = random_red(norm=norm, alpha=0.2)
    x, delta, move = images(2, 1, 6, 6), 0.1 * normal(2, 1, 6, 6), normal(2, 1, 6, 6, seed=5)
    point = dr.beta_hat(reg, x, delta)
    by_hand = (grad_s(reg, x) - grad_s(reg, x + delta)).flatten(1).norm(dim=1) / delta.flatten(1).norm(dim=1)
    assert relative(point.beta, by_hand) <= 1e-12
    slope = central(lambda t: dr.beta_hat(reg, x, delta + t * move).beta, 1e-4)
    assert relative((point.grad_delta() * move).flatten(1).sum(1), slope) <= 1e-6
    weights = torch.tensor([1.0, 0.5], dtype=torch.float64)
    direction = {k: normal(*p.shape, seed=i) for i, (k, p) in enumerate(reg.named_parameters())}
    product = point.grad_theta(weights)
    found = torch.as_tensor(sum((product[k] * direction[k]).sum() for k in product))
    wanted = central(lambda t: moved(reg, direction, t, lambda: (weights * dr.beta_hat(reg, x, delta).beta).sum()))
    assert relative(found, wanted) <= 1e-6
