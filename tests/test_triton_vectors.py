"""The solvers' vector work in Triton: sums against exact ones, entries against torch's float32, and images alone.

Without a GPU the kernels run in Triton's interpreter, which rounds every operation as torch does; on one a product and
a sum are rounded once.
"""

from __future__ import annotations

from math import fsum

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

import deepreg_fast as dr
from deepreg_fast import backend
from deepreg_fast.backend.gpu import vectors
from deepreg_fast.backend.gpu.decisions import GpuDecisions
from deepreg_fast.backend.gpu.vectors import GpuVectors, Sums
from deepreg_fast.kernels.solvers import reductions as kernels
from deepreg_fast.solvers.acceleration import Anderson

from .helpers import images, normal, relative

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VECTORS = GpuVectors()
EPS = torch.finfo(torch.float32).eps

# A GPU compiles a kernel for each size, so these are few: below, at and above a piece of 2048 and a multiple of 16.
SIZES = st.sampled_from([1, 37, 2048, 2049, 4112])
COUNTS = st.integers(0, 3)
SEEDS = st.integers(0, 1000)


def some(*shape: int, seed: int) -> torch.Tensor:
    return normal(*shape, seed=seed).float().to(DEVICE)


def near(found: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """`found` `[B]` is `<a_b, b_b>`: float32 products are exact in float64, so only the n additions round."""
    assert found.dtype == torch.float64 and found.shape == (len(a),)
    for s, row in zip(found.tolist(), (a.double() * b.double()).flatten(1).tolist(), strict=True):
        assert abs(s - fsum(row)) <= len(row) * 2.0**-53 * fsum(map(abs, row))


def same(found: torch.Tensor, wanted: torch.Tensor, size: torch.Tensor) -> None:
    """Two results that differ by fused roundings only, if at all; `size` bounds the terms of an entry."""
    assert ((found - wanted).abs() <= (4 * EPS * size if DEVICE == "cuda" else 0.0)).all()


@settings(max_examples=15)
@given(COUNTS, SIZES, SEEDS)
def test_dots(count: int, n: int, seed: int) -> None:
    a, b, c, d = (some(count, n, seed=seed + i) for i in range(4))
    near(VECTORS.dot(a, b), a, b)
    pairs = [(a, a), (b, c), (d, a), (d, d), (c, b)]
    for found, pair in zip(VECTORS.dots(*pairs), pairs, strict=True):
        near(found, *pair)


@settings(max_examples=15)
@given(COUNTS, SIZES, SEEDS)
def test_add(count: int, n: int, seed: int) -> None:
    x, p, s = some(count, n, seed=seed), some(count, n, seed=seed + 1), some(count, seed=seed + 2).double()
    rows = torch.arange(count, device=DEVICE) % 2 == seed % 2
    p[~rows] = torch.nan
    out, size = VECTORS.add(x, s, p, rows)
    step = torch.where(rows[:, None], s.float()[:, None] * p, 0.0)
    assert torch.equal(out[~rows], x[~rows])
    same(out, x + step, x.abs() + step.abs())
    near(size, out, out)


@settings(max_examples=15)
@given(COUNTS, SIZES, SEEDS)
def test_secant(count: int, n: int, seed: int) -> None:
    x, g = some(count + 2, n, seed=seed), some(count + 2, n, seed=seed + 1)
    candidate, candidate_g = some(count, n, seed=seed + 2), some(count, n, seed=seed + 3)
    idx = torch.randperm(count + 2, generator=torch.Generator().manual_seed(seed))[:count].to(DEVICE)
    dx, dg, old = candidate - x[idx], candidate_g - g[idx], g[idx]
    found = VECTORS.secant(idx, candidate, candidate_g, x, g)
    assert found.shape == (count, 4)
    for column, (a, b) in zip(found.unbind(1), [(dx, dx), (dg, dg), (dx, dg), (old, old)], strict=True):
        near(column, a, b)
    assert torch.equal(VECTORS.secant(None, candidate, candidate_g, x[idx], g[idx]), found)


class _Reference:
    """Anderson's two steps as the protocol says them, in float32 with sums in float64."""

    @staticmethod
    def remember(idx, state, slot, fresh, x, f):
        dx, df, old_x, old_f = state
        dx[idx, slot] = torch.where(fresh[:, None], x - old_x[idx], 0.0)
        df[idx, slot] = torch.where(fresh[:, None], f - old_f[idx], 0.0)
        old_x[idx], old_f[idx] = x, f
        return df[idx], df[idx, slot]

    @staticmethod
    def shift(idx, state, c):
        s = torch.zeros(len(idx), state[0].shape[2], device=DEVICE)
        for k in range(state[0].shape[1]):
            used = (c[:, k] != 0)[:, None]
            s = s + torch.where(used, c[:, k : k + 1] * (state[0][idx, k] + state[1][idx, k]), 0.0)
        return s


@settings(max_examples=10)
@given(COUNTS, SIZES, st.sampled_from([1, 3]), SEEDS)
def test_remember_and_combine(count: int, n: int, memory: int, seed: int) -> None:
    state = tuple(some(count + 2, *([memory, n] if i < 2 else [n]), seed=seed + i) for i in range(4))
    before = tuple(t.clone() for t in state)
    x, f = some(count, n, seed=seed + 4), some(count, n, seed=seed + 5)
    g = torch.Generator().manual_seed(seed)
    idx = torch.randperm(count + 2, generator=g)[:count].to(DEVICE)
    slot = torch.randint(memory, (count,), generator=g).to(DEVICE)
    fresh = torch.arange(count, device=DEVICE) != 1
    # What is not fresh may be anything, and is not read.
    state[2][idx[~fresh]] = before[2][idx[~fresh]] = torch.nan
    gram, rhs = VECTORS.remember(idx, state, slot, fresh, x, f)
    df, new_df = _Reference.remember(idx, before, slot, fresh, x, f)
    for found, wanted in zip(state, before, strict=True):
        assert torch.equal(found, wanted)
    assert gram.shape == rhs.shape == (count, memory)
    for k in range(memory):
        near(gram[:, k], df[:, k], new_df)
        near(rhs[:, k], df[:, k], f)
    c = some(count, memory, seed=seed + 6)
    c[:, 0] = 0.0
    state[0][idx, 0] = before[0][idx, 0] = torch.nan
    shift = _Reference.shift(idx, before, c)
    length = shift.double().norm(dim=1)
    limit = length * torch.tensor([0.5, 2.0, 1e300], dtype=torch.float64, device=DEVICE)[:count]
    out = VECTORS.combine(idx, state, c, limit, x, f)
    factor = torch.where(length > limit, limit / length.clamp_min(1e-300), 1.0)
    # The factor is rounded to float32 from a length that may differ in its last bits.
    error = (out - (x + f - factor.float()[:, None] * shift)).abs()
    size = x.abs() + f.abs() + _Reference.shift(idx, tuple(t.abs() for t in before), c.abs())
    assert (error <= (1 + memory) * EPS * size).all()
    free = ~(length > limit)
    same(out[free], (x + f - shift)[free], (memory * size)[free])


@pytest.mark.parametrize("n", [7, 2500])
def test_anderson_as_the_reference(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few rounds of a contraction with images that come and go, by the kernels and by torch; the steps agree."""
    diagonal = torch.linspace(0.1, 0.9, n, device=DEVICE)

    def run() -> list[torch.Tensor]:
        x = images(3, n, dtype=torch.float32).to(DEVICE)
        anderson, found = Anderson(x, 4), []
        for k in range(7):
            idx = torch.tensor([[0, 1, 2], [2, 0], [1, 2]][k % 3], device=DEVICE)
            x[idx] = anderson.propose(x[idx], diagonal * (1.0 - x[idx]), idx)
            found.append(x.clone())
            if k == 4:
                anderson.reset(torch.tensor([2], device=DEVICE), torch.tensor([True], device=DEVICE))
        return found

    with dr.use_backend("reference"):
        wanted = run()
    monkeypatch.setattr(backend, "vector_kernels", lambda *_: VECTORS)
    monkeypatch.setattr(backend, "decision_kernels", lambda *_: GpuDecisions())
    for k, (ours, theirs) in enumerate(zip(run(), wanted, strict=True)):
        # The least-squares problem's conditioning multiplies the roundings (of EPS) by up to 1 / sqrt(ridge) = 1e4.
        assert relative(ours.double(), theirs.double()) <= 1e4 * EPS, k


def every(n: int, pick: torch.Tensor, spoil: int | None = None) -> list[torch.Tensor]:
    """Every function on the images `pick` of the same three, the results with one row per image."""
    tensors = [some(3, n, seed=i) for i in range(4)]
    state = [some(3, *([2, n] if i < 2 else [n]), seed=10 + i) for i in range(4)]
    c, s = some(3, 2, seed=20), some(3, seed=21).double()
    if spoil is not None:
        for t in (*tensors, *state, c):
            t[spoil] = torch.nan
    a, b, x, f = (t[pick] for t in tensors)
    memory = tuple(t[pick] for t in state)
    idx, slot = torch.arange(len(pick), device=DEVICE), pick % 2
    yes = torch.ones_like(pick, dtype=torch.bool)
    out = [VECTORS.dots((a, b), (x, f), (f, f)).t(), *VECTORS.add(a, s[pick], b, yes)]
    out += [VECTORS.secant(None, a, b, x, f), *VECTORS.remember(idx, memory, slot, yes, x, f)]
    return [*out, *memory, VECTORS.combine(idx, memory, c[pick], s[pick].abs(), x, f)]


@pytest.mark.parametrize("n", [5, 2064])
def test_images_are_alone(n: int) -> None:
    """No bit depends on the neighbours: not on how many there are, not on NaN in them, not on whether they work."""
    order = torch.tensor([2, 0, 1], device=DEVICE)
    alone = [torch.cat(r) for r in zip(*(every(n, order[i : i + 1]) for i in range(3)), strict=True)]
    together, spoiled = every(n, order), every(n, order, spoil=0)
    rows = torch.tensor([True, False, True], device=DEVICE)
    with backend.active_images(rows):
        some_at_work = every(n, order)
    assert all(torch.isfinite(t).all() for t in together)
    for k, wanted in enumerate(alone):
        assert torch.equal(together[k], wanted), k
        assert torch.equal(some_at_work[k][rows], wanted[rows]), k
        assert torch.equal(spoiled[k][rows], wanted[rows]), k
        assert torch.isnan(spoiled[k][1]).all(), k


def test_images_not_at_work_keep_their_memory() -> None:
    state = tuple(some(2, *([2, 9] if i < 2 else [9]), seed=i) for i in range(4))
    before = tuple(t.clone() for t in state)
    x, slot, yes = (
        some(2, 9, seed=5),
        torch.zeros(2, dtype=torch.int64, device=DEVICE),
        torch.ones(2, device=DEVICE) > 0,
    )
    with backend.active_images(torch.tensor([False, True], device=DEVICE)):
        VECTORS.remember(None, state, slot, yes, x, x)
    for now, then in zip(state, before, strict=True):
        assert torch.equal(now[0], then[0]) and not torch.equal(now[1], then[1])


def test_any_layout_and_no_entries() -> None:
    x = some(40, 3, seed=1).t()
    assert not x.is_contiguous()
    assert torch.equal(VECTORS.dot(x, x), VECTORS.dot(x.contiguous(), x.contiguous()))
    wide = some(3, 4, 6, 5, seed=2)[:, 1:2, ::2]
    s, rows = torch.ones(3, device=DEVICE), torch.ones(3, device=DEVICE) > 0
    out, size = VECTORS.add(wide, s, wide, rows)
    assert torch.equal(out, 2 * wide)
    near(size, out, out)
    assert torch.equal(VECTORS.dot(x[:, :0], x[:, :0]), torch.zeros(3, dtype=torch.float64, device=DEVICE))


def test_kernels_read_aligned_memory() -> None:
    """So that one kernel, with one order of sums, serves all images of a size."""
    x = some(2 * 36 + 1, seed=1)[1:].view(2, 36)
    assert x.data_ptr() % 16 and not vectors._read(x).data_ptr() % 16
    assert torch.equal(vectors._read(x), x)
    assert torch.equal(VECTORS.dot(x, x), VECTORS.dot(x.clone(), x.clone()))


def test_many_pieces() -> None:
    sums = Sums(torch.empty(2, 2500 * kernels.PIECE, device="meta"), 3)
    sums.partial = normal(3, 2, sums.pieces).to(DEVICE)
    for found, row in zip(sums.total().flatten().tolist(), sums.partial.flatten(0, 1).tolist(), strict=True):
        assert abs(found - fsum(row)) <= len(row) * 2.0**-53 * fsum(map(abs, row))


def test_too_many_tensors_are_refused() -> None:
    x = [some(1, 3, seed=i) for i in range(6)]
    with pytest.raises(ValueError, match="at most 4"):
        VECTORS.dots((x[0], x[1]), (x[2], x[3]), (x[4], x[5]))


@pytest.mark.gpu
def test_more_than_two_to_the_31_entries() -> None:
    n, count = 1 << 20, 2049
    x = torch.zeros(count, n, device="cuda")
    x[-1] = torch.arange(n, device="cuda") % 7
    idx = torch.tensor([count - 1], device="cuda")
    found = VECTORS.secant(idx, torch.zeros(1, n, device="cuda"), x[-1:], x, x)
    assert found.tolist() == [[float((x[-1] ** 2).double().sum()), 0.0, 0.0, float((x[-1] ** 2).double().sum())]]
    assert VECTORS.dot(x, x)[-1] == found[0, 0]
