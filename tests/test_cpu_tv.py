"""Smoothed total variation's C++ kernels against float64, on every instruction set."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import deepreg_fast as dr

from .helpers import images
from .test_cpu_backend import _sets

pytestmark = pytest.mark.skipif(
    dr.backends()["cpu"] is not None, reason=f"the C++ extension is not built: {dr.backends()['cpu']}"
)


@pytest.fixture(name="isa", params=_sets(), scope="module")
def _isa(request: pytest.FixtureRequest):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DEEPREG_FAST_ISA", request.param)
        yield request.param


def _answers(reg: dr.TV, x: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    lin = reg.linearize(x)
    value, grad = reg.value_and_grad(x)
    assert torch.equal(lin.value, value) and torch.equal(lin.grad, grad)
    assert lin.param_vjp(v) == {}
    return value, grad, lin.hvp(v)


def _error(a: torch.Tensor, exact: torch.Tensor) -> float:
    return float((a.double() - exact).norm() / exact.norm().clamp(min=1e-30))


@settings(deadline=None, max_examples=25)
@given(
    shape=st.tuples(*(st.integers(1, n) for n in (3, 4, 40, 70))),
    eps=st.sampled_from([1e-3, 3e-3, 1e-2, 0.1]),
    flat=st.booleans(),
    seed=st.integers(0, 99),
)
def test_the_error_is_at_most_twice_that_of_torch(
    isa: str, shape: tuple[int, int, int, int], eps: float, flat: bool, seed: int
) -> None:
    """`flat`: differences about as large as eps, where the smoothing matters most."""
    reg = dr.TV(eps)
    x = (0.5 + (eps if flat else 1.0) * (images(*shape, seed=seed) - 0.5)).float()
    v = images(*shape, seed=seed + 1).float() - 0.5
    with dr.use_backend("cpu"):
        ours = _answers(reg, x, v)
    with dr.use_backend("reference"):
        torchs, exact = _answers(reg, x, v), _answers(reg, x.double(), v.double())
    for a, b, e in zip(ours, torchs, exact, strict=True):
        assert a.dtype == torch.float32
        assert _error(a, e) <= max(2.0 * _error(b, e), 2.0**-22)


def test_bits_do_not_depend_on_neighbors_or_threads(isa: str) -> None:
    reg, before = dr.TV(), torch.get_num_threads()
    x, v = (images(5, 2, 67, 45, seed=s, dtype=torch.float32) for s in (0, 1))
    answers = []
    try:
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            answers.append(_answers(reg, x, v))
        alone = [_answers(reg, x[i : i + 1], v[i : i + 1]) for i in range(5)]
    finally:
        torch.set_num_threads(before)
    answers.append(tuple(torch.cat(parts) for parts in zip(*alone, strict=True)))  # type: ignore[arg-type]
    for other in answers[1:]:
        assert all(map(torch.equal, answers[0], other))


def test_it_serves_tv_alone() -> None:
    class Twice(dr.TV):
        def energy(self, x: torch.Tensor) -> torch.Tensor:
            return 2.0 * super().energy(x)

    x = images(2, 1, 9, 9, dtype=torch.float32)
    assert dr.TV().backend_for(x).name == "cpu"
    assert dr.TV().backend_for(x.double()).name == Twice().backend_for(x).name == "reference"
    lin = dr.TV().linearize(x)
    with pytest.raises(dr.errors.InputError, match="must have the shape"):
        lin.hvp(x[:1])
