"""Ridge regularizers: definition, convexity, and the C++ kernels against float64 on every instruction set."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import deepreg_fast as dr
from deepreg_fast.functional.ridge import nested_dct, scales_of
from deepreg_fast.training.build import regularizer_of

from .helpers import images, normal, relative
from .test_cpu_backend import _sets, compare

built = pytest.mark.skipif(
    dr.backends()["cpu"] is not None, reason=f"the C++ extension is not built: {dr.backends()['cpu']}"
)


@pytest.fixture(name="isa", params=_sets())
def _isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("DEEPREG_FAST_ISA", request.param)
    return request.param


@pytest.fixture(name="threads")
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def _random(seed: int = 0, **options: object) -> dr.Ridge:
    """A ridge regularizer with profiles that differ from filter to filter."""
    reg = dr.Ridge(**{"filters": 5, "kernel_size": 5, "scales": 3, **options}, seed=seed)  # type: ignore[arg-type]
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        reg.net.raw.add_(torch.randn(reg.net.raw.shape, generator=g))
    return reg


def _hessian(reg: dr.Ridge, x: torch.Tensor) -> torch.Tensor:
    """The Hessian at one image as a matrix."""
    unit = torch.eye(x.numel(), dtype=x.dtype).reshape(-1, *x.shape[1:])
    lin = reg.linearize(x.expand(len(unit), -1, -1, -1).contiguous())
    return lin.hvp(unit).flatten(1)


# -- the definition ----------------------------------------------------------------------------------------------------


def test_the_energy_is_what_the_docstring_says() -> None:
    """Against loops over pixels, taps and steps, the differences written out."""
    reg = _random(filters=2, kernel_size=3, scales=2).double()
    x = images(1, 1, 4, 5)
    w, c = (t.detach() for t in reg.net.numbers())
    wanted = 0.0
    for i in range(2):
        for p in range(4):
            for q in range(5):
                taps = [(a, b) for a in range(3) for b in range(3) if 0 <= p + a - 1 < 4 and 0 <= q + b - 1 < 5]
                t = sum(float(w[i, 0, a, b]) * (float(x[0, 0, p + a - 1, q + b - 1]) - 0.5) for a, b in taps)
                for k, s in enumerate(scales_of(2)):
                    wanted += float(c[i, k]) * (math.sqrt(1.0 + (s * t) ** 2) - 1.0) / s**2
    assert float(reg.energy(x).detach()) == pytest.approx(wanted, rel=1e-10)


@settings(max_examples=20)
@given(seed=st.integers(0, 1000), scales=st.integers(1, 5))
def test_convex_is_convex(seed: int, scales: int) -> None:
    reg = _random(seed, scales=scales).double()
    found = torch.linalg.eigvalsh(_hessian(reg, images(1, 1, 6, 7, seed=seed)))
    assert found.min() >= -1e-12 * found.max()
    assert torch.equal(reg.weak_convexity(), torch.zeros(5, dtype=torch.float64))


@settings(max_examples=20)
@given(seed=st.integers(0, 1000), scales=st.integers(2, 5))
def test_weakly_convex_is_bounded_below_and_in_curvature(seed: int, scales: int) -> None:
    reg = _random(seed, scales=scales, convex=False).double()
    w, c = (t.detach() for t in reg.net.numbers())
    t = torch.logspace(-5, 4, 2000, dtype=torch.float64)
    s = torch.tensor(scales_of(scales), dtype=torch.float64)
    root = (1.0 + (t[:, None] * s).square()).rsqrt()
    slope, bend = t[:, None] * root @ c.T, root**3 @ c.T
    assert slope.min() >= -1e-12, "profiles rise with the response: r >= 0 = r(center)"
    assert bool((bend >= -reg.weak_convexity() - 1e-12).all())
    x = images(1, 1, 6, 7, seed=seed)
    # All filters together as a matrix, from their responses to unit images.
    unit = torch.eye(42, dtype=torch.float64).reshape(42, 1, 6, 7)
    norm = torch.linalg.matrix_norm(torch.nn.functional.conv2d(unit, w, padding=2).flatten(1), 2)
    assert torch.linalg.eigvalsh(_hessian(reg, x)).min() >= -reg.weak_convexity().max() * norm**2 - 1e-12
    assert reg.energy(torch.full_like(x, reg.center)).eq(0).all() and reg.energy(x).ge(0).all()


def test_some_weakly_convex_profile_bends_down() -> None:
    reg = _random(convex=False).double()
    with torch.no_grad():
        reg.net.raw.copy_(torch.tensor([-5.0, 3.0, -5.0]))  # the middle step alone, which lets go
    assert torch.linalg.eigvalsh(_hessian(reg, 0.5 + 0.2 * images(1, 1, 6, 7))).min() < -0.01


def test_both_kinds_start_as_one_convex_energy() -> None:
    x = images(2, 1, 12, 12, dtype=torch.float32)
    convex, weakly = dr.Ridge(8, 5), dr.Ridge(8, 5, convex=False)
    assert relative(weakly.value_and_grad(x)[0], convex.value_and_grad(x)[0]) <= 1e-6
    assert weakly.weak_convexity().max() <= 1e-6


def test_constants_are_not_seen_inside() -> None:
    x = images(1, 1, 20, 20)
    for zero_mean, seen in ((True, False), (False, True)):
        reg = _random(zero_mean=zero_mean).double()
        moved = reg.value_and_grad(x + 0.1)[1] - reg.value_and_grad(x)[1]
        assert (moved[..., 4:-4, 4:-4].abs().max() > 1e-9) == seen


def test_the_first_filters_are_orthonormal_bases() -> None:
    w = nested_dct(32, 5).flatten(1)
    for part in (w[:8], w[8:]):
        assert torch.allclose(part @ part.T, torch.eye(len(part)), atol=1e-6)
    assert w.sum(1).abs().max() <= 1e-6
    assert torch.equal(nested_dct(11, 3)[8:], nested_dct(3, 3))


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"filters": 0}, "filters"),
        ({"kernel_size": 4}, "odd"),
        ({"kernel_size": 1}, "kernel_size"),
        ({"scales": 9}, "scales"),
        ({"center": math.nan}, "center"),
    ],
)
def test_what_it_refuses(options: dict[str, float], word: str) -> None:
    with pytest.raises(dr.errors.InputError, match=word):
        dr.Ridge(**options)  # type: ignore[arg-type]


def test_colour_images_are_refused_by_name() -> None:
    with pytest.raises(dr.errors.InputError, match=r"\[B, 1, H, W\]"):
        dr.Ridge(2, 3).value_and_grad(images(1, 3, 8, 8, dtype=torch.float32))


def test_the_settings_name_it() -> None:
    c = dr.BilevelConfig(regularizer="ridge", filters=3, scales=2, convex=False)
    found = regularizer_of(c)
    assert found.describe() == dr.Ridge(3, 9, 2, False).describe()
    assert regularizer_of(replace(c, kernel_size=5)).describe()["kernel_size"] == 5
    assert regularizer_of(dr.BilevelConfig()).describe() == dr.RED().describe()
    assert regularizer_of(dr.BilevelConfig(kernel_size=5)).describe() == dr.RED(kernel_size=5).describe()
    for wrong in ({"regularizer": "tv"}, {"alpha": 0.1}, {"kernel_size": 1}, {"kernel_size": 4}, {"scales": 9}):
        with pytest.raises(dr.errors.InputError, match=next(iter(wrong))):
            replace(c, **wrong)


def test_it_trains_and_keeps_its_kind(folder: Path, tmp_path: Path) -> None:
    c = dr.BilevelConfig(
        data=str(folder),
        out=str(tmp_path / "run"),
        regularizer="ridge",
        filters=4,
        kernel_size=3,
        convex=False,
        beta=0.0,
        crop=16,
        validation=2,
        validation_crop=16,
        validate_every=0,
        steps=12,
        warmup=2,
        batch=4,
        lr=1e-2,
    )
    run = dr.BilevelTrainer(c, progress=False)
    before = copy.deepcopy(run.reg.state_dict())
    run.fit()
    reg, _ = dr.load(tmp_path / "run" / "weights.safetensors")
    assert isinstance(reg, dr.Ridge) and reg.describe() == run.reg.describe()
    for name, value in reg.state_dict().items():
        assert torch.isfinite(value).all() and not torch.equal(value, before[name])


# -- the kernels -------------------------------------------------------------------------------------------------------


def _answers(reg: dr.Ridge, x: torch.Tensor, v: torch.Tensor, backend: str) -> dict[str, torch.Tensor]:
    """Everything that a backend computes, by name, an image (of parameters: a part of the batch) a row.

    A parameter may be one or two numbers, whose error is luck: over nine draws the medians of two equally exact
    arithmetics may differ twofold. The fewer the numbers, the more draws, in smaller parts and in more directions.
    """
    fewest = min(p.numel() for p in reg.parameters() if p.requires_grad)
    draws = min(100, max(9, 200 // fewest))
    directions = 1 if draws == 9 else -(-draws // min(draws, len(x)))
    with dr.use_backend(backend):
        value, grad = reg.value_and_grad(x)
        lin = reg.linearize(x)
        thetas = []
        for part, direction in zip(x.chunk(draws), v.chunk(draws), strict=True):
            kept = reg.linearize(part)
            for shift in range(directions):
                thetas.append(kept.param_vjp(direction.flatten(1).roll(shift, 1).view_as(part) if shift else direction))
                assert list(thetas[-1]) == [n for n, p in reg.named_parameters() if p.requires_grad]
        theta = {n: torch.stack([t[n] for t in thetas]) for n in thetas[0]}
        return {"value": value, "grad": grad, "kept": lin.grad, "kept value": lin.value, "hvp": lin.hvp(v), **theta}


@built
@settings(max_examples=15)
@given(
    filters=st.integers(1, 19),
    side=st.sampled_from(range(3, 16, 2)),
    scales=st.integers(1, 5),
    size=st.tuples(st.integers(1, 40), st.integers(1, 60)),
    convex=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_against_float64(filters: int, side: int, scales: int, size: tuple[int, int], convex: bool, seed: int) -> None:
    shape = (max(9, 2000 // (size[0] * size[1])), 1, *size)
    reg = _random(seed, filters=filters, kernel_size=side, scales=scales, convex=convex)
    compare(_answers, reg, images(*shape, seed=seed, dtype=torch.float32), normal(*shape, seed=seed).float())


@built
def test_natural_contrast() -> None:
    """Differences of pixels far below their values, where responses lose digits."""
    x = 0.7 + 0.02 * images(1, 1, 90, 101, dtype=torch.float32)
    compare(_answers, _random(filters=9, kernel_size=7, scales=4), x, normal(1, 1, 90, 101).float())


@built
def test_neither_neighbours_nor_threads_change_the_bits(isa: str, threads: None) -> None:
    reg = _random(filters=9)
    x, v = images(3, 1, 90, 31, dtype=torch.float32), normal(3, 1, 90, 31).float()
    torch.set_num_threads(1)
    one = _answers(reg, x, v, "cpu")
    for count in (2, 3):
        torch.set_num_threads(count)
        many = _answers(reg, x, v, "cpu")
        assert all(torch.equal(one[k], many[k]) for k in one)
    whole = ("value", "grad", "kept", "hvp")
    for i in range(3):
        alone = _answers(reg, x[i : i + 1], v[i : i + 1], "cpu")
        assert all(torch.equal(alone[k][0], one[k][i]) for k in whole)
    poisoned = x.clone()
    poisoned[1, 0, 5, 5] = torch.nan
    beside = _answers(reg, poisoned, v, "cpu")
    assert all(torch.equal(beside[k][[0, 2]], one[k][[0, 2]]) for k in whole)
    assert bool(torch.isnan(beside["value"][1])) and bool(torch.isnan(beside["grad"][1]).any())


@built
def test_huge_images_stay_finite(isa: str) -> None:
    reg = _random()
    x = 1e17 * images(1, 1, 12, 20, dtype=torch.float32)
    grad = reg.value_and_grad(x)[1]
    with dr.use_backend("reference"):
        wanted = reg.double().value_and_grad(x.double())[1]
    assert relative(grad.double(), wanted) <= 1e-5


def _recovered() -> tuple[dr.Ridge, torch.Tensor, dr.Hypergradient]:
    """A regularizer, images, and their recovery with its hypergradient."""
    reg, A = _random(filters=8), dr.SRM((1, 32, 32), 0.3)
    x = images(2, 1, 32, 32, dtype=torch.float32)
    return reg, x, dr.hypergradient(x, A.A(x), A, reg, 0.1, options=dr.PGDOptions(400, 1e-5, "anderson"))


@pytest.fixture(name="slow", scope="module")
def _slow() -> dr.Hypergradient:
    with dr.use_backend("reference"):
        return _recovered()[2]


@built
def test_recovery_is_that_of_the_reference(isa: str, slow: dr.Hypergradient) -> None:
    reg, x, fast = _recovered()
    assert dr.backend.select(reg, x).name == "cpu"
    assert fast.solution.status.eq(0).all() and (fast.solution.x - slow.solution.x).abs().max() <= 1e-3
    for k, g in slow.theta.items():
        assert relative(fast.theta[k], g) <= 1e-2


@built
def test_layouts_and_frozen_parameters(isa: str) -> None:
    reg = _random()
    reg.net.filters.requires_grad_(False)
    x, v = images(2, 1, 12, 20, dtype=torch.float32), normal(2, 1, 12, 20).float()
    wanted = _answers(reg, x, v, "cpu")
    assert "net.filters" not in wanted
    for change in (
        lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
        lambda t: torch.cat([t.flatten().new_zeros(1), t.flatten()])[1:].view_as(t),
        lambda t: t.clone().requires_grad_(),
    ):
        found = _answers(reg, change(x), change(v), "cpu")
        assert all(torch.equal(found[k], wanted[k]) for k in wanted)
    reg.net.raw.requires_grad_(False)
    assert reg.linearize(x).param_vjp(v) == {}


@built
def test_changed_parameters_are_seen() -> None:
    reg, x = _random(), images(1, 1, 8, 8, dtype=torch.float32)
    lin = reg.linearize(x)
    with torch.no_grad():
        reg.net.raw.add_(1.0)
    with pytest.raises(dr.errors.InputError, match="linearize"):
        lin.hvp(x)
    moved = reg.value_and_grad(x)[1]
    with dr.use_backend("reference"):
        assert relative(moved, reg.value_and_grad(x)[1]) <= 1e-5


class Twisted(dr.Ridge):
    """Computes something else than its base class."""

    def energy(self, x: torch.Tensor) -> torch.Tensor:
        return 2.0 * super().energy(x)


@built
@pytest.mark.parametrize(
    ("reg", "dtype", "word"),
    [
        (Twisted(2, 3), torch.float32, "Ridge and TV only"),
        (dr.Ridge(2, 3), torch.float64, "float64"),
        (dr.Ridge(2, 17), torch.float32, "17 x 17"),
    ],
)
def test_what_it_leaves_to_the_reference(reg: dr.Ridge, dtype: torch.dtype, word: str) -> None:
    reg, x = reg.to(dtype), images(2, 1, 9, 9, dtype=dtype)
    with dr.use_backend("cpu"), pytest.raises(dr.errors.BackendUnavailable, match=word):
        reg.value_and_grad(x)
    assert dr.backend.select(reg, x).name == "reference" and reg.value_and_grad(x)[1].shape == x.shape
