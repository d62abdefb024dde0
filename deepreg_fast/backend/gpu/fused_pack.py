"""A network's parameters in the layout of `csrc/cuda/conv_chain.cu`: filters as halves, vectors, scales."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...functional.conv_chain import ConvChainForm

CHANNELS, NUMBERS = 16, 24
_LOW, _HIGH = -60.0, 60.0
"""Bounds of the scales' exponents."""


@lru_cache(maxsize=8)
def _orders(device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Orders of entries: channels of a product's columns, rows and columns of a fragment, taps of a window.

    A thread has the columns 2 t, 2 t + 1, 8 + 2 t, 9 + 2 t of a pixel, and these are the channels 4 t .. 4 t + 3. A
    window is pairs of pixels: (dy, 0), (dy, 1) and (dy, 2), nothing (tap 9).
    """
    column, lane, register, pair = (torch.arange(n, dtype=torch.int64, device="cpu") for n in (16, 32, 4, 2))
    lane, register = lane[:, None], register[None]
    channel = 4 * (column % 8 // 2) + 2 * (column // 8) + column % 2
    k = (register % 2 * 8 + lane % 4 * 2)[..., None] + pair
    n = (register // 2 * 8 + lane // 4)[..., None].expand(32, 4, 2)
    taps = [0, 1, 2, 9, 3, 4, 5, 9, 6, 7, 8, 9, 9, 9, 9, 9]
    window = torch.tensor(taps, dtype=torch.int64, device="cpu")
    return channel.to(device), k.to(device), n.contiguous().to(device), window.to(device)


def _power(exponent: Tensor) -> Tensor:
    return torch.exp2(exponent.nan_to_num().clamp(_LOW, _HIGH))


def _up(w: Tensor) -> Tensor:
    """The power of two that puts the largest entry into [256, 512)."""
    return _power(9 - torch.frexp(w.abs().amax())[1].double())


def _fragments(matrices: Tensor, up: Tensor) -> Tensor:
    """`[..., 16, 16]` (k, n) as fragments of an mma's second operand, high and low halves; int32 `[..., 2, 32, 4]`."""
    scaled = matrices * up
    high = scaled.half()
    parts = torch.stack([high, (scaled - high.double()).half()], -3)
    _, k, n, _ = _orders(parts.device)
    return parts[..., k, n].contiguous().view(torch.int32).squeeze(-1)


def _rms(w: Tensor) -> Tensor:
    """Root mean square over channels of the filters' norms."""
    return w.square().flatten(1).sum(1).mean().sqrt()


def _guesses(w: list[Tensor], biases: list[Tensor], norms: list[tuple[Tensor, Tensor]], eps: float) -> Tensor:
    """Scales of a1', gu2', a2', gu1', and of a1, gu2, a2, gu1.

    They put a guess of the root mean square at 8, for images of about 0.3 and v of about 45.
    """
    u, v = 0.3, 45.0
    w1, w2, w2_back, w3 = (_rms(f) for f in (w[0], w[1], w[1].transpose(0, 1), w[2].transpose(0, 1)))
    rs1 = rs2 = torch.ones_like(w1)
    gain1 = gain2 = rs1
    size1 = ((w1 * u).square() + biases[0].square().mean()).sqrt()
    a1 = 0.5 * size1
    if norms:
        gain1, gain2 = (g.square().mean().sqrt() for g, _ in norms)
        rs1, a1 = gain1 * torch.rsqrt(size1.square() + eps), 0.5 * gain1
    size2 = ((w2 * a1).square() + biases[1].square().mean()).sqrt()
    a2 = 0.5 * size2
    if norms:
        rs2, a2 = gain2 * torch.rsqrt(size2.square() + eps), 0.5 * gain2
    c, c1 = 0.5 * w3 * u, 0.5 * w3 * v
    gu2 = rs2 * 0.6 * c
    gu1 = rs1 * 0.6 * w2_back * gu2
    a1_v = 0.6 * rs1 * w1 * v
    n2_v = rs2 * w2 * a1_v
    gu2_v = rs2 * (0.3 * c * n2_v + 0.6 * c1)
    gu1_v = rs1 * (0.3 * w2_back * gu2 * rs1 * w1 * v + 0.6 * w2_back * gu2_v)
    return _power(3 - torch.log2(torch.stack([a1_v, gu2_v, 0.6 * n2_v, gu1_v, a1, gu2, a2, gu1])).round())


def _by_window(taps: Tensor) -> Tensor:
    """Filters `[9, 16]` by the rows of a window."""
    return F.pad(taps, (0, 0, 0, 1))[_orders(taps.device)[3]]


def _by_tap(taps: Tensor) -> Tensor:
    """Filters `[9, 16]` from all columns to nine numbers."""
    return F.pad(taps.T, (0, 7))


def pack(form: ConvChainForm) -> Tensor:
    """A network's parameters in the kernel's layout, int32; PyTorch's operations, without synchronizing.

    Filters and biases before a LayerNorm are centered over their outputs, in float64.
    """
    net: Any = form.net
    w = [m.weight.detach().double().flatten(2) for m in net.convs]
    w[0], w[2] = w[0] * net.gain, w[2] / net.gain
    biases = [m.bias.detach().double() for m in net.convs][:2]
    if net.norm == "pixel":
        w[:2] = [f - f.mean(0, keepdim=True) for f in w[:2]]
        biases = [b - b.mean() for b in biases]
        gains = [(m.weight.detach().double(), m.bias.detach().double()) for m in net.norms]
    else:
        gains = []
    pad = CHANNELS - len(w[0])
    channel = _orders(w[0].device)[0]
    first, last = (F.pad(f, (0, 0, 0, pad))[channel].T for f in (w[0][:, 0], -0.5 * w[2][0]))  # [tap, column]
    inner = F.pad(w[1], (0, 0, 0, pad, 0, pad))[channel][:, channel].permute(2, 1, 0)  # [tap, in, out]
    ups = [_up(f) for f in (first, inner, last)]
    fragments = [
        _fragments(inner, ups[1]),
        _fragments(inner.flip(0).transpose(1, 2), ups[1]),
        _fragments(_by_window(first), ups[0]),
        _fragments(_by_window(last.flip(0)), ups[2]),
        _fragments(_by_tap(first.flip(0)), ups[0]),
        _fragments(_by_tap(last), ups[2]),
    ]
    none = (biases[0] * 0, biases[0] * 0)
    vectors = [F.pad(t, (0, pad)) for b, g in zip(biases, gains or [none] * 2, strict=True) for t in (b, *g)]
    guesses = _guesses(w, biases, gains, float(net.norms[0].eps) if gains else 0.0)
    last_bias = net.convs[2].bias.detach().double()[0] / net.gain
    numbers = torch.stack([1 / ups[0], 1 / ups[1], 1 / ups[2], ups[1], ups[2], last_bias, *guesses])
    floats = torch.cat([*vectors, F.pad(numbers, (0, NUMBERS - len(numbers)))]).float()
    return torch.cat([*(f.flatten() for f in fragments), floats.view(torch.int32)])
