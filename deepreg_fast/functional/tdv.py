"""The network of the total deep variation (Kobler, Effland, Kunisch, Pock 2020): small U-nets in a row."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn


def symmetric(size: int, pad: int, device: torch.device) -> torch.Tensor:
    """Indices that extend an axis by `pad` on both sides by reflection about the edges, the edge pixels repeated."""
    i = torch.arange(-pad, size + pad, dtype=torch.int64, device=device) % (2 * size)
    return torch.where(i < size, i, 2 * size - 1 - i)


def extend(x: torch.Tensor, pad: int, mirrored: bool) -> torch.Tensor:
    """`x` with a border of `pad` pixels, zeros or mirrored."""
    if not mirrored:
        return F.pad(x, [pad] * 4)
    x = x.index_select(-2, symmetric(x.shape[-2], pad, x.device))
    return x.index_select(-1, symmetric(x.shape[-1], pad, x.device))


def fold(x: torch.Tensor, pad: int, mirrored: bool) -> torch.Tensor:
    """The transpose of `extend`."""
    h, w = x.shape[-2] - 2 * pad, x.shape[-1] - 2 * pad
    if not mirrored:
        return x[..., pad : pad + h, pad : pad + w]
    rows, columns = symmetric(h, pad, x.device), symmetric(w, pad, x.device)
    x = x.new_zeros(*x.shape[:-2], h, x.shape[-1]).index_add(-2, rows, x)
    return x.new_zeros(*x.shape[:-1], w).index_add(-1, columns, x)


def softplus(x: torch.Tensor) -> torch.Tensor:
    """`log(1 + e^x) - log 2`."""
    return F.softplus(x) - math.log(2.0)


def student(x: torch.Tensor) -> torch.Tensor:
    """`1/2 log(1 + x^2)`."""
    return 0.5 * torch.log1p(x.square())


def weight(shape: tuple[int, int, int], g: torch.Generator) -> nn.Parameter:
    """Filters `[out, in, k, k]` with normal entries of variance `1/(in k^2)`."""
    out, into, k = shape
    entries = torch.randn(out, into, k, k, generator=g, dtype=torch.float32, device="cpu")
    return nn.Parameter(entries / math.sqrt(into * k * k))


def blurred(w: torch.Tensor) -> torch.Tensor:
    """The filters convolved with the 5 x 5 binomial kernel: `[.., .., 7, 7]` for 3 x 3 filters."""
    row = w.new_tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16.0
    k = torch.outer(row, row)[None, None]
    flat = F.conv2d(w.reshape(-1, 1, *w.shape[-2:]), k, padding=4)
    return flat.reshape(*w.shape[:2], *flat.shape[-2:])


class MicroBlock(nn.Module):
    """`x + C_2 a(C_1 x)` with 3 x 3 convolutions."""

    def __init__(self, features: int, g: torch.Generator) -> None:
        super().__init__()
        self.first, self.second = weight((features, features, 3), g), weight((features, features, 3), g)

    def forward(
        self, x: torch.Tensor, activation: Callable[[torch.Tensor], torch.Tensor], mirrored: bool
    ) -> torch.Tensor:
        """The block at `x`."""
        h = activation(F.conv2d(extend(x, 1, mirrored), self.first))
        return x + F.conv2d(extend(h, 1, mirrored), self.second)


class MacroBlock(nn.Module):
    """A U-net over `scales` scales: two micro-blocks at each scale, one at the coarsest."""

    def __init__(self, features: list[int], g: torch.Generator) -> None:
        super().__init__()
        last = len(features) - 1
        self.before = nn.ModuleList(MicroBlock(f, g) for f in features)
        self.after = nn.ModuleList(MicroBlock(f, g) for f in features[:last])
        steps = list(zip(features[1:], features[:-1], strict=True))
        self.down = nn.ParameterList(weight((o, i, 3), g) for o, i in steps)
        self.up = nn.ParameterList(weight((o, i, 3), g) for o, i in steps)

    def forward(
        self,
        x: list[torch.Tensor | None],
        activation: Callable[[torch.Tensor], torch.Tensor],
        mirrored: bool,
    ) -> list[torch.Tensor | None]:
        """The features at all scales; `None` stands for zeros."""
        out = list(x)
        for i, block in enumerate(self.before):
            out[i] = block(out[i], activation, mirrored)
            if i < len(self.down):
                lower = F.conv2d(extend(_tensor(out[i]), 3, mirrored), blurred(self.down[i]), stride=2)
                before = out[i + 1]
                out[i + 1] = lower if before is None else before + lower
        for i in reversed(range(len(self.up))):
            fine, coarse = _tensor(out[i]), _tensor(out[i + 1])
            missing = [n - 2 * (m - 1) - 1 for n, m in zip(fine.shape[-2:], coarse.shape[-2:], strict=True)]
            raised = F.conv_transpose2d(coarse, blurred(self.up[i]), stride=2, output_padding=missing)
            out[i] = self.after[i](fine + fold(raised, 3, mirrored), activation, mirrored)
        return out


def _tensor(x: torch.Tensor | None) -> torch.Tensor:
    assert x is not None
    return x
