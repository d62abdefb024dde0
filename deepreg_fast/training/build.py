"""The regularizer that the settings of a training name."""

from __future__ import annotations

from ..regularizers import RED, Ridge
from ..regularizers.base import Regularizer
from .config import TrainConfig


def regularizer_of(c: TrainConfig) -> Regularizer:
    """`RED` or `Ridge` with the settings' fields and initial weights of their seed."""
    if c.regularizer == "ridge":
        return Ridge(c.filters, c.kernel_size or 9, c.scales, c.convex, center=c.center, seed=c.seed)
    return RED(**c.chain(), alpha=c.alpha, head=c.head)
