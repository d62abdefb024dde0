"""Total deep variation (Kobler et al. 2020), in the forms of Kobler et al. and of Hertrich et al. 2025."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .. import checks
from ..ambient import full_precision, outside_inference
from ..errors import InputError
from ..functional.conv_chain import per_image
from ..functional.tdv import MacroBlock, extend, softplus, student, weight
from .base import Regularizer, register

VARIANTS = ("kobler", "hertrich")


class TDV(Regularizer):
    """Total deep variation `r(x) = w/c^2 sum_p phi((N(c x))_p)/F` with weight w, contrast c and small U-nets N.

    - `variant="kobler"` (Kobler et al. 2020): mirrored borders, the activation `1/2 log(1 + t^2)`, `phi(t) = t`. This r
      is not bounded below.
    - `variant="hertrich"` (Hertrich et al. 2025): zero padding, a softplus, `phi(t) = t^2/2`; the first filters have
      mean zero and norm at most one.

    Parameters
    ----------
    variant : "kobler" or "hertrich"
    in_channels, features, multiplier, blocks, scales : int
        Channels of the images; F, the features at the finest scale; their growth from scale to scale; U-nets; scales.

    Raises
    ------
    InputError
        If an argument is out of range.
    """

    center = 0.0
    no_kernels = "no kernel computes networks of several scales"

    @outside_inference
    def __init__(
        self,
        variant: str = "hertrich",
        in_channels: int = 1,
        features: int = 32,
        *,
        multiplier: int = 1,
        blocks: int = 3,
        scales: int = 3,
    ) -> None:
        super().__init__()
        if variant not in VARIANTS:
            raise InputError(f"variant must be one of {list(VARIANTS)}, but is {variant!r}.")
        sizes = {"in_channels": in_channels, "features": features, "multiplier": multiplier}
        sizes = {k: checks.integer(v, k, 1) for k, v in (sizes | {"blocks": blocks, "scales": scales}).items()}
        self._description = {"kind": "tdv", "variant": variant, **sizes}
        self.variant, self.features, self.scales = variant, features, scales
        self.image_channels = in_channels
        g = torch.Generator().manual_seed(0)
        self.first = weight((features, in_channels, 3), g)
        widths = [features * multiplier**i for i in range(scales)]
        self.blocks = nn.ModuleList(MacroBlock(widths, g) for _ in range(blocks))
        self.last = weight((1, features, 1), g)
        zero = torch.zeros((), dtype=torch.float32, device="cpu")
        self.log_weight, self.log_contrast = nn.Parameter(zero.clone()), nn.Parameter(zero.clone())

    def _first(self) -> torch.Tensor:
        """The first filters, projected if the variant says so; Kobler et al. store projected filters."""
        if self.variant == "kobler":
            return self.first
        w = self.first - self.first.mean((1, 2, 3), keepdim=True)
        return w / w.square().sum((1, 2, 3), keepdim=True).sqrt().clip(min=1.0)

    @full_precision
    def energy(self, x: torch.Tensor) -> torch.Tensor:
        """`r(x_b)`, `[B]`."""
        channels = self.first.shape[1]
        if x.shape[1] != channels:
            raise InputError(f"These weights take images [B, {channels}, H, W], but x has shape {list(x.shape)}.")
        mirrored = self.variant == "kobler"
        activation = student if mirrored else softplus
        finest = F.conv2d(extend(self.log_contrast.exp() * x, 1, mirrored), self._first())
        levels: list[torch.Tensor | None] = [finest] + [None] * (self.scales - 1)
        for block in self.blocks:
            levels = block(levels, activation, mirrored)
        assert levels[0] is not None
        t = F.conv2d(levels[0], self.last)
        factor = (self.log_weight - 2.0 * self.log_contrast).exp() / self.features
        return factor * per_image(t if mirrored else 0.5 * t.square())

    def describe(self) -> dict[str, Any]:
        """Constructor arguments."""
        return dict(self._description) if type(self) is TDV else super().describe()


register("tdv", TDV)
