"""The kernels inside users' torch code: autograd, torch.func and torch.compile follow them and agree with torch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import astuple
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad, gradcheck, gradgradcheck

import deepreg_fast as dr
from deepreg_fast.autograd import conv_chain as chain
from deepreg_fast.autograd import srm
from deepreg_fast.functional.conv_chain import conv_chain

from .helpers import images, normal, random_red, relative

OPS = torch.ops.deepreg_fast
CPU = pytest.mark.skipif(dr.backends()["cpu"] is not None, reason=f"no C++ extension: {dr.backends()['cpu']}")
EPS = 2.0**-23
SHAPE = (2, 1, 5, 4)
Loss = Callable[[dr.SRM, dr.RED, torch.Tensor, torch.Tensor], torch.Tensor]


def _srm(transform: str = "dct", randomizer: str = "both") -> dr.SRM:
    return dr.SRM((1, 12, 20), 0.4, transform=transform, randomizer=randomizer)


def _small(**options: Any) -> dr.RED:
    return random_red(channels=2, depth=2, alpha=0.1, head="residual", **options)


def _arguments(reg: dr.RED) -> tuple[list[torch.Tensor], tuple[Any, ...]]:
    form = reg.kernel_form()
    assert form is not None
    return [p.detach().clone().requires_grad_() for p in form.parameters()], astuple(form.spec)


def _close(ours: Any, theirs: Any, exact: Any) -> None:
    """At most twice torch's own float32 error, or a few roundings of the largest entry where that is smaller."""
    for a, b, c in zip(ours, theirs, exact, strict=True):
        assert a.shape == c.shape and a.dtype == torch.float32
        assert relative(a.double(), c) <= max(2 * relative(b.double(), c), 8 * EPS)


# ---- torch's own checks of an operation


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck_of_the_srm(dtype: torch.dtype) -> None:
    A = dr.SRM((1, 4, 6), 0.5, randomizer="both")
    x, y = (normal(2, *s).to(dtype).requires_grad_() for s in ((1, 4, 6), (A.measurements,)))
    for which, t in (("forward", x), ("adjoint", y), ("normal", x)):
        torch.library.opcheck(OPS.srm.default, (t, which, *srm._description(A)))
    weight = torch.rand(2, dtype=dtype, requires_grad=True)
    torch.library.opcheck(OPS.srm_correct.default, (x, y, weight, *srm._description(A)))


@pytest.mark.parametrize(
    ("norm", "dtype"),
    [
        ("none", torch.float32),
        ("image", torch.float32),
        ("image", torch.float64),
        pytest.param("none", torch.float64, marks=pytest.mark.long),
    ],
)
def test_opcheck_of_the_chain(norm: str, dtype: torch.dtype) -> None:
    params, tail = _arguments(_small(norm=norm).to(dtype))
    x, v = (normal(*SHAPE, seed=s).to(dtype).requires_grad_() for s in range(2))
    fixed, frozen = x.detach().clone(), [p.detach().clone() for p in params]
    torch.library.opcheck(OPS.chain_value_grad.default, (x, params, *tail))
    torch.library.opcheck(OPS.chain_vjp.default, (fixed, v, frozen, True, True, *tail))
    torch.library.opcheck(OPS.chain_tangent.default, (fixed, frozen, params, *tail))


@pytest.mark.parametrize("which", ["forward", "adjoint", "normal"])
@pytest.mark.parametrize("transform", ["dct", "walsh"])
def test_gradcheck_of_the_products(which: str, transform: str) -> None:
    A = dr.SRM((1, 4, 6), 0.5, transform=transform, randomizer="both")
    t = normal(2, A.measurements) if which == "adjoint" else normal(2, 1, 4, 6)
    inputs = (t.requires_grad_(),)

    def f(t: torch.Tensor) -> torch.Tensor:
        return srm.product(which, A, t)

    assert gradcheck(f, inputs, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(f, inputs, check_fwd_over_rev=True, check_batched_grad=True)


def test_gradcheck_of_the_correction() -> None:
    A = dr.SRM((1, 4, 6), 0.5, randomizer="sign")
    inputs = tuple(normal(*s).requires_grad_() for s in ((2, 1, 4, 6), (2, A.measurements), (2,)))

    def f(x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return srm.correct(A, x, y, weight)

    assert gradcheck(f, inputs, check_forward_ad=True)
    assert gradgradcheck(f, inputs, check_fwd_over_rev=True)


@pytest.mark.parametrize("norm", ["none", "pixel", "image"])
def test_gradcheck_of_the_chain(norm: str) -> None:
    params, tail = _arguments(_small(norm=norm))
    x, v = (normal(*SHAPE, seed=s).requires_grad_() for s in range(2))
    fixed, frozen = x.detach().clone(), [p.detach().clone() for p in params]

    def both(x: torch.Tensor, *p: torch.Tensor) -> Any:
        return OPS.chain_value_grad(x, p, *tail)

    def energy(x: torch.Tensor, *p: torch.Tensor) -> Any:
        return OPS.chain_value_grad(x, p, *tail)[0]

    def products_of(v: torch.Tensor) -> Any:
        return tuple(OPS.chain_vjp(fixed, v, frozen, True, True, *tail))

    def tangent(*t: torch.Tensor) -> Any:
        return OPS.chain_tangent(fixed, frozen, t, *tail)

    assert gradcheck(both, (x, *params), check_forward_ad=True, fast_mode=True)
    assert gradgradcheck(energy, (x, *params), check_fwd_over_rev=True, fast_mode=True)
    for f, inputs in ((products_of, (v,)), (tangent, params)):
        assert gradcheck(f, inputs, check_forward_ad=True, fast_mode=True)
        assert gradgradcheck(f, inputs, check_fwd_over_rev=True, fast_mode=True)


# ---- the SRM through its kernels


@CPU
@pytest.mark.parametrize("transform", ["dct", "hadamard", "walsh"])
@pytest.mark.parametrize("randomizer", ["sign", "permutation", "both"])
def test_the_products_are_the_kernels_and_so_are_their_derivatives(transform: str, randomizer: str) -> None:
    A = _srm(transform, randomizer)
    x, y = normal(3, 1, 12, 20).float().requires_grad_(), normal(3, A.measurements).float()
    out = A.A(x)
    assert "LinearProduct" in type(out.grad_fn).__name__ and torch.equal(out, A.A(x.detach()))
    assert torch.equal(torch.autograd.grad(out, x, y)[0], A.A_adjoint(y))
    z = normal(3, 1, 12, 20, seed=2).float()
    assert torch.equal(torch.autograd.grad(A.normal(x), x, z)[0], A.normal(z))
    y.requires_grad_()
    assert torch.equal(torch.autograd.grad(A.A_adjoint(y), y, z)[0], A.A(z))
    # Twice: linear maps, so the second derivative of <A x, A x> is A^T A.
    (g,) = torch.autograd.grad(A.A(x).square().sum(), x, create_graph=True)
    torch.testing.assert_close(torch.autograd.grad(g, x, z)[0], 2 * A.normal(z))
    assert A.A(x.double()).dtype == torch.float64
    with dr.use_backend("reference"):
        assert "LinearProduct" not in type(A.A(x).grad_fn).__name__


@CPU
@pytest.mark.parametrize("gamma", [0.7, torch.tensor(0.7), torch.tensor([0.5, 0.0, 30.0])])
def test_the_proximal_map_and_its_derivatives(gamma: float | torch.Tensor) -> None:
    A = _srm()
    x, y, c = normal(3, 1, 12, 20), normal(3, A.measurements), normal(3, 1, 12, 20, seed=3)

    def run(A: dr.SRM, dtype: torch.dtype) -> list[torch.Tensor]:
        inputs = [t.to(dtype).requires_grad_() for t in (x, y)]
        g = gamma
        if isinstance(gamma, torch.Tensor):
            inputs.append(g := gamma.to(dtype).requires_grad_())
        out = A.prox_l2(inputs[0], inputs[1], g)
        return [out.detach(), *torch.autograd.grad(out, inputs, c.to(dtype))]

    ours, exact = run(A, torch.float32), run(A, torch.float64)
    with dr.use_backend("reference"):
        theirs = run(A, torch.float32)
    _close(ours, theirs, exact)


@CPU
def test_torch_func_through_the_srm() -> None:
    A = _srm()
    x, v, y = normal(3, 1, 12, 20).float(), normal(3, 1, 12, 20, seed=1).float(), normal(3, A.measurements).float()

    def half(t: torch.Tensor) -> torch.Tensor:
        return 0.5 * (A.A(t) - y).square().sum()

    wanted = A.A_adjoint(A.A(x) - y)
    torch.testing.assert_close(torch.func.grad(half)(x), wanted)
    assert torch.equal(torch.func.vjp(A.A, x)[1](y)[0], A.A_adjoint(y))
    assert torch.equal(torch.func.jvp(A.A, (x,), (v,))[1], A.A(v))
    # Forward over reverse, reverse over forward, reverse over reverse.
    for product in (
        torch.func.jvp(torch.func.grad(half), (x,), (v,))[1],
        torch.func.grad(lambda t: torch.func.jvp(half, (t,), (v,))[1])(x),
        torch.func.grad(lambda t: (torch.func.grad(half)(t) * v).sum())(x),
    ):
        torch.testing.assert_close(product, A.normal(v))
    one = lambda t, s: A.prox_l2(t[None], s[None], 0.5)[0]  # noqa: E731
    assert torch.equal(torch.func.vmap(one)(x, y), A.prox_l2(x, y, 0.5))
    torch.testing.assert_close(torch.func.vmap(one, (0, None))(x, y[0]), A.prox_l2(x, y[:1].expand(3, -1), 0.5))
    matrix = torch.func.jacrev(lambda t: A.A(t[None])[0])(x[0]).flatten(1)
    torch.testing.assert_close(torch.func.jacfwd(lambda t: A.A(t[None])[0])(x[0]).flatten(1), matrix)
    torch.testing.assert_close(matrix @ x[0].flatten(), A.A(x[:1])[0])
    per_image = torch.func.vmap(torch.func.grad(lambda t, s: 0.5 * (A.A(t[None])[0] - s).square().sum()))
    torch.testing.assert_close(per_image(x, y), wanted)
    with forward_ad.dual_level():
        assert torch.equal(forward_ad.unpack_dual(A.A(forward_ad.make_dual(x, v))).tangent, A.A(v))
    with pytest.raises(dr.errors.InputError, match="one operator"):
        torch.func.vmap(lambda rows: OPS.srm(x, "forward", rows, *srm._description(A)[1:]))(A.rows[None])


def test_no_grad_inside_a_transform_is_kept() -> None:
    A, x = _srm(), normal(2, 1, 12, 20).float()

    def f(t: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            fixed = A.A(t)
        return (A.A(t) * fixed).sum()

    torch.testing.assert_close(torch.func.grad(f)(x), A.normal(x))
    nested = torch.func.grad(lambda t: torch.func.grad(f)(t).sum())(x)
    with dr.use_backend("reference"):
        torch.testing.assert_close(nested, torch.func.grad(lambda t: torch.func.grad(f)(t).sum())(x))


@CPU
def test_without_a_follower_nothing_stands_before_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    A, x = _srm(), normal(2, 1, 12, 20).float()
    y = A.A(x)

    def refuse(*args: Any) -> Any:
        raise AssertionError("not an operation of torch")

    for name in ("_product", "_correct"):
        monkeypatch.setattr(srm, name, refuse)
    x.requires_grad_()
    with torch.no_grad():
        assert torch.equal(A.A(x), y)
        assert A.A_adjoint(y).shape == A.normal(x).shape == A.prox_l2(x, y, 0.5).shape


def test_an_operator_that_takes_another_state_is_another_operator() -> None:
    A, B = dr.SRM((1, 12, 10), seed=7), dr.SRM((1, 12, 10), seed=8)
    x = normal(2, 1, 12, 10).float().requires_grad_()
    assert not torch.equal(A.A(x), B.A(x))
    B.load_state_dict(A.state_dict())
    assert torch.equal(A.A(x), B.A(x))
    for seed in range(2 * srm._MAX_FORMS):
        C = dr.SRM((1, 12, 10), seed=seed)
        assert torch.equal(C.A(x), C.A(x.detach()))
    assert len(srm._FORMS) <= srm._MAX_FORMS


# ---- the regularizer through its kernels


@CPU
@pytest.mark.parametrize("head", ["red", "residual", "norm"])
@pytest.mark.parametrize("norm", ["none", "pixel", "image"])
def test_first_and_second_derivatives(head: str, norm: str) -> None:
    """Of the energy and of the gradient, in x and in every parameter, against float64."""
    reg = random_red(3, 0.15, double=False, channels=16, head=head, norm=norm, alpha=0.2)
    x, v, w = images(4, 1, 24, 22), normal(4, 1, 24, 22), normal(4, seed=5)

    def by_ops(reg: dr.RED, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return dr.ops.value_and_grad(reg, x)

    def by_torch(reg: dr.RED, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        value = reg.energy(x)
        return value, torch.autograd.grad(value.sum(), x, create_graph=True)[0]

    def run(f: Any, reg: dr.RED, dtype: torch.dtype) -> list[torch.Tensor]:
        t = x.to(dtype).requires_grad_()
        value, grad = f(reg, t)
        wrt = [t, *reg.parameters()]
        of_value = torch.autograd.grad(value, wrt, w.to(dtype), retain_graph=True)
        of_grad = torch.autograd.grad(grad, wrt, v.to(dtype))
        # A parameter's error is that of all of them: a bias' derivative is a sum that nearly cancels.
        flat = [torch.cat([g.flatten() for g in gs[1:]]) for gs in (of_value, of_grad)]
        return [value.detach(), grad.detach(), of_value[0], of_grad[0], *flat]

    exact = run(by_torch, copy.deepcopy(reg).double(), torch.float64)
    _close(run(by_ops, reg, torch.float32), run(by_torch, reg, torch.float32), exact)
    for a, b in zip(run(by_ops, copy.deepcopy(reg).double(), torch.float64), exact, strict=True):
        torch.testing.assert_close(a, b)


@CPU
def test_the_gradient_is_the_kernels_bit_for_bit() -> None:
    reg = random_red(double=False, channels=16, norm="pixel")
    x, v = images(3, 1, 20, 20, dtype=torch.float32).requires_grad_(), normal(3, 1, 20, 20).float()
    value, grad = dr.ops.value_and_grad(reg, x)
    assert torch.equal(grad, reg.value_and_grad(x)[1]) and torch.equal(value, reg.value_and_grad(x)[0])
    assert torch.equal(dr.ops.energy(reg, x), value) and torch.equal(dr.ops.grad(reg, x), grad)
    lin = reg.linearize(x)
    found = torch.autograd.grad(grad, [x, *reg.parameters()], v, retain_graph=True)
    assert torch.equal(found[0], lin.hvp(v))
    for a, b in zip(found[1:], lin.param_vjp(v).values(), strict=True):
        assert torch.equal(a, b)
    # Kept with the graph: what is asked again gives the same bits, and an operation gives them too.
    assert torch.equal(torch.autograd.grad(grad, x, v, retain_graph=True)[0], found[0])
    assert torch.equal(torch.autograd.grad(grad, x, v, create_graph=True)[0], found[0])


@CPU
def test_one_linearization_serves_many_products(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, linearize = [], chain._linearize
    monkeypatch.setattr(chain, "_linearize", lambda *a: calls.append(1) or linearize(*a))
    reg = random_red(double=False, channels=16)
    x = images(2, 1, 12, 12, dtype=torch.float32).requires_grad_()
    grad = dr.ops.grad(reg, x)
    for seed in range(3):
        v = normal(2, 1, 12, 12, seed=seed).float()
        assert torch.equal(torch.autograd.grad(grad, x, v, retain_graph=True)[0], reg.linearize(x).hvp(v))
    assert len(calls) == 1


class _Gradient(nn.Module):
    def __init__(self, reg: nn.Module) -> None:
        super().__init__()
        self.reg = reg

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return dr.ops.grad(self.reg, x)


@CPU
@pytest.mark.parametrize("norm", ["none", "pixel"])
def test_torch_func_through_the_regularizer(norm: str) -> None:
    reg = random_red(double=False, channels=4, norm=norm)
    x, v = images(3, 1, 6, 5, dtype=torch.float32), normal(3, 1, 6, 5).float()
    lin = reg.linearize(x)

    def energy(t: torch.Tensor) -> torch.Tensor:
        return dr.ops.energy(reg, t).sum()

    def grad(t: torch.Tensor) -> torch.Tensor:
        return dr.ops.grad(reg, t)

    assert torch.equal(torch.func.grad(energy)(x), lin.grad)
    assert torch.equal(torch.func.vjp(grad, x)[1](v)[0], lin.hvp(v))
    assert torch.equal(torch.func.jvp(grad, (x,), (v,))[1], lin.hvp(v))
    torch.testing.assert_close(torch.func.jvp(energy, (x,), (v,))[1], (lin.grad * v).sum())
    for product in (
        torch.func.jvp(torch.func.grad(energy), (x,), (v,))[1],
        torch.func.grad(lambda t: torch.func.jvp(energy, (t,), (v,))[1])(x),
        torch.func.grad(lambda t: (torch.func.grad(energy)(t) * v).sum())(x),
        torch.func.grad(lambda t: (grad(t) * v).sum())(x),
    ):
        torch.testing.assert_close(product, lin.hvp(v))
    single = lambda t: dr.ops.energy(reg, t[None])[0]  # noqa: E731
    torch.testing.assert_close(torch.func.vmap(single)(x), lin.value)
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(single))(x), lin.grad)
    hessian = torch.func.hessian(single)(x[0]).reshape(30, 30)
    torch.testing.assert_close(torch.func.jacrev(lambda t: grad(t[None])[0])(x[0]).reshape(30, 30), hessian)
    torch.testing.assert_close(hessian @ v[0].flatten(), lin.hvp(v)[0].flatten(), rtol=1e-4, atol=1e-5)


@CPU
def test_torch_func_in_the_parameters() -> None:
    reg = random_red(double=False, channels=3, depth=2, norm="pixel")
    x, v = images(2, 1, 6, 5, dtype=torch.float32), normal(2, 1, 6, 5).float()
    module = _Gradient(reg)
    params = {k: p.detach() for k, p in module.named_parameters()}

    def f(params: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.func.functional_call(module, params, (x,))

    wanted = reg.linearize(x).param_vjp(v)
    found = torch.func.vjp(f, params)[1](v)[0]
    for k, g in wanted.items():
        assert torch.equal(found["reg." + k], g)
    # Forwards: the same number from the other side.
    tangents = {k: torch.full_like(p, 0.5) for k, p in params.items()}
    along = (torch.func.jvp(f, (params,), (tangents,))[1] * v).sum()
    torch.testing.assert_close(along, torch.stack([0.5 * g.sum() for g in wanted.values()]).sum(), rtol=1e-4, atol=1e-4)
    # An ensemble: vmap over the parameters, and the products of each cotangent alone.
    many = {k: torch.stack([p, 0.5 * p]) for k, p in params.items()}
    second = f({k: 0.5 * p for k, p in params.items()})
    torch.testing.assert_close(torch.func.vmap(f)(many), torch.stack([f(params), second]))
    each = torch.func.vmap(torch.func.vjp(f, params)[1])(torch.stack([v, 2 * v]))[0]
    for k, g in wanted.items():
        torch.testing.assert_close(each["reg." + k], torch.stack([g, 2 * g]))


def _training_loss(A: dr.SRM, gradient: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Two unrolled proximal steps."""
    z = A.A_adjoint(y)
    for _ in range(2):
        z = A.prox_l2(z - 0.1 * gradient(z), y, 2.0)
    return (z - x).square().sum()


@CPU
@pytest.mark.parametrize("norm", ["none", "pixel", "image"])
def test_a_training_step(norm: str) -> None:
    A = _srm()
    reg = random_red(double=False, channels=16, norm=norm)
    reg.net.convs[0].weight.requires_grad_(False)
    x = images(3, 1, 12, 20)

    def run(reg: dr.RED, by_ops: bool) -> list[torch.Tensor]:
        dtype = reg.net.convs[0].weight.dtype  # type: ignore[union-attr]
        t = x.to(dtype)  # type: ignore[arg-type]

        def by_torch(z: torch.Tensor) -> torch.Tensor:
            z = z if z.requires_grad else z.detach().requires_grad_()
            return torch.autograd.grad(reg.energy(z).sum(), z, create_graph=True)[0]

        reg.zero_grad()
        loss = _training_loss(A, (lambda z: dr.ops.grad(reg, z)) if by_ops else by_torch, t, A.A(t))
        loss.backward()
        assert reg.net.convs[0].weight.grad is None
        return [loss.detach(), torch.cat([p.grad.flatten() for p in reg.parameters() if p.grad is not None])]

    ours = run(reg, True)
    with dr.use_backend("reference"):
        theirs = run(reg, False)
    _close(ours, theirs, run(copy.deepcopy(reg).double(), False))


@CPU
def test_frozen_parameters_and_the_order_of_the_rest() -> None:
    reg = random_red(double=False, channels=3, norm="pixel")
    named = dict(reg.named_parameters())
    kept = ["net.norms.0.bias", "net.convs.1.weight", "net.convs.2.bias"]
    for k, p in named.items():
        p.requires_grad_(k in kept)
    x, v = images(2, 1, 6, 7, dtype=torch.float32), normal(2, 1, 6, 7).float()
    wanted = reg.linearize(x).param_vjp(v)
    assert set(wanted) == set(kept)
    (dr.ops.grad(reg, x) * v).sum().backward()
    for k, p in named.items():
        assert (p.grad is None) == (k not in kept)
        assert p.grad is None or torch.equal(p.grad, wanted[k])
    for p in named.values():
        p.requires_grad_(False)
    assert not dr.ops.grad(reg, x).requires_grad


@CPU
def test_after_an_optimizers_step_it_is_the_new_regularizer() -> None:
    reg = random_red(double=False, channels=3)
    x = images(2, 1, 6, 7, dtype=torch.float32)
    optimizer = torch.optim.SGD(reg.parameters(), 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        grad = dr.ops.grad(reg, x)
        assert torch.equal(grad, reg.value_and_grad(x)[1])
        grad.square().sum().backward()
        optimizer.step()


@CPU
def test_layouts() -> None:
    reg, A = random_red(double=False, channels=3), _srm()
    x = normal(3, 1, 20, 12).float().transpose(2, 3).requires_grad_()
    v = normal(3, 1, 1, 1).float().expand(3, 1, 12, 20)
    plain = x.detach().contiguous().requires_grad_()
    for f in (lambda t: dr.ops.grad(reg, t), A.normal, lambda t: A.prox_l2(t, A.A(t), 0.5)):
        assert torch.equal(f(x), f(plain))
        assert torch.equal(torch.autograd.grad(f(x), x, v)[0], torch.autograd.grad(f(plain), plain, v.contiguous())[0])
    assert dr.ops.grad(reg, x[:0]).shape == (0, 1, 12, 20) and A.A(x[:0]).shape == (0, A.measurements)
    (dr.ops.value_and_grad(reg, x[:0])[1].sum() + A.A(x[:0]).sum()).backward()
    assert not x.grad.any()  # type: ignore[union-attr]


# ---- what is not defined, and what has no kernels


@CPU
def test_a_third_derivative_is_a_sentence() -> None:
    reg = random_red(double=False, channels=3)
    x, v = images(2, 1, 6, 7, dtype=torch.float32).requires_grad_(), normal(2, 1, 6, 7).float().requires_grad_()
    (hv,) = torch.autograd.grad(dr.ops.grad(reg, x), x, v, create_graph=True)
    # In v it is defined: H is symmetric.
    assert torch.equal(torch.autograd.grad(hv, v, v, retain_graph=True)[0], hv)
    for wrt in (x, next(reg.parameters())):
        with pytest.raises(dr.errors.InputError, match=r"one more.*reg\.energy"):
            torch.autograd.grad(hv.sum(), wrt, retain_graph=True)
    with pytest.raises(dr.errors.InputError, match="one more"):
        torch.func.jvp(
            lambda t: torch.func.vjp(lambda s: dr.ops.grad(reg, s), t)[1](v)[0], (x.detach(),), (v.detach(),)
        )


class _Quartic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scale * x.pow(4).flatten(1).sum(1)


def test_energies_without_kernels_are_differentiated_by_torch() -> None:
    x = images(2, 1, 5, 6).requires_grad_()
    for reg in (dr.TV(0.1), dr.ICNN(channels=2).double(), random_red(kernel_size=5), random_red(image_channels=1)):
        value, grad = dr.ops.value_and_grad(reg, x)
        torch.testing.assert_close(value, reg.energy(x))
        torch.testing.assert_close(grad, reg.value_and_grad(x)[1])
        v = normal(2, 1, 5, 6)
        torch.testing.assert_close(torch.autograd.grad(grad, x, v)[0], reg.linearize(x).hvp(v))
    reg = _Quartic()
    (third,) = torch.autograd.grad(torch.autograd.grad(dr.ops.grad(reg, x).sum(), x, create_graph=True)[0].sum(), x)
    torch.testing.assert_close(third, 48 * x.detach())
    (by_scale,) = torch.autograd.grad(dr.ops.grad(reg, x).sum(), reg.scale)
    torch.testing.assert_close(by_scale, 4 * x.detach().pow(3).sum())
    with pytest.raises(dr.errors.InputError, match="no energy"):
        dr.ops.grad(dr.DenoiserField().double(), x)


def test_bad_input_is_a_sentence() -> None:
    reg = random_red(double=False)
    with pytest.raises(dr.errors.InputError, match="x must be a float32 or float64 tensor"):
        dr.ops.grad(reg, torch.zeros(3, 3))
    with pytest.raises(dr.errors.InputError, match="one dtype"):
        dr.ops.energy(reg, images(1, 1, 5, 5))
    with dr.use_backend("reference"):
        assert dr.ops.grad(reg, images(1, 1, 5, 5, dtype=torch.float32)).shape == (1, 1, 5, 5)


@pytest.mark.parametrize("norm", ["none", "pixel", "image"])
def test_the_definition_as_a_function_of_its_parameters(norm: str) -> None:
    reg = random_red(norm=norm, depth=4)
    params, tail = _arguments(reg)
    u = normal(2, 1, 7, 6)
    torch.testing.assert_close(conv_chain(u, params, norm, reg.net.gain, tail[-1]), reg.net(u), rtol=0, atol=0)


# ---- torch.compile


def _step(A: dr.SRM, reg: nn.Module, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    z = A.prox_l2(x - 0.1 * dr.ops.grad(reg, x), y, 2.0)
    return z, 0.5 * (A.A(z) - y).square().sum(1) + dr.ops.energy(reg, z) + A.normal(x).sum() + A.A_adjoint(y).mean()


def _compiled(function: Any, dynamic: bool | None = None, backend: str = "aot_eager") -> Any:
    torch._dynamo.reset()
    return torch.compile(function, backend=backend, fullgraph=True, dynamic=dynamic)


@CPU
@pytest.mark.parametrize("dynamic", [None, True])
def test_compile_has_no_graph_break(dynamic: bool | None) -> None:
    A, reg = _srm(), random_red(double=False, channels=3, norm="pixel")
    for count in (2, 3):
        x, y = images(count, 1, 12, 20, dtype=torch.float32).requires_grad_(), normal(count, A.measurements).float()
        compiled = _compiled(_step, dynamic) if count == 2 else compiled  # noqa: F821
        wrt = [x, *reg.parameters()]
        for i in range(2):
            a, b = compiled(A, reg, x, y)[i], _step(A, reg, x, y)[i]
            torch.testing.assert_close(a, b)
            for g, h in zip(torch.autograd.grad(a.sum(), wrt), torch.autograd.grad(b.sum(), wrt), strict=True):
                torch.testing.assert_close(g, h, rtol=1e-4, atol=1e-4)
        with torch.no_grad():
            torch.testing.assert_close(compiled(A, reg, x, y), _step(A, reg, x, y))


def test_a_layernorm_after_silu_is_left_to_the_definition() -> None:
    reg, x = random_red(double=False, norm="pixel", norm_place="after"), images(2, 1, 8, 9, dtype=torch.float32)
    wanted = reg.value_and_grad(x)[1]
    torch.testing.assert_close(dr.ops.grad(reg, x), wanted)
    torch.testing.assert_close(_compiled(lambda t: dr.ops.grad(reg, t))(x), wanted)


@CPU
def test_compiled_code_holds_the_operations() -> None:
    A, reg = _srm(), random_red(double=False, channels=3)
    x, y = images(2, 1, 12, 20, dtype=torch.float32), normal(2, A.measurements).float()
    seen: list[str] = []

    def look(graph: Any, inputs: Any) -> Any:
        seen.extend(str(n.target) for n in graph.graph.nodes if n.op == "call_function")
        return graph

    torch._dynamo.reset()
    torch.compile(_step, backend=look, fullgraph=True)(A, reg, x, y)
    for op in ("srm", "srm_correct", "chain_value_grad"):
        assert any(f"deepreg_fast.{op}" in name for name in seen), op
    assert not any("conv2d" in name for name in seen)


@CPU
def test_compile_with_torch_func_inside() -> None:
    A, reg = _srm(), random_red(double=False, channels=3)
    x, v = images(2, 1, 12, 20, dtype=torch.float32), normal(2, 1, 12, 20).float()

    def f(t: torch.Tensor) -> torch.Tensor:
        return (0.5 * A.A(t).square().sum(1) + dr.ops.energy(reg, t)).sum()

    def products_of(t: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.func.grad(f)(t), torch.func.jvp(lambda s: dr.ops.grad(reg, s) + A.normal(s), (t,), (v,))[1]

    for a, b in zip(_compiled(products_of)(x, v), products_of(x, v), strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(products_of(x, v)[1], reg.linearize(x).hvp(v) + A.normal(v))


def test_compiled_in_float64_it_is_the_definition() -> None:
    A, reg = _srm(), random_red(channels=2, depth=2)
    x, y = images(2, 1, 12, 20), normal(2, A.measurements)
    for a, b in zip(_compiled(_step)(A, reg, x, y), _step(A, reg, x, y), strict=True):
        torch.testing.assert_close(a, b)
