"""The input-convex regularizer of the adversarial baseline."""

from __future__ import annotations

from typing import Any

import torch

from .. import checks
from ..definitions.conv_chain import per_image
from ..definitions.icnn import InputConvex
from .base import Regularizer, register
from .scaled import with_gain


class ICNN(Regularizer):
    """`r(x) = rho/2 ||u||^2 + f(u)`, `u = x - center`, `f` input-convex (Amos, Xu, Kolter 2017).

    `rho > 0` is needed in recovery: `f` grows linearly and alone leaves the null space of A free.
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
        self.rho = checks.number(rho, "rho", 0.0)
        self.center = checks.number(center, "center", -1e6)
        self.net = InputConvex(
            checks.integer(channels, "channels", 1),
            checks.integer(depth, "depth", 1),
            checks.integer(image_channels, "image_channels", 1),
            checks.number(gain, "gain", 0.0, open_low=True),
            seed,
        )
        self._description = {
            "kind": "icnn",
            "channels": channels,
            "depth": depth,
            "rho": self.rho,
            "gain": gain,
            "center": self.center,
            "image_channels": image_channels,
        }

    def energy(self, x: torch.Tensor) -> torch.Tensor:
        """`r(x_b)`, `[B]`."""
        u = x - self.center
        return 0.5 * self.rho * per_image(u.square()) + self.net(u)

    def rescaled(self, scale: float) -> Regularizer:
        """The same with `scale` times the gain."""
        return with_gain(self, scale)

    def describe(self) -> dict[str, Any]:
        """Constructor arguments but for the seed of the initial weights."""
        return dict(self._description)


register("icnn", ICNN)
