"""The conv-chain regularizer with the heads of the literature (docs/math.md, M9)."""

from __future__ import annotations

from typing import Any

import torch

from .. import checks
from ..definitions.conv_chain import HEADS, NORMS, ConvChain, ConvChainForm
from .base import Regularizer, register


class RED(Regularizer):
    """`r(x) = alpha/2 ||u||^2 + phi(u, h(u))`, `u = x - center`, `h` a short convolutional network.

    With `head="red"`: `phi = 1/2 <u, u - h(u)>`, that is `s = 1/2 <u, h(u)>` in
    `r = (1+alpha)/2 ||u||^2 - s` (Nair & Schniter 2022; Romano et al. 2017).

    Parameters
    ----------
    channels, depth, kernel_size
        Width of the hidden layers (>= 1), number of convolutions (>= 2), odd filter size.
    norm : "none", "pixel" or "image"
        No LayerNorm; over channels at each pixel (flax's default axes); over channels and pixels
        (torch's `LayerNorm([C, H, W])`). It stands between convolution and SiLU.
    alpha : float
        Added strong convexity, >= -1.
    head : "red", "residual" or "norm"
    gain : float
        Input gain kappa > 0: `h(kappa u)/kappa`.
    center : float
        Grey value that `u` is measured from; 0 gives the uncentred form.
    eps : float
        LayerNorm's epsilon, relative to the kappa-scaled input; small values make `Lip(grad s)` huge on
        flat areas.
    seed : int
        Seed of the initial weights.

    Raises
    ------
    InputError
        If an argument is out of range.
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
    ) -> None:
        super().__init__()
        checks.integer(channels, "channels", 1)
        checks.integer(depth, "depth", 2)
        checks.choice(norm, "norm", NORMS)
        checks.choice(head, "head", HEADS)
        checks.integer(image_channels, "image_channels", 1)
        if checks.integer(kernel_size, "kernel_size", 1) % 2 == 0:
            raise checks.InputError(f"kernel_size must be odd, but is {kernel_size}.")
        self.alpha = checks.number(alpha, "alpha", -1.0)
        self.center = checks.number(center, "center", -1e6)
        self.head = head
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
        self.net = ConvChain(channels, depth, norm, kernel_size, gain, eps, image_channels, seed)
        if head == "norm":
            # 1/2 ||h||^2 is stationary in every parameter where h = 0, so it would never train from there.
            self.net.reset(seed, last_zero=False)

    def h(self, u: torch.Tensor) -> torch.Tensor:
        """The network, acting on centred images."""
        return self.net(u)

    def energy(self, x: torch.Tensor) -> torch.Tensor:
        """`r(x_b)`, `[B]`."""
        return ConvChainForm(self.net, self.head, self.alpha, self.center).energy(x)

    def conv_chain_form(self) -> ConvChainForm | None:
        """What kernels for this energy need; None for a subclass that computes something else."""
        own = type(self).energy is not RED.energy or type(self.net) is not ConvChain
        return None if own else ConvChainForm(self.net, self.head, self.alpha, self.center)

    def describe(self) -> dict[str, Any]:
        """Constructor arguments but for the seed of the initial weights."""
        return dict(self._description)


register("red", RED)
