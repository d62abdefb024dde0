"""The solvers' vector work in C++: against bounds of its rounding, on every instruction set, and bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from math import fsum

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import deepreg_fast as dr
from deepreg_fast import backend
from deepreg_fast.batched.linalg import add, dot, secant
from deepreg_fast.solvers.acceleration import Anderson

from .helpers import images, normal, random_red, relative
from .test_cpu_backend import EPS, _sets

pytestmark = pytest.mark.skipif(
    dr.backends()["cpu"] is not None, reason=f"the C++ extension is not built: {dr.backends()['cpu']}"
)

SIZES = st.one_of(st.integers(1, 40), st.sampled_from([1023, 1024, 1025, 4099, 65536, 65537, 140001]))


def on_each_set(check: Callable[[], None]) -> None:
    for isa in _sets():
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("DEEPREG_FAST_ISA", isa)
            check()


def near(found: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """`found` is `<a, b>`: float32 products are exact in float64, so only the n additions round."""
    products = (a.double() * b.double()).flatten().tolist()
    assert abs(found.item() - fsum(products)) <= len(products) * 2.0**-53 * fsum(map(abs, products))


@settings(max_examples=30)
@given(st.integers(1, 3), SIZES, st.integers(0, 1000))
def test_dot(count: int, n: int, seed: int) -> None:
    a, b = normal(count, n, seed=seed).float(), normal(count, n, seed=seed + 1).float()

    def check() -> None:
        for found, ai, bi in zip(dot(a, b), a, b, strict=True):
            near(found, ai, bi)

    on_each_set(check)


@settings(max_examples=30)
@given(st.integers(1, 3), SIZES, st.integers(0, 1000))
def test_add(count: int, n: int, seed: int) -> None:
    x, p = normal(count, n, seed=seed).float(), normal(count, n, seed=seed + 1).float()
    s, rows = normal(count, seed=seed + 2), torch.arange(count) % 2 == 0
    p[~rows] = torch.nan

    def check() -> None:
        out, size = add(x, s, p, rows)
        assert torch.equal(out[~rows], x[~rows])
        product = s.float().double()[:, None] * p.double()
        exact, error = x.double() + product, (out.double() - (x.double() + product)).abs()
        # The product and the sum round once each, by half an ulp.
        assert (error <= 0.5 * EPS * (product.abs() + exact.abs()) * (1 + EPS))[rows].all()
        for found, row in zip(size, out, strict=True):
            near(found, row, row)

    on_each_set(check)


@settings(max_examples=20)
@given(st.integers(1, 4), SIZES, st.integers(0, 1000))
def test_secant(count: int, n: int, seed: int) -> None:
    x, g = normal(count + 2, n, seed=seed).float(), normal(count + 2, n, seed=seed + 1).float()
    candidate, candidate_g = normal(count, n, seed=seed + 2).float(), normal(count, n, seed=seed + 3).float()
    idx = torch.randperm(count + 2, generator=torch.Generator().manual_seed(seed))[:count]
    dx, dg, old = candidate - x[idx], candidate_g - g[idx], g[idx]

    def check() -> None:
        found = secant(idx, candidate, candidate_g, x, g)
        for i in range(count):
            for k, (a, b) in enumerate([(dx, dx), (dg, dg), (dx, dg), (old, old)]):
                near(found[i, k], a[i], b[i])

    on_each_set(check)


@pytest.mark.parametrize("n", [7, 900, 70000])
def test_anderson_as_the_reference(n: int) -> None:
    """A few rounds of a contraction with images that come and go, by the kernels and by torch; the steps agree."""
    diagonal = torch.linspace(0.1, 0.9, n)

    def run() -> list[torch.Tensor]:
        x = images(3, n, dtype=torch.float32)
        anderson, found = Anderson(x, 4), []
        for k in range(9):
            idx = torch.tensor([[0, 1, 2], [2, 0], [1, 2]][k % 3])
            x[idx] = anderson.propose(x[idx], diagonal[:n] * (1.0 - x[idx]), idx)
            found.append(x.clone())
            if k == 5:
                anderson.reset(torch.tensor([2]), torch.tensor([True]))
        return found

    with dr.use_backend("reference"):
        wanted = run()

    def check() -> None:
        for k, (ours, theirs) in enumerate(zip(run(), wanted, strict=True)):
            # The least-squares problem's conditioning multiplies the roundings (of EPS) by up to 1 / sqrt(ridge) = 1e4.
            assert relative(ours.double(), theirs.double()) <= 1e4 * EPS, k

    on_each_set(check)


def test_neither_neighbours_nor_threads_change_the_bits() -> None:
    a, b = normal(3, 150001).float(), normal(3, 150001, seed=2).float()
    alone = torch.cat([dot(a[i : i + 1], b[i : i + 1]) for i in range(3)])
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            assert torch.equal(dot(a, b), alone)
    finally:
        torch.set_num_threads(before)


def test_where_they_serve() -> None:
    x = images(2, 9, dtype=torch.float32)
    assert backend.vector_kernels(x) is not None
    assert backend.vector_kernels(x.double()) is None
    assert backend.vector_kernels(x.clone().requires_grad_()) is None
    with dr.use_backend("reference"):
        assert backend.vector_kernels(x) is None
    y = images(9, 2, dtype=torch.float32).t()
    assert torch.equal(dot(y, y), dot(y.contiguous(), y.contiguous()))


def test_recovery_as_on_the_reference() -> None:
    reg, A = random_red(double=False, scale=0.05), dr.SRM((1, 24, 24), 0.5)
    x = images(3, 1, 24, 24, dtype=torch.float32)
    for acceleration in ("none", "anderson", "fista"):
        options = dr.PGDOptions(500, 1e-5, acceleration)
        ours = dr.recover(A.A(x), A, reg, mu=0.1, options=options)
        with dr.use_backend("reference"):
            theirs = dr.recover(A.A(x), A, reg, mu=0.1, options=options)
        assert ours.status.tolist() == theirs.status.tolist() == [int(dr.Status.CONVERGED)] * 3
        # Both are within the tolerance of the same minimum; its curvature is at least mu (1 + alpha) / 2.
        assert relative(ours.x, theirs.x) <= 1e-3
