"""The solvers' decisions in Triton: bit for bit those of torch, special numbers included."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from deepreg_fast import Status
from deepreg_fast.backend.gpu.decisions import GpuDecisions
from deepreg_fast.batched.loop import simulate_device
from deepreg_fast.kernels.solvers import scalars
from deepreg_fast.solvers.acceleration import anderson_solve, anderson_update
from deepreg_fast.solvers.criteria import PerImageState, acceptance_test, convergence_test
from deepreg_fast.solvers.options import PGDOptions

from .test_triton_vectors import DEVICE

# numpy warns where the interpreter makes an infinity.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

DECISIONS = GpuDecisions()
cg: Any = import_module("deepreg_fast.solvers.cg")  # the package's name `cg` is the function
EPS = torch.finfo(torch.float32).eps
SPECIAL = [torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1.0, -1.0, 5e-324, 1e-300, 1e300, -1e300, EPS, 1e-12]
BATCHES = st.sampled_from([0, 1, 31, 77])
SEEDS = st.integers(0, 10000)


@pytest.fixture(autouse=True, scope="module")
def _roots() -> Iterator[None]:
    """Square roots as IEEE 754 has them, and a GPU: torch takes the CPU's from a library that may be off by one bit."""
    with pytest.MonkeyPatch.context() as patch:
        if DEVICE == "cpu":
            patch.setattr(torch, "sqrt", lambda t: torch.from_numpy(np.sqrt(t.numpy())))
        yield


class Draw:
    """Tensors `[B]` of ordinary numbers of all sizes, with special ones strewn in."""

    def __init__(self, images: int, seed: int) -> None:
        self.images, self.g = images, torch.Generator().manual_seed(seed)

    def numbers(self, *shape: int, positive: bool = False) -> torch.Tensor:
        shape = (*shape, self.images)
        value = torch.randn(shape, generator=self.g, dtype=torch.float64)
        value *= 10.0 ** torch.randint(-3, 4, shape, generator=self.g)
        special = torch.tensor(SPECIAL, dtype=torch.float64)[torch.randint(len(SPECIAL), shape, generator=self.g)]
        value = value.abs() if positive else value
        return torch.where(torch.rand(shape, generator=self.g) < 0.15, special, value).to(DEVICE)

    def flags(self, share: float = 0.8) -> torch.Tensor:
        return (torch.rand(self.images, generator=self.g) < share).to(DEVICE)

    def counts(self, most: int) -> torch.Tensor:
        return torch.randint(most, (self.images,), generator=self.g).to(DEVICE)

    def status(self) -> torch.Tensor:
        return torch.full((self.images,), int(Status.MAX_ITERATIONS), device=DEVICE)


def alike(found: torch.Tensor, wanted: torch.Tensor, rows: torch.Tensor | None = None) -> None:
    rows = torch.ones_like(found, dtype=torch.bool) if rows is None else rows
    a, b = found[rows], wanted[rows]
    assert a.dtype == b.dtype
    # Either zero may be the larger one of two, also in torch.
    same = (a == b) | (a != a) & (b != b)
    assert same.all(), (a[~same], b[~same])


def state(d: Draw) -> PerImageState:
    return PerImageState(
        d.numbers(positive=True),
        d.numbers(),
        d.numbers(),
        d.flags(0.5),
        d.counts(4),
        d.counts(9),
        d.status(),
        d.flags(),
    )


def chosen(seed: int) -> PGDOptions:
    return PGDOptions(
        3, [0.0, 1e-4, 1.0][seed % 3], ["none", "anderson"][seed % 2], [1.0, 1e9][seed // 2 % 2], 1.2, 0.9
    )


@settings(max_examples=40)
@given(BATCHES, SEEDS)
def test_pgd_convergence(images: int, seed: int) -> None:
    d, options = Draw(images, seed), chosen(seed)
    n, sums, scale = state(d), d.numbers(3), d.numbers(positive=True)
    wanted = convergence_test.definition(n, sums, scale, options, EPS)
    found = DECISIONS.convergence_test(n, sums, scale, options, EPS)
    for a, b in zip(found, wanted, strict=True):
        alike(a, b)


@settings(max_examples=60)
@given(BATCHES, SEEDS)
def test_pgd_acceptance(images: int, seed: int) -> None:
    d, options = Draw(images, seed), chosen(seed)
    n, sums, value, limit = state(d), d.numbers(5), d.numbers().float(), d.numbers(positive=True)
    # Some about the limits.
    dx2, dg2, bend, old2, _ = sums
    dg2.copy_(
        torch.where(d.flags(0.3), 1e2 * EPS**2 * old2 * (0.5 + torch.rand(images, generator=d.g).to(DEVICE)), dg2)
    )
    bend.copy_(torch.where(d.flags(0.3), dx2 / n.tau + 4.0 * EPS * torch.sqrt(old2 * dx2), bend))
    wanted, good, forget = acceptance_test.definition(n, sums, value, limit, options, EPS)
    found, accept, forgets = DECISIONS.acceptance_test(n, sums, value, limit, options, EPS)
    for a, b in zip((*found, accept), (*wanted, good), strict=True):
        alike(a, b)
    alike(forgets[n.running], forget[n.running])


@settings(max_examples=20)
@given(st.integers(0, 3), st.integers(1, 7), SEEDS)
def test_anderson(images: int, memory: int, seed: int) -> None:
    d, ridge, reach = Draw(images, seed), 1e-8, 20.0
    numbers = d.numbers(positive=True), d.numbers(positive=True), d.counts(2 * memory + 2), memory, reach
    wanted = anderson_update.definition(*numbers)
    for a, b in zip(DECISIONS.anderson_update(*numbers), wanted, strict=True):
        alike(a, b)
    _, count, slot, *_ = wanted

    df = torch.randn(images + 1, memory, 40, generator=d.g, dtype=torch.float64).to(DEVICE)
    rhs, row = (
        df[:images, :, 0].clone(),
        torch.einsum("bkn,bn->bk", df[:images], df[torch.arange(images, device=DEVICE), slot]),
    )
    if seed % 4 == 0:
        row[:1], rhs[1:2] = torch.nan, torch.inf
    idx, gram = torch.arange(images).flip(0).to(DEVICE) + 1, df @ df.mT
    wanted_gram = gram.clone()
    dtype = [torch.float32, torch.float64][seed % 2]
    with simulate_device():
        wanted_count, c = anderson_solve.definition(idx, row, rhs, slot, count, wanted_gram, ridge, dtype)
    found_count, found = DECISIONS.anderson_solve(idx, row, rhs, slot, count, gram, ridge, dtype)
    alike(found, c)
    alike(gram, wanted_gram)
    assert torch.equal(found_count, wanted_count)


@settings(max_examples=40)
@given(BATCHES, SEEDS)
def test_cg_turn(images: int, seed: int) -> None:
    d = Draw(images, seed)
    new_rz, rz, fresh, running, status = d.numbers(), d.numbers(positive=True), d.flags(0.3), d.flags(), d.status()
    wanted = cg.cg_beta.definition(new_rz, rz, fresh, status, running)
    for a, b in zip(DECISIONS.cg_beta(new_rz, rz, fresh, status, running), wanted, strict=True):
        alike(a, b)


@settings(max_examples=60)
@given(BATCHES, SEEDS)
def test_cg_stride(images: int, seed: int) -> None:
    d = Draw(images, seed)
    sums, moved, rz, a_norm = d.numbers(3), d.numbers(2, positive=True), d.numbers(positive=True), d.numbers()
    running, status = d.flags(), d.status()
    # Some at the very limit, and on either side of it.
    limit = 0.5 * EPS * torch.maximum(a_norm, torch.sqrt(sums[2] / sums[0])) * sums[0]
    sums[1] = torch.where(d.flags(0.5), torch.where(d.flags(0.5), limit, -limit), sums[1])
    numbers = sums, moved, rz, a_norm, status, running, EPS, 1e38
    for a, b in zip(DECISIONS.cg_alpha(*numbers), cg.cg_alpha.definition(*numbers), strict=True):
        alike(a, b)


@settings(max_examples=40)
@given(BATCHES, SEEDS)
def test_cg_arrived(images: int, seed: int) -> None:
    d = Draw(images, seed)
    moved, sums = d.numbers(2, positive=True), d.numbers(3, positive=True)
    length, idle, running, aim = d.numbers(positive=True), d.counts(4), d.flags(), d.numbers(positive=True)
    numbers = moved, sums, length, idle, aim, running, EPS
    for a, b in zip(DECISIONS.cg_has_converged(*numbers), cg.cg_has_converged.definition(*numbers), strict=True):
        alike(a, b)


def test_the_kernels_know_the_statuses() -> None:
    assert {s.name: int(s) for s in Status} == {s.name: getattr(scalars, s.name).value for s in Status}
