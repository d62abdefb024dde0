"""The Triton sweeps of the conv chain against float64: at most twice torch's own float32 error.

In Triton's interpreter, or on the GPU that is there.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

import deepreg_fast as dr
from deepreg_fast.backend import active_images

from .helpers import EPS, assert_as_exact_as_torch, images, normal, random_red, relative

pytest.importorskip("triton")

import triton
import triton.language as tl

from deepreg_fast.backend.gpu import conv_chain as gpu_chain
from deepreg_fast.backend.gpu import memory
from deepreg_fast.backend.gpu.chain_options import ChainOptions
from deepreg_fast.backend.gpu.conv_chain import GpuLinearization
from deepreg_fast.kernels.conv_chain import pixel_norm as conv_chain
from deepreg_fast.kernels.conv_chain import tiles, weight_gradients

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter's time follows the number of programs.
ONE_TILE, SEVERAL = ChainOptions(tile=(16, 32, 4)), ChainOptions(tile=(8, 16, 4))


@pytest.fixture(autouse=True)
def _large_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE == "cpu":
        monkeypatch.setattr(weight_gradients, "TILE", (16, 32))
        monkeypatch.setattr(weight_gradients, "DOWN", 1)


def _flat(theta: dict[str, Tensor]) -> Tensor:
    return torch.cat([g.flatten() for g in theta.values()])[None]


def _answers(reg: dr.RED, x: Tensor, v: Tensor, options: ChainOptions = ONE_TILE) -> dict[str, Tensor]:
    """Everything that the kernels compute, by name, an image a row."""
    reg, x, v = copy.deepcopy(reg).to(DEVICE), x.to(DEVICE), v.to(DEVICE)
    form = reg.kernel_form()
    assert form is not None and gpu_chain.unsupported_reason(form, x) is None
    value, grad = gpu_chain.value_and_grad(form, x, options)
    lin = GpuLinearization(reg, form, x, options)
    theta = lin.param_vjp(v)
    assert list(theta) == [n for n, p in reg.named_parameters() if p.requires_grad]
    found = {"value": value, "grad": grad, "kept": lin.grad, "hvp": lin.hvp(v), "theta": _flat(theta)}
    return {name: t.cpu() for name, t in found.items()}


def _reference(reg: dr.RED, x: Tensor, v: Tensor) -> dict[str, Tensor]:
    with dr.use_backend("reference"):
        lin = reg.linearize(x)
        grad = lin.grad
        return {"value": lin.value, "grad": grad, "kept": grad, "hvp": lin.hvp(v), "theta": _flat(lin.param_vjp(v))}


def _compare(reg: dr.RED, x: Tensor, v: Tensor, options: ChainOptions = ONE_TILE) -> None:
    exact = _reference(copy.deepcopy(reg).double(), x.double(), v.double())
    assert_as_exact_as_torch(_answers(reg, x, v, options), _reference(reg, x, v), exact)


def _random(seed: int = 1, **options: object) -> dr.RED:
    channels = int(str(options.setdefault("channels", 8)))
    return random_red(seed, 0.15 * min(1.0, (16 / channels) ** 0.5), double=False, alpha=0.1, **options)


@settings(max_examples=2)
@given(
    channels=st.sampled_from((1, 3, 16, 17, 33)),
    depth=st.integers(2, 4),
    head=st.sampled_from(("red", "residual", "norm")),
    norm=st.sampled_from(("none", "pixel")),
    # A ratio of two rounding errors needs many of them.
    size=st.tuples(st.integers(3, 16), st.integers(20, 32)),
    seed=st.integers(0, 1000),
)
@example(channels=64, depth=3, head="red", norm="pixel", size=(11, 21), seed=1)
@example(channels=16, depth=2, head="red", norm="pixel", size=(16, 32), seed=2)
@example(channels=5, depth=4, head="residual", norm="none", size=(3, 31), seed=3)
def test_against_float64(channels: int, depth: int, head: str, norm: str, size: tuple[int, int], seed: int) -> None:
    reg = _random(seed, channels=channels, depth=depth, head=head, norm=norm)
    _compare(reg, images(1, 1, *size, seed=seed, dtype=torch.float32), normal(1, 1, *size, seed=seed).float())


@triton.jit
def _silu(n, value, slope, bend, N: tl.constexpr):
    at = tl.arange(0, N)
    a, b, c = tiles.silu(tl.load(n + at))
    tl.store(value + at, a)
    tl.store(slope + at, b)
    tl.store(bend + at, c)


def _silu_of(n: Tensor) -> list[Tensor]:
    """SiLU and its two derivatives, of 1024 numbers, by the kernels' function."""
    n = n.to(DEVICE)
    found = [torch.empty_like(n) for _ in range(3)]
    _silu[(1,)](n, *found, N=1024)  # type: ignore[index]
    return [t.cpu() for t in found]


def _silu_in_torch(n: Tensor) -> list[Tensor]:
    n = n.requires_grad_()
    value = F.silu(n)
    (slope,) = torch.autograd.grad(value.sum(), n, create_graph=True)
    (bend,) = torch.autograd.grad(slope.sum(), n)
    return [value.detach(), slope.detach(), bend]


@pytest.mark.parametrize("reach", [0.01, 1.0, 12.0, 200.0])
def test_silu_against_float64(reach: float) -> None:
    """The largest error beside the largest value, which is how it goes on into sums."""
    n = (normal(1024) * reach).float()
    for ours, exact, torchs in zip(_silu_of(n), _silu_in_torch(n.double()), _silu_in_torch(n), strict=True):
        error, theirs = ((t.double() - exact).abs().max() / exact.abs().max() for t in (ours, torchs))
        assert error <= 2.0 * theirs, (error, theirs)


def test_silu_where_the_exponential_leaves_the_number_range() -> None:
    n = torch.full((1024,), 0.5)
    n[:12] = torch.tensor([88.0, 89.0, 104.0, -86.0, -87.5, -88.5, -89.0, -104.0, 3e38, -3e38, 0.0, -0.0])
    value, slope, bend = _silu_of(n)
    assert torch.equal(value[:3], n[:3]) and bool((value[3:8].abs() < 1e-35).all())
    assert value[8:12].tolist() == [n[8].item(), 0.0, 0.0, 0.0]
    assert slope[:12].tolist() == pytest.approx([1.0] * 3 + [0.0] * 5 + [1.0, 0.0, 0.5, 0.5], abs=1e-35)
    assert bend[:12].tolist() == pytest.approx([0.0] * 10 + [0.5, 0.5], abs=1e-35)
    n[:3] = torch.tensor([torch.inf, -torch.inf, torch.nan])
    for ours, torchs in zip(_silu_of(n), _silu_in_torch(n), strict=True):
        torch.testing.assert_close(ours[:3], torchs[:3], rtol=0.0, atol=0.0, equal_nan=True)


def test_several_tiles() -> None:
    _compare(_random(norm="pixel"), images(1, 1, 9, 18, dtype=torch.float32), normal(1, 1, 9, 18).float(), SEVERAL)


@contextmanager
def _poison() -> Iterator[None]:
    """New memory holds NaN, so that what is left undefined shows if it is read."""

    def poisoned(t: Tensor) -> Tensor:
        return t.fill_(torch.nan) if t.is_floating_point() else t

    fresh = torch.Tensor.new_empty
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "new_empty", lambda *a, **k: poisoned(fresh(*a, **k)))
        patch.setattr(torch, "empty_like", lambda t: poisoned(torch.zeros_like(t)))
        yield


@pytest.mark.parametrize(
    ("head", "depth", "size"),
    [
        ("red", 3, (7, 14)),
        ("residual", 2, (7, 14)),
        pytest.param("red", 4, (9, 14), marks=pytest.mark.long),
        pytest.param("residual", 3, (9, 14), marks=pytest.mark.long),
    ],
)
def test_neither_neighbours_nor_parts_of_the_batch_nor_ended_images_change_the_bits(
    head: str, depth: int, size: tuple[int, int]
) -> None:
    reg = _random(norm="pixel", channels=5, depth=depth, head=head)
    x, v = images(2, 1, *size, dtype=torch.float32), normal(2, 1, *size).float()
    x[0, 0, 4, 5] = torch.nan
    together = _answers(reg, x, v, SEVERAL)
    parted = _answers(reg, x, v, ChainOptions(plane_bytes=size[0] * size[1] * 16 * 4, tile=SEVERAL.tile))
    with active_images(torch.tensor([False, True], device=DEVICE)), _poison():
        ended = _answers(reg, x, v, SEVERAL)
    without = _answers(reg, x[1:], v[1:], SEVERAL)
    for name in ("value", "grad", "kept", "hvp"):
        for found in (together, parted, ended):
            assert torch.equal(found[name][1:], without[name]), name
        assert bool(torch.isnan(together[name][0]).any()), name
        assert bool(torch.isnan(ended[name][0]).all()), "what is not at work is left as it was"
    assert bool(torch.isnan(together["theta"]).any())
    assert relative(ended["theta"], without["theta"]) <= 4.0 * EPS


def test_layouts_frozen_parameters_and_an_empty_batch() -> None:
    reg = _random(channels=3)
    reg.net.convs[1].weight.requires_grad_(False)  # type: ignore[union-attr]
    x, v = images(2, 1, 6, 10, dtype=torch.float32), normal(2, 1, 6, 10).float()
    wanted = _answers(reg, x, v, SEVERAL)

    def strided(t: Tensor) -> Tensor:
        return t.transpose(2, 3).contiguous().transpose(2, 3).requires_grad_()

    found = _answers(reg, strided(x), strided(v), SEVERAL)
    assert all(torch.equal(found[k], wanted[k]) for k in wanted)
    empty = _answers(reg, x[:0], v[:0])
    assert empty["grad"].shape == empty["hvp"].shape == (0, 1, 6, 10) and bool((empty["theta"] == 0.0).all())


def test_other_precisions_are_the_same_in_float32_arithmetic() -> None:
    """The interpreter does not round to tf32; a GPU does."""
    reg, x, v = _random(channels=3), images(1, 1, 6, 10, dtype=torch.float32), normal(1, 1, 6, 10).float()
    wanted = _answers(reg, x, v)
    for precision in ("ieee", "tf32"):
        found = _answers(reg, x, v, ChainOptions(precision, tile=ONE_TILE.tile))
        bound = 1e-5 if DEVICE == "cpu" or precision == "ieee" else 1e-2
        assert all(relative(found[k], wanted[k]) <= bound for k in wanted), precision


def test_a_layernorm_over_the_image_has_sweeps_of_its_own() -> None:
    _compare(_random(norm="image"), images(1, 1, 12, 20, dtype=torch.float32), normal(1, 1, 12, 20).float())


def test_parameters_may_not_change_under_a_linearization() -> None:
    reg, x = _random(channels=2, depth=2).to(DEVICE), images(1, 1, 4, 5, dtype=torch.float32).to(DEVICE)
    form = reg.kernel_form()
    assert form is not None
    lin = GpuLinearization(reg, form, x, ONE_TILE)
    with pytest.raises(dr.errors.InputError, match="shape"):
        lin.hvp(x[..., :4])
    with torch.no_grad():
        next(reg.parameters()).add_(1.0)
    with pytest.raises(dr.errors.InputError, match="linearize"):
        lin.param_vjp(x)
    moved = gpu_chain.value_and_grad(form, x, ONE_TILE)[1]
    with dr.use_backend("reference"):
        assert relative(moved, reg.value_and_grad(x)[1]) <= 1e-5


@pytest.mark.parametrize(
    ("options", "shape", "word"),
    [
        ({"kernel_size": 5}, (9, 9), "5 x 5"),
        ({"image_channels": 3}, (9, 9), "3 and 2"),
        ({"channels": 65}, (9, 9), "65"),
        ({}, (2, 9), "smaller"),
        ({}, (6000, 6000), "6000 x 6000"),
        ({"norm": "image", "norm_place": "after"}, (9, 9), "stands after"),
    ],
)
def test_what_it_leaves_to_the_reference(options: dict[str, Any], shape: tuple[int, int], word: str) -> None:
    form = dr.RED(**{"channels": 2, **options}).kernel_form()  # type: ignore[arg-type]
    assert form is not None
    reason = gpu_chain.unsupported_reason(
        form, torch.empty(1, 1, 1, 1).expand(1, options.get("image_channels", 1), *shape)
    )
    assert reason is not None and word in reason


@pytest.mark.parametrize("call", ["gradient", "linearization"])
def test_a_lack_of_memory_is_a_sentence(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reg, x = _random(channels=2).to(DEVICE), images(2, 1, 512, 512, dtype=torch.float32).to(DEVICE)
    form = reg.kernel_form()
    assert form is not None
    fresh = torch.Tensor.new_empty

    def full(self: Tensor, *shape: object, **options: object) -> Tensor:
        if len(shape) == 4:
            raise torch.OutOfMemoryError("full")
        return fresh(self, *shape, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(torch.Tensor, "new_empty", full)
    monkeypatch.setattr(memory, "_free", lambda device: 7 << 20)
    # Two planes of 2 x 512 x 512 pixels and 16 channels are 64 MiB; a sweep has one more and 19 images.
    needed = {"linearization": "64 MiB", "gradient": "102 MiB"}[call]
    with pytest.raises(dr.errors.OutOfMemory, match=f"needs {needed} .* 7 MiB are free; use a smaller batch"):
        if call == "gradient":
            gpu_chain.value_and_grad(form, x)
        else:
            GpuLinearization(reg, form, x)


def test_tiles_are_those_that_are_compiled() -> None:
    """What the launches use without options is what `variants()` lists."""
    listed = [v for v in conv_chain.variants() if "PRECISION" in v.constexprs]
    compiled = {(v.constexprs["CP"], v.constexprs["TH"], v.constexprs["TW"], v.num_warps) for v in listed}
    assert compiled == {(cp, *tile) for cp, tile in conv_chain.TILES.items()}
    assert {v.constexprs["PRECISION"] for v in listed} == {ChainOptions().precision}


@pytest.mark.parametrize("norm", ["none", "pixel", "image"])
def test_planes_in_bfloat16_cost_digits_and_no_more(norm: str) -> None:
    reg = _random(channels=16, norm=norm)
    x, v = images(1, 1, 12, 16, dtype=torch.float32), normal(1, 1, 12, 16).float()
    exact = _reference(copy.deepcopy(reg).double(), x.double(), v.double())
    ours = _answers(reg, x, v, ChainOptions(tile=(16, 32, 4), storage="bfloat16"))
    for name in ("grad", "hvp", "theta"):
        # Half a unit in the last place is 2^-9, and a number passes through a handful of planes.
        assert 2.0**-14 < relative(ours[name].double(), exact[name]) <= 2.0**-6, name


def test_options_that_there_are_not() -> None:
    for wrong in ({"precision": "fp8"}, {"storage": "float16"}):
        with pytest.raises(dr.errors.InputError, match="must be one of"), dr.gpu_options(**wrong):
            pass
