"""The input-convex regularizer of the adversarial baseline."""

from __future__ import annotations

from typing import Any

import torch

from .. import checks
from ..ambient import full_precision
from ..functional.conv_chain import per_image
from ..functional.icnn import InputConvex
from ..functional.unaltered import alteration
from .base import Regularizer, register
from .scaled import with_gain


class ICNN(Regularizer):
    """Input-convex regularizer `r(x) = rho/2 ||u||^2 + f(u)` with `u = x - center` (Amos, Xu, Kolter 2017).

    Recovery needs `rho > 0`: `f` grows linearly, so `f` alone does not determine the component in A's null space.

    Parameters
    ----------
    channels, depth : int
        Width and number of layers of the network f, both >= 1.
    rho : float >= 0
        Strong convexity.
    gain : float > 0
        Input gain, as in `RED`.
    center : float
        Gray value subtracted from the image.
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
    >>> dr.ICNN(channels=4).energy(torch.rand(3, 1, 8, 8)).shape
    torch.Size([3])
    """

    def __init__(  # noqa: PLR0913 - one argument for each setting of the network
        self,
        channels: int = 16,
        depth: int = 3,
        rho: float = 0.1,
        *,
        gain: float = 10.0,
        center: float = 0.5,
        image_channels: int = 1,
        seed: int = 0,
    ) -> None:
        super().__init__()
        channels, depth = checks.integer(channels, "channels", 1), checks.integer(depth, "depth", 1)
        image_channels = checks.integer(image_channels, "image_channels", 1)
        gain, seed = checks.number(gain, "gain", 0.0, open_low=True), checks.integer(seed, "seed", 0)
        self.rho = checks.number(rho, "rho", 0.0)
        self.center = checks.number(center, "center", -1e6)
        self.image_channels = image_channels
        self.net = InputConvex(channels, depth, image_channels, gain, seed)
        self._description = {
            "kind": "icnn",
            "channels": channels,
            "depth": depth,
            "rho": self.rho,
            "gain": gain,
            "center": self.center,
            "image_channels": image_channels,
        }

    @full_precision
    def energy(self, x: torch.Tensor) -> torch.Tensor:
        """`r(x_b)`, `[B]`."""
        u = x - self.center
        return 0.5 * self.rho * per_image(u.square()) + self.net(u)

    def altered(self) -> str | None:
        """How this energy differs from `ICNN` (a subclass, or a network of another class); None if it does not."""
        if type(self).energy is not ICNN.energy or "energy" in vars(self):
            return "an energy of its own"
        return alteration(self.net, InputConvex)

    def rescaled(self, scale: float) -> Regularizer:
        """A copy with `scale` times the gain; a `Scaled` wrapper if the energy was altered."""
        return super().rescaled(scale) if self.altered() is not None else with_gain(self, scale)

    def describe(self) -> dict[str, Any]:
        """Constructor arguments except the seed of the initial weights; only the class if the energy was altered."""
        if self.altered() is not None:
            return super().describe()
        current = {"rho": float(self.rho), "gain": float(self.net.gain), "center": float(self.center)}
        return self._description | current


register("icnn", ICNN)
