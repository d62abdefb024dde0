"""Construction of the regularizer that a training's settings name, and its start from weights."""

from __future__ import annotations

from pathlib import Path

from ..errors import InputError
from ..regularizers import RED, Ridge, Sum
from ..regularizers.base import Regularizer
from ..regularizers.initialize import initialize_from
from ..weights.io import load
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


def start_from(path: str | Path, reg: Regularizer) -> float | None:
    """Initialize `reg` from a weight file, which may hold a smaller regularizer or the ridge of ridge+red
    (`initialize_from`). Returns the file's mu, or None.

    Raises
    ------
    InputError
        If the file's regularizer does not match.
    """
    source, meta = load(path)
    if not initialize_from(source, reg):
        raise InputError(
            f"init must hold a regularizer like the one of the settings ({reg.describe()}), but {path} holds "
            f"{source.describe()}; change the settings or the file."
        )
    return float(meta["mu"]) if "mu" in meta else None
