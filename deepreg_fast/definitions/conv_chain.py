"""The network `h` of a learned regularizer, and the heads that make an energy of it (docs/math.md, M8-M10).

`h`: conv 1->C, [LayerNorm], SiLU, (conv C->C, [LayerNorm], SiLU) x (depth-2), conv C->1, or each LayerNorm after its
SiLU; zero padding, so that `h` maps images of any size to images of that size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import InputError

NORMS = ("none", "pixel", "image")
NORM_PLACES = ("before", "after")
HEADS = ("red", "residual", "norm")


class ChannelNorm(nn.Module):
    """LayerNorm of `[B, C, H, W]`, over channels at each pixel (`"pixel"`) or over C, H, W (`"image"`).

    `n = g (u - mean u) / sqrt(var u + eps) + b` with one gain and one bias per channel, so that any
    image size is accepted. Ba, Kiros, Hinton 2016.
    """

    def __init__(self, channels: int, over: str, eps: float) -> None:
        super().__init__()
        self.dims = (1,) if over == "pixel" else (1, 2, 3)
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, u: torch.Tensor) -> torch.Tensor:
        """The normalized `u`."""
        return channel_norm(u, self.weight, self.bias, self.dims, self.eps)


def channel_norm(
    u: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, dims: tuple[int, ...], eps: float
) -> torch.Tensor:
    """`ChannelNorm` as a function of its parameters."""
    centred = u - u.mean(dims, keepdim=True)
    scale = torch.rsqrt(centred.square().mean(dims, keepdim=True) + eps)
    return centred * scale * weight[:, None, None] + bias[:, None, None]


class ConvChain(nn.Module):
    """`h(u) = net(kappa u) / kappa` with the input gain `kappa`, which leaves `Lip(h)` as it is.

    The last convolution starts at zero, so that `h = 0` and the regularizer starts as `1/2 ||u||^2`;
    the others start at `N(0, 1/fan_in)`.
    """

    def __init__(  # noqa: PLR0913 - the network's own description
        self,
        channels: int = 16,
        depth: int = 3,
        norm: str = "none",
        kernel_size: int = 3,
        gain: float = 10.0,
        eps: float = 1e-2,
        image_channels: int = 1,
        seed: int = 0,
        norm_place: str = "before",
    ) -> None:
        super().__init__()
        widths = [image_channels] + [channels] * (depth - 1) + [image_channels]
        self.gain = gain
        self.norm = norm
        # Where there is no LayerNorm it has no place either.
        self.norm_place = "before" if norm == "none" else norm_place
        self.image_channels = image_channels
        self.reach = depth * (kernel_size // 2)
        self.kernel_size = kernel_size
        self.convs = nn.ModuleList(
            nn.Conv2d(a, b, kernel_size, padding=kernel_size // 2) for a, b in zip(widths, widths[1:], strict=False)
        )
        self.norms = nn.ModuleList(
            nn.Identity() if norm == "none" else ChannelNorm(channels, norm, eps) for _ in range(depth - 1)
        )
        self.reset(seed)

    @torch.no_grad()
    def reset(self, seed: int, last_zero: bool = True) -> None:
        """Draw the initial weights from a generator of their own (the global one is not touched)."""
        g = torch.Generator().manual_seed(seed)
        for conv in self.convs:
            assert isinstance(conv, nn.Conv2d) and conv.bias is not None
            fan_in = conv.in_channels * self.kernel_size**2
            conv.weight.copy_(torch.randn(conv.weight.shape, generator=g) / math.sqrt(fan_in))
            conv.bias.zero_()
        last = self.convs[-1]
        assert isinstance(last, nn.Conv2d)
        if last_zero:
            last.weight.zero_()

    def forward(self, u: torch.Tensor) -> torch.Tensor:
        """`h(u)`, `[B, C, H, W] -> [B, C, H, W]`."""
        if min(u.shape[-2:]) < self.kernel_size:
            raise InputError(
                f"Images must be at least {self.kernel_size} x {self.kernel_size} pixels, the reach of one "
                f"convolution, but are {u.shape[-2]} x {u.shape[-1]}; use larger images or smaller filters."
            )
        a = self.gain * u
        for conv, norm in zip(self.convs[:-1], self.norms, strict=True):
            a = norm(F.silu(conv(a))) if self.norm_place == "after" else F.silu(norm(conv(a)))
        return self.convs[-1](a) / self.gain


def conv_chain(u: torch.Tensor, params: Sequence[torch.Tensor], norm: str, gain: float, eps: float) -> torch.Tensor:
    """`ConvChain.forward` as a function of its parameters, weight and bias of each convolution, then of each norm.

    The LayerNorm stands before SiLU.
    """
    layers = list(zip(params[::2], params[1::2], strict=True))
    depth = len(layers) if norm == "none" else (len(layers) + 1) // 2
    dims = (1,) if norm == "pixel" else (1, 2, 3)
    a = gain * u
    for k, (weight, bias) in enumerate(layers[:depth]):
        if k > 0:
            a = F.silu(a if norm == "none" else channel_norm(a, *layers[depth + k - 1], dims, eps))
        a = F.conv2d(a, weight, bias, padding=weight.shape[-1] // 2)
    return a / gain


@dataclass(frozen=True)
class ConvChainForm:
    """`r(x) = alpha/2 ||u||^2 + phi(u, net(u))`, `u = x - center`, with `phi` of `head_energy`: what a backend with
    kernels for this energy needs to know of it."""

    net: ConvChain
    head: str
    alpha: float
    center: float

    def energy(self, x: torch.Tensor) -> torch.Tensor:
        """`r(x_b)`, `[B]`."""
        u = x - self.center
        return 0.5 * self.alpha * per_image(u.square()) + head_energy(self.head, u, self.net(u))


def per_image(e: torch.Tensor) -> torch.Tensor:
    """Sum over all but the batch dimension, `[B, ...] -> [B]`."""
    return e.flatten(1).sum(1)


def head_energy(head: str, u: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    """The energy `[B]` made of `u` and `h(u)`: the outer function `phi(u, h)`.

    `"red"`: `1/2 <u, u - h>` (Romano, Elad, Milanfar 2017); `"residual"`: `1/2 ||u - h||^2` (Cohen et al.
    2021; Hurault et al. 2022); `"norm"`: `1/2 ||h||^2`.
    """
    if head == "red":
        return 0.5 * per_image(u * (u - h))
    if head == "residual":
        return 0.5 * per_image((u - h).square())
    return 0.5 * per_image(h.square())
