"""The network `h` of a learned regularizer, and the heads that turn it into an energy (docs/math.md, M8-M10).

`h`: conv 1->C, [LayerNorm], SiLU, (conv C->C, [LayerNorm], SiLU) x (depth-2), conv C->1. LayerNorm can also come after
SiLU. Zero padding preserves the size of images.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..ambient import outside_inference
from ..errors import InputError
from .unaltered import alteration, plain_numbers

NORMS = ("none", "pixel", "image")
NORM_PLACES = ("before", "after")
HEADS = ("red", "residual", "norm")
Layer = Callable[[torch.Tensor], torch.Tensor]


class ChannelNorm(nn.Module):
    """LayerNorm of `[B, C, H, W]`, over channels at each pixel (`"pixel"`) or over C, H, W (`"image"`).

    `n = g (u - mean u) / sqrt(var u + eps) + b` with one gain and one bias per channel, for images of any size (Ba,
    Kiros, Hinton 2016).
    """

    @outside_inference
    def __init__(self, channels: int, over: str, eps: float) -> None:
        super().__init__()
        self.dims = (1,) if over == "pixel" else (1, 2, 3)
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels, dtype=torch.float32, device="cpu"))
        self.bias = nn.Parameter(torch.zeros(channels, dtype=torch.float32, device="cpu"))

    def forward(self, u: torch.Tensor) -> torch.Tensor:
        """The normalized `u`."""
        return channel_norm(u, self.weight, self.bias, self.dims, self.eps)


def channel_norm(
    u: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, dims: tuple[int, ...], eps: float
) -> torch.Tensor:
    """`ChannelNorm` as a function of its parameters."""
    centered = u - u.mean(dims, keepdim=True)
    scale = torch.rsqrt(centered.square().mean(dims, keepdim=True) + eps)
    return centered * scale * weight[:, None, None] + bias[:, None, None]


def convolution(ins: int, outs: int, kernel_size: int) -> nn.Conv2d:
    """A size-preserving convolution in float32 on the CPU, whatever torch's defaults are.

    Its weights are uninitialized, because torch would draw them from the global generator.
    """
    new: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
    return nn.utils.skip_init(nn.Conv2d, ins, outs, kernel_size, padding=kernel_size // 2, **new)  # type: ignore[return-value]


class ConvChain(nn.Module):
    """`h(u) = net(kappa u) / kappa` with the input gain `kappa`, which does not change `Lip(h)`.

    The last convolution is initialized to zero, so that `h = 0` and the regularizer starts as `1/2 ||u||^2`; the others
    are drawn from `N(0, 1/fan_in)`.
    """

    @outside_inference
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
        # Without a LayerNorm its position has no meaning.
        self.norm_place = "before" if norm == "none" else norm_place
        self.image_channels = image_channels
        self.reach = depth * (kernel_size // 2)
        self.kernel_size = kernel_size
        self.convs = nn.ModuleList(convolution(a, b, kernel_size) for a, b in zip(widths, widths[1:], strict=False))
        self.norms = nn.ModuleList(
            nn.Identity() if norm == "none" else ChannelNorm(channels, norm, eps) for _ in range(depth - 1)
        )
        self.reset(seed)

    @torch.no_grad()
    def reset(self, seed: int, last_zero: bool = True) -> None:
        """Draw the initial weights from a separate generator; the global one does not change."""
        g = torch.Generator().manual_seed(seed)
        for conv in self.convs:
            assert isinstance(conv, nn.Conv2d) and conv.bias is not None
            fan_in = conv.in_channels * self.kernel_size**2
            drawn = torch.randn(conv.weight.shape, generator=g, dtype=torch.float32, device="cpu")
            conv.weight.copy_(drawn / math.sqrt(fan_in))
            conv.bias.zero_()
        last = self.convs[-1]
        assert isinstance(last, nn.Conv2d)
        if last_zero:
            last.weight.zero_()

    def forward(self, u: torch.Tensor) -> torch.Tensor:
        """`h(u)`, `[B, C, H, W] -> [B, C, H, W]`."""
        check_channels(u, self.convs[0])
        if min(u.shape[-2:]) < self.kernel_size:
            raise InputError(
                f"Images must be at least {self.kernel_size} x {self.kernel_size} pixels, the reach of one "
                f"convolution, but are {u.shape[-2]} x {u.shape[-1]}; use larger images or smaller filters."
            )
        return _apply_layers(u, list(self.convs), list(self.norms), self.gain, self.norm_place)


def _apply_layers(
    u: torch.Tensor, convs: Sequence[Layer], norms: Sequence[Layer], gain: float, norm_place: str = "before"
) -> torch.Tensor:
    """`h(u)` from the functions of its layers."""
    a = gain * u
    for conv, norm in zip(convs[:-1], norms, strict=True):
        a = norm(F.silu(conv(a))) if norm_place == "after" else F.silu(norm(conv(a)))
    return convs[-1](a) / gain


def check_channels(u: torch.Tensor, first: nn.Module) -> None:
    """Raise an `InputError` unless the images `u` have as many channels as a network's first convolution takes."""
    if isinstance(first, nn.Conv2d) and u.shape[1] != first.in_channels:
        raise InputError(
            f"Images must have the {first.in_channels} channel(s) of the network, but have shape {list(u.shape)} "
            "[B, C, H, W]; use it on each channel, or build a network with that image_channels."
        )


def layers_of(net: ConvChain) -> tuple[list[nn.Module], list[nn.Module]]:
    """The convolutions and the norms."""
    return [*net.convs._modules.values()], [*net.norms._modules.values()]  # type: ignore[list-item]


def chain_alteration(net: object) -> str | None:
    """None if `net` is a `ConvChain` that computes `h` with the weights of its layers, otherwise the difference."""
    if (reason := alteration(net, ConvChain)) is not None:
        return reason
    assert isinstance(net, ConvChain)
    if net.norm not in NORMS or net.norm_place not in NORM_PLACES or not plain_numbers(net.gain):
        return "settings that are none of its own"
    convs, norms = layers_of(net)
    if len(norms) + 1 != len(convs) or len(convs) < 2:
        return "another number of layers"
    k = net.kernel_size
    plain = ((1, 1), (k // 2, k // 2), (1, 1), 1, "zeros")
    widths = [net.image_channels, *[getattr(convs[0], "out_channels", 0)] * len(norms), net.image_channels]
    for i, conv in enumerate(convs):
        if (reason := alteration(conv, nn.Conv2d, ("weight", "bias"))) is not None:
            return reason
        attributes = conv.__dict__
        if (
            attributes["stride"],
            attributes["padding"],
            attributes["dilation"],
            attributes["groups"],
            attributes["padding_mode"],
        ) != plain:
            return "a convolution with another stride, padding, dilation or number of groups"
        parameters = attributes["_parameters"]
        if parameters["weight"].shape != (widths[i + 1], widths[i], k, k) or parameters["bias"].shape != (
            widths[i + 1],
        ):
            return "a convolution of another shape"
    return _norms_alteration(net, norms, widths[1])


def _norms_alteration(net: ConvChain, norms: list[nn.Module], channels: int) -> str | None:
    dims = (1,) if net.norm == "pixel" else (1, 2, 3)
    for m in norms:
        if net.norm == "none":
            reason = alteration(m, nn.Identity)
        else:
            reason = alteration(m, ChannelNorm, ("weight", "bias"))
        if reason is not None:
            return reason
        if isinstance(m, ChannelNorm):
            same = m.dims == dims and plain_numbers(m.eps) and m.eps == norms[0].eps
            if not same or m.weight.shape != (channels,) or m.bias.shape != (channels,):
                return "a LayerNorm of another kind"
    return None


def conv_chain(u: torch.Tensor, params: Sequence[torch.Tensor], norm: str, gain: float, eps: float) -> torch.Tensor:
    """`ConvChain.forward` as a function of its parameters: weight and bias of each convolution, then of each norm.

    LayerNorm comes before SiLU.
    """
    layers = list(zip(params[::2], params[1::2], strict=True))
    depth = len(layers) if norm == "none" else (len(layers) + 1) // 2
    dims = (1,) if norm == "pixel" else (1, 2, 3)
    convs = [partial(F.conv2d, weight=w, bias=b, padding=w.shape[-1] // 2) for w, b in layers[:depth]]
    norms = [partial(channel_norm, weight=w, bias=b, dims=dims, eps=eps) for w, b in layers[depth:]]
    return _apply_layers(u, convs, norms or [_identity] * (depth - 1), gain)


def _identity(u: torch.Tensor) -> torch.Tensor:
    return u


@dataclass(frozen=True)
class ConvChainSpec:
    """The settings of `r(x) = alpha/2 ||u||^2 + phi(u, h(u))`, `u = x - center`, apart from its parameters.

    `phi` is as in `head_energy`. The tensors' shapes determine the depth, the widths and the kernel size.
    """

    head: str
    norm: str
    alpha: float
    center: float
    gain: float
    eps: float

    def energy(self, x: torch.Tensor, params: Sequence[torch.Tensor]) -> torch.Tensor:
        """`r(x_b)`, `[B]`, as a function of x and of the parameters."""
        return _energy(x, lambda u: conv_chain(u, params, self.norm, self.gain, self.eps), self)


@dataclass(frozen=True)
class ConvChainForm:
    """`r(x) = alpha/2 ||u||^2 + phi(u, net(u))`, `u = x - center`, `phi` as in `head_energy`: the form for kernels."""

    net: ConvChain
    head: str
    alpha: float
    center: float

    def energy(self, x: torch.Tensor) -> torch.Tensor:
        """`r(x_b)`, `[B]`."""
        return _energy(x, self.net, self)

    @property
    def spec(self) -> ConvChainSpec:
        """The settings of the form."""
        norm: Any = self.net.norms[0]
        eps = 0.0 if self.net.norm == "none" else norm.eps
        return ConvChainSpec(self.head, self.net.norm, self.alpha, self.center, self.net.gain, eps)

    def parameters(self) -> list[torch.Tensor]:
        """The network's tensors in the order of `conv_chain`."""
        norms = [] if self.net.norm == "none" else list(self.net.norms)
        return [t for m in (*self.net.convs, *norms) for t in (m.weight, m.bias)]  # type: ignore[misc]


def _energy(x: torch.Tensor, h: Layer, settings: ConvChainSpec | ConvChainForm) -> torch.Tensor:
    u = x - settings.center
    return 0.5 * settings.alpha * per_image(u.square()) + head_energy(settings.head, u, h(u))


def per_image(e: torch.Tensor) -> torch.Tensor:
    """Sum over all but the batch dimension, `[B, ...] -> [B]`."""
    return e.flatten(1).sum(1)


def head_energy(head: str, u: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    """The outer function `phi(u, h)`, `[B]`.

    `"red"`: `1/2 <u, u - h>` (Romano, Elad, Milanfar 2017); `"residual"`: `1/2 ||u - h||^2` (Cohen et al.
    2021; Hurault et al. 2022); `"norm"`: `1/2 ||h||^2`.
    """
    if head == "red":
        return 0.5 * per_image(u * (u - h))
    if head == "residual":
        return 0.5 * per_image((u - h).square())
    return 0.5 * per_image(h.square())
