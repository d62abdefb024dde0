"""An input-convex network (Amos, Xu, Kolter 2017) with one energy per image."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..ambient import outside_inference
from .conv_chain import check_channels, convolution, per_image


class InputConvex(nn.Module):
    """`z_1 = phi(V_0 u)`, `z_{k+1} = phi(|W_k| z_k + V_k u)`, energy `mean of z_K over channels, summed over pixels`.

    `phi` is softplus (convex, increasing, smooth). The weights on `z` are the softplus of the stored values and so
    nonnegative. Hence the energy is convex in `u` for all parameter values.
    """

    @outside_inference
    def __init__(self, channels: int = 16, depth: int = 3, image_channels: int = 1, gain: float = 10.0, seed: int = 0):
        super().__init__()
        self.gain = gain
        self.skips = nn.ModuleList(convolution(image_channels, channels, 3) for _ in range(depth))
        new: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
        shape = (channels, channels, 3, 3)
        self.passes = nn.ParameterList(nn.Parameter(torch.empty(shape, **new)) for _ in range(depth - 1))
        g = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for conv in self.skips:
                assert isinstance(conv, nn.Conv2d) and conv.bias is not None
                conv.weight.copy_(torch.randn(conv.weight.shape, generator=g, **new) / math.sqrt(9 * image_channels))
                conv.bias.zero_()
            for w in self.passes:
                target = 1.0 / (9 * channels)
                w.copy_(math.log(math.expm1(target)) + 0.1 * torch.randn(w.shape, generator=g, **new))

    def forward(self, u: torch.Tensor) -> torch.Tensor:
        """Energy of each image, `[B, C, H, W] -> [B]`."""
        check_channels(u, self.skips[0])
        v = self.gain * u
        z = F.softplus(self.skips[0](v))
        for skip, w in zip(list(self.skips)[1:], self.passes, strict=True):
            z = F.softplus(F.conv2d(z, F.softplus(w), padding=1) + skip(v))
        return per_image(z) / (z.shape[1] * self.gain**2)
