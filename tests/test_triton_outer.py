"""The weight gradients of `kernels/conv_chain/weight_gradients.py` against float64.

They run in Triton's interpreter, or on a GPU where there is one.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from .helpers import relative

pytest.importorskip("triton")

from deepreg_fast.kernels.conv_chain import weight_gradients

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True, scope="module")
def _larger_pieces() -> Iterator[None]:
    """The interpreter's time follows the number of pieces."""
    with pytest.MonkeyPatch.context() as patch:
        if DEVICE == "cpu":
            patch.setattr(weight_gradients, "TILE", (8, 16))
            patch.setattr(weight_gradients, "DOWN", 2)
        yield


def _taps(a: Tensor) -> Tensor:
    """`[9, B, H, W, ...]`, zeros outside, by slices of a padded copy."""
    height, width = a.shape[1:3]
    padded = a.new_zeros(len(a), height + 2, width + 2, *a.shape[3:])
    padded[:, 1:-1, 1:-1] = a
    return torch.stack([padded[:, t // 3 : t // 3 + height, t % 3 : t % 3 + width] for t in range(9)])


def _random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def _compare(ours: Tensor, exact: Tensor, torchs: Tensor) -> None:
    """At most twice the error of float32 torch; where that is lucky, an answer is still allowed its own rounding."""
    assert ours.dtype == torch.float64 and ours.shape == exact.shape
    assert relative(ours, exact) <= max(2.0 * relative(torchs.double(), exact), 2.0**-22)


@settings(max_examples=12)
@given(
    cp=st.sampled_from((16, 32, 64)),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 12), st.integers(1, 12)),
    ended=st.booleans(),
    both=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_against_float64(cp: int, shape: tuple[int, int, int], ended: bool, both: bool, seed: int) -> None:
    planes = [_random(*shape, cp, seed=seed + i) for i in range(4)]
    rows = torch.rand(shape[0], generator=torch.Generator().manual_seed(seed)).gt(0.5).to(DEVICE) if ended else None
    if rows is not None:
        for plane in planes:
            plane[~rows] = torch.nan  # what an ended image holds must not matter
    a, g, a2, g2 = planes
    image, image2 = a[..., 0].contiguous(), a2[..., 3].contiguous()
    everything = slice(None) if rows is None else rows

    def sums(formula: str, pairs: list[tuple[Tensor, Tensor]], dtype: torch.dtype) -> Tensor:
        at_work = [[t[everything].to(dtype) for t in pair] for pair in pairs]
        return torch.stack([torch.einsum(formula, _taps(p), q) for p, q in at_work]).sum(0)

    for ours, formula, first, second in (
        (weight_gradients.filters, "tbyxi,byxo->tio", (a, g), (a2, g2)),
        (weight_gradients.image_filters, "tbyx,byxo->to", (image, g), (image2, g2)),
    ):
        pairs = [first, second] if both else [first]
        exact, torchs = sums(formula, pairs, torch.float64), sums(formula, pairs, torch.float32)
        _compare(ours(*first, rows, second if both else None), exact, torchs)


@pytest.mark.parametrize("cp", [16, 32, 64])
def test_filters_are_those_of_autograd(cp: int) -> None:
    """The order of taps and channels, and the last convolution's flip, by torch's own convolution."""
    shape = (2, 7, 9)
    a, g, image = _random(*shape, cp, seed=1), _random(*shape, cp, seed=2), _random(*shape, seed=3)

    def gradient(source: Tensor, cotangent: Tensor) -> Tensor:
        w = torch.zeros(
            cotangent.shape[1], source.shape[1], 3, 3, dtype=torch.float64, device=DEVICE, requires_grad=True
        )
        return torch.autograd.grad(F.conv2d(source, w, padding=1), w, cotangent)[0]

    planes = [t.double().permute(0, 3, 1, 2) for t in (a, g)]
    one = image.double()[:, None]
    wanted = gradient(*planes).permute(2, 3, 1, 0).reshape(9, cp, cp)
    assert relative(weight_gradients.filters(a, g), wanted) <= 2.0**-20
    first = gradient(one, planes[1]).permute(2, 3, 1, 0).reshape(9, cp)
    assert relative(weight_gradients.image_filters(image, g), first) <= 2.0**-20
    last = gradient(planes[0], one).permute(2, 3, 0, 1).reshape(9, cp)
    assert relative(weight_gradients.image_filters(image, a).flip(0), last) <= 2.0**-20


def test_programs_that_take_several_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    a, g = _random(2, 14, 24, 16, seed=4), _random(2, 14, 24, 16, seed=5)
    monkeypatch.setattr(weight_gradients, "PROGRAMS", 16)
    monkeypatch.setattr(weight_gradients, "TILE", (2, 16))
    ours = weight_gradients.filters(a, g)
    exact = torch.einsum("tbyxi,byxo->tio", _taps(a.double()), g.double())
    assert relative(ours, exact) <= 2.0**-21
    assert torch.equal(ours, weight_gradients.filters(a, g)), "the same bits at every repetition"
