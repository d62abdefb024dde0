"""The Triton sweeps with a LayerNorm over the image, against float64: at most twice torch's own float32 error.

In Triton's interpreter, or on the GPU that is there.
"""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import deepreg_fast as dr
from deepreg_fast.backend import active_images

from .helpers import assert_as_exact_as_torch, images, normal, random_red, relative

pytest.importorskip("triton")

from deepreg_fast.backend.gpu import conv_chain
from deepreg_fast.backend.gpu.chain_options import ChainOptions
from deepreg_fast.backend.gpu.image_norm import WholeSweeps
from deepreg_fast.kernels.conv_chain import image_norm, weight_gradients

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter's time follows the number of programs.
ONE_TILE, SEVERAL = ChainOptions(tile=(16, 32, 4)), ChainOptions(tile=(8, 16, 4))


@pytest.fixture(autouse=True)
def _large_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE == "cpu":
        monkeypatch.setattr(weight_gradients, "TILE", (16, 32))
        monkeypatch.setattr(weight_gradients, "DOWN", 1)


def _answers(reg: dr.RED, x: Tensor, v: Tensor, options: ChainOptions = ONE_TILE) -> dict[str, Tensor]:
    """Everything that the sweeps compute, by name."""
    form = copy.deepcopy(reg).to(DEVICE).kernel_form()
    assert form is not None
    sweeps = WholeSweeps(form, x.to(DEVICE), options)
    kept = sweeps.allocate_saved()
    value, grad = sweeps.gradient(kept)
    theta = torch.cat([p.flatten() for p in sweeps.parameters(kept, v.to(DEVICE))])[None]
    found = {"value": value, "grad": grad, "hvp": sweeps.product(kept, v.to(DEVICE)), "theta": theta}
    return {name: t.cpu() for name, t in found.items()}


def _reference(reg: dr.RED, x: Tensor, v: Tensor) -> dict[str, Tensor]:
    with dr.use_backend("reference"):
        value, grad = reg.value_and_grad(x)
        lin = reg.linearize(x)
        found = lin.param_vjp(v)
        # Convolutions before LayerNorms, as they lie in the network.
        theta = torch.cat([found[name].flatten() for name, _ in reg.named_parameters()])[None]
        return {"value": value, "grad": grad, "hvp": lin.hvp(v), "theta": theta}


def _compare(reg: dr.RED, x: Tensor, v: Tensor, options: ChainOptions = ONE_TILE) -> None:
    exact = _reference(copy.deepcopy(reg).double(), x.double(), v.double())
    assert_as_exact_as_torch(_answers(reg, x, v, options), _reference(reg, x, v), exact)


@settings(max_examples=4)
@given(
    channels=st.sampled_from((1, 3, 16, 17)),
    depth=st.integers(2, 3),
    head=st.sampled_from(("red", "residual", "norm")),
    # A ratio of two rounding errors needs many of them.
    size=st.tuples(st.integers(3, 16), st.integers(20, 32)),
    seed=st.integers(0, 1000),
)
def test_against_float64(channels: int, depth: int, head: str, size: tuple[int, int], seed: int) -> None:
    scale = 0.15 * min(1.0, (16 / channels) ** 0.5)
    options = {"channels": channels, "depth": depth, "head": head, "norm": "image", "alpha": 0.1}
    reg = random_red(seed, scale, double=False, **options)
    _compare(reg, images(2, 1, *size, seed=seed, dtype=torch.float32), normal(2, 1, *size, seed=seed).float())


def test_several_tiles_and_a_far_mean() -> None:
    """The mean of u is large against its deviation: a difference of sums of squares would lose the variance."""
    reg = random_red(3, double=False, channels=16, norm="image")
    with torch.no_grad():
        for conv in list(reg.net.convs)[:-1]:
            conv.bias.add_(30.0)  # type: ignore[operator,union-attr]
    _compare(reg, images(2, 1, 10, 20, dtype=torch.float32), normal(2, 1, 10, 20).float(), SEVERAL)


def test_64_channels() -> None:
    reg = random_red(2, 0.07, double=False, channels=40, norm="image")
    _compare(reg, images(1, 1, 12, 20, dtype=torch.float32), normal(1, 1, 12, 20).float())


def test_neither_neighbours_nor_ended_images_change_the_bits() -> None:
    reg = random_red(1, double=False, channels=8, norm="image")
    x, v = images(2, 1, 7, 14, dtype=torch.float32), normal(2, 1, 7, 14).float()
    x[0, 0, 4, 5] = torch.nan
    together, without = _answers(reg, x, v, SEVERAL), _answers(reg, x[1:], v[1:], SEVERAL)
    with active_images(torch.tensor([False, True], device=DEVICE)):
        ended = _answers_in_poisoned_memory(reg, x, v)
    for name in ("value", "grad", "hvp"):
        assert torch.equal(together[name][1:], without[name]), name
        assert torch.equal(ended[name][1:], without[name]), name
    assert bool(torch.isnan(together["value"][0])) and bool(torch.isnan(together["theta"]).any())
    assert bool(torch.isnan(ended["grad"][0]).all()), "what is not at work is left as it was"
    assert relative(ended["theta"], without["theta"]) <= 1e-6


def test_parts_of_the_batch_change_no_bit() -> None:
    reg = random_red(1, double=False, channels=8, depth=2, norm="image")
    x, v = images(2, 1, 9, 14, dtype=torch.float32), normal(2, 1, 9, 14).float()
    whole_batch, one_by_one = _answers(reg, x, v), _answers(reg, x, v, ChainOptions(plane_bytes=1, tile=ONE_TILE.tile))
    assert all(torch.equal(whole_batch[name], one_by_one[name]) for name in ("value", "grad", "hvp"))
    assert relative(one_by_one["theta"], whole_batch["theta"]) <= 1e-6


def _poisoned(t: Tensor) -> Tensor:
    return t.fill_(torch.nan) if t.is_floating_point() else t


def _answers_in_poisoned_memory(reg: dr.RED, x: Tensor, v: Tensor) -> dict[str, Tensor]:
    """Where new memory holds NaN, so that what is left undefined shows if it is read."""
    fresh = torch.Tensor.new_empty
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "new_empty", lambda *a, **k: _poisoned(fresh(*a, **k)))
        patch.setattr(torch, "empty_like", lambda t: _poisoned(torch.zeros_like(t)))
        return _answers(reg, x, v, SEVERAL)


def test_the_linearization_is_made_of_these_sweeps() -> None:
    reg = random_red(1, double=False, channels=3, depth=2, norm="image").to(DEVICE)
    x, v = images(1, 1, 6, 7, dtype=torch.float32).to(DEVICE), normal(1, 1, 6, 7).float().to(DEVICE)
    form = reg.kernel_form()
    assert form is not None and conv_chain.unsupported_reason(form, x) is None
    lin = conv_chain.GpuLinearization(reg, form, x)
    with dr.use_backend("reference"):
        wanted = reg.linearize(x)
    assert relative(lin.hvp(v), wanted.hvp(v)) <= 1e-5 and relative(lin.grad, wanted.grad) <= 1e-5
    found, theirs = lin.param_vjp(v), wanted.param_vjp(v)
    assert list(found) == list(theirs)
    assert all(relative(found[name], theirs[name]) <= 1e-5 for name in theirs)
    assert torch.equal(conv_chain.value_and_grad(form, x)[1], lin.grad)


def test_tiles_are_those_that_are_compiled() -> None:
    """What the launches use without options is what `variants()` lists."""
    compiled = {
        tuple(v.constexprs[n] for n in ("CP", "TH", "TW")) for v in image_norm.variants() if "TH" in v.constexprs
    }
    assert compiled == {(cp, th, tw) for cp, (th, tw, _) in image_norm.TILES.items()}
