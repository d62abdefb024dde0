"""The C++ products of the SRM: against float64, on every instruction set, and where torch's definition takes over."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import deepreg_fast as dr
from deepreg_fast import backend

from .helpers import images, normal
from .test_cpu_backend import EPS, _sets
from .test_operators import srms

pytestmark = pytest.mark.skipif(
    dr.backends()["cpu"] is not None, reason=f"the C++ extension is not built: {dr.backends()['cpu']}"
)


def _products(A: dr.SRM, x: torch.Tensor, y: torch.Tensor, gamma: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"A": A.A(x), "A^T": A.A_adjoint(y), "A^T A": A.normal(x), "prox": A.prox_l2(x, y, gamma)}


def _compare(A: dr.SRM, x: torch.Tensor, y: torch.Tensor, gamma: torch.Tensor) -> None:
    exact = _products(copy.deepcopy(A).double(), x.double(), y.double(), gamma.double())
    with dr.use_backend("reference"):
        theirs = _products(A, x, y, gamma)
    for isa in _sets():
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("DEEPREG_FAST_ISA", isa)
            ours = _products(A, x, y, gamma)
        for name, wanted in exact.items():
            error = (ours[name].double() - wanted).norm()
            torch_error = (theirs[name].double() - wanted).norm()
            assert error <= torch.maximum(2.0 * torch_error, _floor(A, x, name, wanted)), (isa, name, error)


def _floor(A: dr.SRM, x: torch.Tensor, name: str, exact: torch.Tensor) -> torch.Tensor:
    """The error that roundings of EPS / 2 by each of the stages leave, whatever torch's luck.

    A few measurements may be small by cancellation, which their roundings are not: the roundings follow the size that
    measurements of x have on average. The norm of the errors of few numbers exceeds its mean by more than that of many.
    """
    ratio = A.measurements / x[0].numel()
    average = {"A": A.gram_scale**0.5, "A^T A": A.gram_scale}.get(name, 0.0) * ratio**0.5 * x.double().norm()
    stages = 2 if name in ("A", "A^T") else 4
    return stages * EPS * (1 + 3 / exact.numel() ** 0.5) * torch.maximum(exact.norm(), average)


@given(srms(), st.integers(0, 1000))
def test_against_float64(A: dr.SRM, seed: int) -> None:
    count = max(2, 600 // A.image_shape[1] // A.image_shape[2])
    x, y = normal(count, *A.image_shape, seed=seed).float(), normal(count, A.measurements, seed=seed + 1).float()
    _compare(A, x, y, torch.rand(count, generator=torch.Generator().manual_seed(seed)) * 10)


@settings(max_examples=20)
@given(st.integers(1, 200), st.integers(1, 100), st.integers(0, 2**32))
def test_dct_of_any_size(height: int, width: int, seed: int) -> None:
    A = dr.SRM((1, height, width), 0.3, seed=seed)
    x, y = normal(2, 1, height, width).float(), normal(2, A.measurements).float()
    _compare(A, x, y, torch.tensor([0.5, 20.0]))


@pytest.mark.parametrize("transform", ["dct", "hadamard", "walsh"])
@pytest.mark.parametrize("randomizer", ["sign", "permutation", "both"])
def test_the_headline_size(transform: str, randomizer: str) -> None:
    A = dr.SRM((1, 180, 180), 0.2, transform=transform, randomizer=randomizer)
    _compare(A, images(2, 1, 180, 180).float(), normal(2, A.measurements).float(), torch.tensor([0.5, 20.0]))


@pytest.mark.parametrize("block", [1, 2, 8, 16, 32, 4096])
def test_walsh_blocks(block: int) -> None:
    A = dr.SRM((1, 64, 64), 0.3, transform="walsh", block=block)
    _compare(A, normal(2, 1, 64, 64).float(), normal(2, A.measurements).float(), torch.tensor([0.5, 20.0]))


@pytest.mark.parametrize("transform", ["dct", "hadamard", "walsh"])
def test_neither_neighbours_nor_threads_change_the_bits(transform: str) -> None:
    A = dr.SRM((1, 20, 36), 0.3, transform=transform)
    x, y = normal(5, 1, 20, 36).float(), normal(5, A.measurements).float()
    gamma = torch.linspace(0, 3, 5)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = _products(A, x, y, gamma)
        torch.set_num_threads(3)
        many = _products(A, x, y, gamma)
    finally:
        torch.set_num_threads(before)
    poisoned = x.clone()
    poisoned[1, 0, 2, 2] = torch.nan
    beside = _products(A, poisoned, y, gamma)
    others = [0, 2, 3, 4]
    for name, wanted in one.items():
        assert torch.equal(many[name], wanted)
        assert torch.equal(beside[name][others], wanted[others])
        assert name == "A^T" or bool(torch.isnan(beside[name][1]).any())
    for i in range(5):
        alone = _products(A, x[i : i + 1], y[i : i + 1], gamma[i : i + 1])
        assert all(torch.equal(alone[k][0], one[k][i]) for k in one)
    assert A.A(x[:0]).shape == (0, A.measurements)


def test_layouts() -> None:
    A, x = dr.SRM((1, 12, 20)), normal(3, 1, 12, 20).float()
    wanted = A.A(x)
    assert torch.equal(A.A(x.transpose(2, 3).contiguous().transpose(2, 3)), wanted)
    assert torch.equal(A.A(torch.cat([x, x], 3)[..., :20]), wanted)
    assert torch.equal(A.A(torch.cat([x.flatten().new_zeros(1), x.flatten()])[1:].view_as(x)), wanted)


def test_another_state_makes_other_kernels() -> None:
    A, B = dr.SRM((1, 12, 10), seed=7), dr.SRM((1, 12, 10), seed=8)
    x = normal(2, 1, 12, 10).float()
    assert not torch.equal(A.A(x), B.A(x))
    B.load_state_dict(A.state_dict())
    assert torch.equal(A.A(x), B.A(x))


def test_torch_follows_where_it_has_to() -> None:
    A, x, v = dr.SRM((1, 12, 10)), normal(2, 1, 12, 10).float(), normal(2, 1, 12, 10, seed=1).float()
    assert backend.srm_kernels(A, x) is not None
    y = A.A(v)
    followed = x.clone().requires_grad_()
    (A.A(followed) * y).sum().backward()
    torch.testing.assert_close(followed.grad, A.A_adjoint(y))
    torch.testing.assert_close(torch.func.jvp(A.A, (x,), (v,))[1], y)
    torch.testing.assert_close(torch.func.vmap(lambda t: A.A(t[None])[0])(x), A.A(x))
    gamma = torch.tensor(2.0, requires_grad=True)
    assert A.prox_l2(x, y, gamma).requires_grad
    with dr.use_backend("reference"):
        assert backend.srm_kernels(A, x) is None
    assert backend.srm_kernels(A, x.double()) is None
