"""RED with an explicit denoiser: a field `x - d(x)` that need not be a gradient."""

from __future__ import annotations

from typing import Any

import torch

from .. import checks
from ..ambient import full_precision
from ..errors import InputError
from ..functional.conv_chain import NORM_PLACES, NORMS, ConvChain
from .base import Regularizer, register
from .scaled import with_gain


class DenoiserField(Regularizer):
    """The vector field `x - d(x)` of a denoiser, used in place of `grad r(x)` (RED; Romano, Elad, Milanfar 2017).

    `d(x) = x - n(x - center)`, where `n` is the network of `RED`, trained to predict noise. The field has no energy:
    recovery uses the field alone, and `energy` and `linearize` raise an error.

    Parameters
    ----------
    channels, depth, kernel_size : int
        Width, number of convolutions and odd filter size of n.
    norm, norm_place, gain, center, eps, image_channels, seed
        As in `RED`.

    Raises
    ------
    InputError
        If an argument is out of range.

    Examples
    --------
    >>> import torch, deepreg_fast as dr
    >>> reg = dr.DenoiserField(channels=4)
    >>> x = torch.rand(1, 1, 8, 8)
    >>> torch.allclose(reg.value_and_grad(x)[1], x - reg.denoise(x), atol=1e-6)
    True
    """

    def __init__(  # noqa: PLR0913 - one argument for each setting of the network
        self,
        channels: int = 16,
        depth: int = 3,
        norm: str = "none",
        *,
        kernel_size: int = 3,
        gain: float = 10.0,
        center: float = 0.5,
        eps: float = 1e-2,
        image_channels: int = 1,
        seed: int = 0,
        norm_place: str = "before",
    ) -> None:
        super().__init__()
        channels, depth = checks.integer(channels, "channels", 1), checks.integer(depth, "depth", 2)
        gain = checks.number(gain, "gain", 0.0, open_low=True)
        eps = checks.number(eps, "eps", 0.0, open_low=True)
        self.center = checks.number(center, "center", -1e6)
        self._description = {
            "kind": "denoiser",
            "channels": channels,
            "depth": depth,
            "norm": checks.choice(norm, "norm", NORMS),
            "gain": gain,
            "center": self.center,
            "eps": eps,
        }
        kernel_size = checks.odd(kernel_size, "kernel_size")
        seed = checks.integer(seed, "seed", 0)
        checks.choice(norm_place, "norm_place", NORM_PLACES)
        self.image_channels = checks.integer(image_channels, "image_channels", 1)
        self.net = ConvChain(channels, depth, norm, kernel_size, gain, eps, self.image_channels, seed, norm_place)
        # Omit default values, so that older versions can read files of such networks.
        if kernel_size != 3:
            self._description["kernel_size"] = kernel_size
        if self.image_channels != 1:
            self._description["image_channels"] = self.image_channels
        if self.net.norm_place != "before":
            self._description["norm_place"] = norm_place

    @full_precision
    def denoise(self, x: torch.Tensor) -> torch.Tensor:
        """`d(x) = x - n(x - center)`."""
        return x - self.net(x - self.center)

    @full_precision
    @torch.no_grad()
    def value_and_grad(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Zeros `[B]` (a field has no value) and `x - d(x)`."""
        self._check(x)
        return x.new_zeros(len(x)), self.net(x - self.center)

    def energy(self, x: torch.Tensor) -> torch.Tensor:
        """Not defined; raises InputError."""
        raise InputError("A denoiser's field x - d(x) has no energy; use RED(head='residual') for one that has.")

    def linearize(self, x: torch.Tensor):  # type: ignore[no-untyped-def]
        """Not defined; raises InputError."""
        self.energy(x)

    def rescaled(self, scale: float) -> Regularizer:
        """A copy with `scale` times the gain."""
        return with_gain(self, scale)

    def describe(self) -> dict[str, Any]:
        """Constructor arguments except the seed."""
        return self._description | {"gain": float(self.net.gain), "center": float(self.center)}


register("denoiser", DenoiserField)
