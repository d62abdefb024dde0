"""The solvers' passes in Triton: entries and sums against torch's, images alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings

pytest.importorskip("triton")

import deepreg_fast as dr
from deepreg_fast import backend
from deepreg_fast.backend.gpu.decisions import GpuDecisions
from deepreg_fast.backend.gpu.vectors import GpuVectors
from deepreg_fast.batched import linalg
from deepreg_fast.batched.loop import simulate_device
from deepreg_fast.solvers import cg, minres
from deepreg_fast.solvers.cg import cg_direction, cg_move
from deepreg_fast.solvers.minres import lanczos_first, lanczos_second, minres_move
from deepreg_fast.solvers.steps import compare, descend, pgd_step, take

from .helpers import images, random_red, relative
from .test_triton_vectors import COUNTS, DEVICE, EPS, SEEDS, SIZES, near, same, some

# numpy warns where the interpreter makes an infinity.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

Result = tuple[list[torch.Tensor], torch.Tensor]


def numbers(count: int, seed: int) -> list[torch.Tensor]:
    """Numbers of the images, one of them zero."""
    found = [some(count, seed=seed + i).double() for i in range(6)]
    found[0][1:2] = 0.0
    return found


def _direction(t: list[torch.Tensor], s: list[torch.Tensor], rows: torch.Tensor) -> Result:
    return [cg_direction(t[0], t[1], s[0], rows)], torch.zeros(0, len(rows), device=DEVICE)


def _move(t: list[torch.Tensor], s: list[torch.Tensor], rows: torch.Tensor) -> Result:
    x, r, sums = cg_move(t[0], t[1], t[2], t[3], s[0], rows)
    return [x, r], sums


def _first(t: list[torch.Tensor], s: list[torch.Tensor], rows: torch.Tensor) -> Result:
    u, sums = lanczos_first(t[0], s[0], t[1], t[2], rows)
    return [u], sums


def _second(t: list[torch.Tensor], s: list[torch.Tensor], rows: torch.Tensor) -> Result:
    r1, r2, square = lanczos_second(t[0], s[0], t[1], t[2], rows)
    return [r1, r2], square[None]


def _minres(t: list[torch.Tensor], s: list[torch.Tensor], rows: torch.Tensor) -> Result:
    state, sums = minres_move((t[0], t[1], t[2], t[3]), t[4], t[5], tuple(s), rows)
    return list(state), sums


def _descend(t: list[torch.Tensor], s: list[torch.Tensor], rows: torch.Tensor) -> Result:
    out = descend(t[0], s[0], t[1], rows)
    return [linalg.select(rows, out, 0.0)], torch.zeros(0, len(rows), device=DEVICE)


def _step(t: list[torch.Tensor], s: list[torch.Tensor], rows: torch.Tensor) -> Result:
    step, candidate, sums = pgd_step(t[0], t[1], t[2], rows)
    return [linalg.select(rows, v, 0.0) for v in (step, candidate)], sums


def _compare(t: list[torch.Tensor], s: list[torch.Tensor], rows: torch.Tensor) -> Result:
    every = torch.arange(len(rows), device=DEVICE)
    with backend.active_images(rows):
        return [], compare(every, t[0], t[1], t[2], t[3])


def _take(t: list[torch.Tensor], s: list[torch.Tensor], rows: torch.Tensor) -> Result:
    return list(take(rows, (t[0], t[1]), (t[2], t[3]), (t[4], t[5]))), torch.zeros(0, len(rows), device=DEVICE)


PASSES: list[Callable[[list[torch.Tensor], list[torch.Tensor], torch.Tensor], Result]] = [
    _direction, _move, _first, _second, _minres, _descend, _step, _compare, _take,
]  # fmt: skip


def kernels_serve(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(backend, "vector_kernels", lambda *_: GpuVectors())
    patch.setattr(backend, "decision_kernels", lambda *_: GpuDecisions())


def by_both(
    run: Callable[..., Result], t: list[torch.Tensor], s: list[torch.Tensor], rows: torch.Tensor
) -> tuple[Result, Result]:
    """By the kernels, and by torch."""
    with dr.use_backend("reference"):
        wanted = run([v.clone() for v in t], s, rows)
    with pytest.MonkeyPatch.context() as patch:
        kernels_serve(patch)
        return run([v.clone() for v in t], s, rows), wanted


@pytest.mark.parametrize("run", PASSES)
@settings(max_examples=6)
@given(count=COUNTS, n=SIZES, seed=SEEDS)
def test_as_torch(run: Callable[..., Result], count: int, n: int, seed: int) -> None:
    t, s = [some(count, n, seed=seed + i) for i in range(6)], numbers(count, seed + 9)
    rows = torch.arange(count, device=DEVICE) != seed % 3
    for v in t:
        v[~rows] = torch.nan
    (found, sums), (wanted, wanted_sums) = by_both(run, t, s, rows)
    largest = torch.cat([*s, 1 / s[2]]).abs().amax() if count else 0.0
    size = torch.stack(t).abs().sum(0) * (1.0 + largest) ** 3
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(a[~rows].nan_to_num(7.0), b[~rows].nan_to_num(7.0))
        same(a[rows], b[rows], size[rows])
    # n additions round, in either order, each by half an ulp of at most the sum of the moduli.
    bound = 2 * n * 2.0**-53 * sum((v.double() ** 2).sum(1) for v in (*t, *wanted))
    if DEVICE == "cuda":
        bound = bound + 16 * EPS * (size.double() ** 2).sum(1)
    assert ((sums - wanted_sums).abs() <= bound)[:, rows].all()


@pytest.mark.parametrize("run", PASSES)
def test_images_are_alone(run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    kernels_serve(monkeypatch)
    t, s = [some(3, 2100, seed=i) for i in range(6)], numbers(3, 9)
    rows = torch.tensor([True, False, True], device=DEVICE)
    found, sums = run([v.clone() for v in t], s, rows)
    for i in (0, 2):
        one, one_sums = run([v[i : i + 1].clone() for v in t], [v[i : i + 1] for v in s], rows[:1])
        assert torch.equal(one_sums[:, 0], sums[:, i])
        assert all(torch.equal(a[0], b[i]) for a, b in zip(one, found, strict=True))


def test_sums_of_a_move(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels_serve(monkeypatch)
    t, yes = [some(2, 4112, seed=i) for i in range(4)], torch.ones(2, device=DEVICE) > 0
    (x, r), sums = _move(t, numbers(2, 9), yes)
    near(sums[0], x, x)
    near(sums[1], r, r)


def test_other_layouts_go_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels_serve(monkeypatch)
    t, s = [some(30, 3, seed=i).t() for i in range(4)], torch.ones(3, device=DEVICE).double()
    x, r, _ = cg_move(t[0], t[1], t[2], t[3], s, s > 0)
    assert torch.equal(x, t[0] + t[2]) and torch.equal(r, t[1] - t[3])
    with pytest.raises(ValueError, match="contiguous"):
        GpuVectors().cg_move(t[0], t[1], t[2], t[3], s, s > 0)


@pytest.mark.parametrize("solve", [cg, minres])
def test_a_solve(solve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every image of a batch, one without a right-hand side and one of NaN, by the kernels."""
    diagonal, b = torch.linspace(1.0, 4.0, 30, device=DEVICE), some(4, 30, seed=3)
    b[1], b[2] = 0.0, torch.nan
    kernels_serve(monkeypatch)
    with simulate_device():
        found = solve(lambda v: diagonal * v, b, x0=None)
    assert found.status.tolist() == [0, 0, int(dr.Status.NON_FINITE), 0]
    for i in (0, 3):
        assert relative(diagonal * found.x[i], b[i]) <= 1e-6


@pytest.mark.parametrize("acceleration", ["none", "anderson"])
def test_a_recovery(acceleration: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the kernels, with images that end at different times, and by torch."""
    reg, A = random_red(double=False, scale=0.05).to(DEVICE), dr.SRM((1, 8, 8), 0.5).to(DEVICE)
    x = images(3, 1, 8, 8, dtype=torch.float32).to(DEVICE)
    x[2] *= 0.01
    y = A.A(x)
    y[1] = torch.nan

    def run() -> dr.Solution:
        return dr.recover(y, A, reg, mu=0.1, options=dr.PGDOptions(200, 1e-4, acceleration))

    with dr.use_backend("reference"):
        wanted = run()
    kernels_serve(monkeypatch)
    with simulate_device():
        found = run()
    assert found.status.tolist() == wanted.status.tolist() == [0, int(dr.Status.NON_FINITE), 0]
    # Both are within the tolerance of the same minimum, whose curvature is at least mu (1 + alpha) / 2.
    assert relative(found.x[::2], wanted.x[::2]) <= 1e-2
