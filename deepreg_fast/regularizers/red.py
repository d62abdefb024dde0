"""The conv-chain regularizer with the heads of the literature (docs/math.md, M9)."""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch

from .. import checks
from ..ambient import full_precision
from ..functional.conv_chain import (
    HEADS,
    NORM_PLACES,
    NORMS,
    ChannelNorm,
    ConvChain,
    ConvChainForm,
    chain_alteration,
    layers_of,
)
from ..functional.unaltered import hook_on, plain_numbers
from .base import Regularizer, register
from .scaled import with_gain


class RED(Regularizer):
    """Network regularizer `r(x) = alpha/2 ||u||^2 + phi(u, h(u))` with `u = x - center`.

    `h` has `depth` convolutions with SiLU between them. With `head="red"`, `phi = 1/2 <u, u - h(u)>`, that is, `r =
    (1+alpha)/2 ||u||^2 - s` with `s = 1/2 <u, h(u)>` (Nair & Schniter 2022; Romano, Elad, Milanfar 2017; docs/math.md,
    M8-M10). `energy(x)` maps `[B, C, H, W]` to `[B]`.

    Parameters
    ----------
    channels, depth, kernel_size : int
        Width of the hidden layers (>= 1), number of convolutions (>= 2), and odd filter size.
    norm : "none", "pixel" or "image"
        No LayerNorm; over the channels of each pixel (flax's default axes); or over channels and pixels (torch's
        `LayerNorm([C, H, W])`).
    norm_place : "before" or "after"
        Whether LayerNorm comes before or after SiLU. The kernels support "before".
    alpha : float >= -1
        Additional strong convexity.
    head : "red", "residual" or "norm"
        `phi` is `1/2 <u, u - h>`, `1/2 ||u - h||^2` or `1/2 ||h||^2`.
    gain : float > 0
        Input gain kappa: `h(u) = net(kappa u) / kappa`.
    center : float
        Gray value subtracted from the image; 0 gives the uncentered form.
    eps : float > 0
        LayerNorm's epsilon, relative to the input scaled by kappa. Small values make `Lip(grad s)` very large on flat
        areas.
    image_channels : int
        Channels C of the images.
    seed : int
        Seed of the initial weights.

    Raises
    ------
    InputError
        If an argument is out of range.

    Examples
    --------
    >>> import torch, deepreg_fast as dr
    >>> reg = dr.RED(channels=8, norm="pixel")
    >>> value, grad = reg.value_and_grad(torch.rand(2, 1, 16, 16))
    >>> value.shape, grad.shape
    (torch.Size([2]), torch.Size([2, 1, 16, 16]))
    """

    def __init__(  # noqa: PLR0913 - one argument for each setting of the network
        self,
        channels: int = 16,
        depth: int = 3,
        norm: str = "none",
        alpha: float = 0.0,
        *,
        head: str = "red",
        kernel_size: int = 3,
        gain: float = 10.0,
        center: float = 0.5,
        eps: float = 1e-2,
        image_channels: int = 1,
        seed: int = 0,
        norm_place: str = "before",
    ) -> None:
        super().__init__()
        channels = checks.integer(channels, "channels", 1)
        depth = checks.integer(depth, "depth", 2)
        checks.choice(norm, "norm", NORMS)
        checks.choice(norm_place, "norm_place", NORM_PLACES)
        checks.choice(head, "head", HEADS)
        image_channels = checks.integer(image_channels, "image_channels", 1)
        kernel_size = checks.odd(kernel_size, "kernel_size")
        gain = checks.number(gain, "gain", 0.0, open_low=True)
        eps = checks.number(eps, "eps", 0.0, open_low=True)
        seed = checks.integer(seed, "seed", 0)
        self.alpha = checks.number(alpha, "alpha", -1.0)
        self.center = checks.number(center, "center", -1e6)
        self.head, self.image_channels = head, image_channels
        self._description = {
            "kind": "red",
            "channels": channels,
            "depth": depth,
            "norm": norm,
            "alpha": self.alpha,
            "head": head,
            "kernel_size": kernel_size,
            "gain": checks.number(gain, "gain", 0.0, open_low=True),
            "center": self.center,
            "eps": checks.number(eps, "eps", 0.0, open_low=True),
            "image_channels": image_channels,
        }
        self.net = ConvChain(channels, depth, norm, kernel_size, gain, eps, image_channels, seed, norm_place)
        if head == "norm":
            # At h = 0, 1/2 ||h||^2 is stationary in every parameter, so training could not start there.
            self.net.reset(seed, last_zero=False)

    def h(self, u: torch.Tensor) -> torch.Tensor:
        """The network, applied to centered images."""
        return self.net(u)

    @full_precision
    def energy(self, x: torch.Tensor) -> torch.Tensor:
        """`r(x_b)`, `[B]`."""
        return ConvChainForm(self.net, self.head, self.alpha, self.center).energy(x)

    def kernel_form(self) -> ConvChainForm | None:
        """The form that kernels need; None if the energy was altered or has hooks."""
        if self.altered() is not None or hook_on(self.net, *chain.from_iterable(layers_of(self.net))) is not None:
            return None
        return self.unchecked_form()

    def unchecked_form(self) -> ConvChainForm:
        """The form without checking for alterations."""
        return ConvChainForm(self.net, self.head, self.alpha, self.center)

    def altered(self) -> str | None:
        """How this energy differs from `RED` (a subclass, or changes to the network); None if it does not."""
        if type(self).energy is not RED.energy or "energy" in vars(self):
            return "an energy of its own"
        if not plain_numbers(self.alpha, self.center) or self.head not in HEADS:
            return "settings that are no numbers"
        return chain_alteration(self.net)

    def rescaled(self, scale: float) -> Regularizer:
        """A copy with `scale` times the gain; a `Scaled` wrapper if the energy was altered."""
        return super().rescaled(scale) if self.kernel_form() is None else with_gain(self, scale)

    def describe(self) -> dict[str, Any]:
        """Constructor arguments except the seed of the initial weights; only the class if the energy was altered."""
        if self.altered() is not None:
            return super().describe()
        net, norms = self.net, [m for m in self.net.norms if isinstance(m, ChannelNorm)]
        current = {"norm": net.norm, "alpha": float(self.alpha), "head": self.head, "gain": float(net.gain)}
        current |= {"center": float(self.center)} | ({"eps": float(norms[0].eps)} if norms else {})
        # Omit the default position, so that older versions can read files of such networks.
        return {**self._description, **current} | ({"norm_place": net.norm_place} if net.norm_place != "before" else {})


register("red", RED)
