"""Construction of the regularizer that a training's settings name."""

from __future__ import annotations

from ..regularizers import RED, Ridge, Sum
from ..regularizers.base import Regularizer
from .config import TrainConfig


def regularizer_of(c: TrainConfig) -> Regularizer:
    """Build `RED`, `Ridge` or the `Sum` of both from the settings; initial weights depend on the seed.

    The network in the sum has `alpha = -1`, so it contributes nothing before training.
    """
    if c.regularizer == "red":
        return RED(**c.chain(), alpha=c.alpha, head=c.head)
    options = {"center": c.center, "image_channels": c.image_channels, "seed": c.seed}
    ridge = Ridge(c.filters, c.kernel_size or 9, c.scales, c.convex, **options)
    return ridge if c.regularizer == "ridge" else Sum([ridge, RED(**c.chain(), alpha=-1.0, head=c.head)])
