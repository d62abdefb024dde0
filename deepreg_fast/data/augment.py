"""Augmentation of the training images (370 images become 1480)."""

from __future__ import annotations

import torch

from .. import checks

AUGMENTATIONS = 4
_FLIPPED: tuple[tuple[int, ...], ...] = ((), (-1,), (-2,), (-2, -1))


def augment(x: torch.Tensor, k: int) -> torch.Tensor:
    """The `k`-th of four exact rearrangements of the pixels of `x` `[..., H, W]`.

    `k = 0` is the identity, 1 flips left and right, 2 flips top and bottom, and 3 does both (rotation by 180 degrees).
    The four form a group, and each is its own inverse. Unlike rotations by 90 degrees, they preserve `H x W` for images
    that are not square.
    """
    k = checks.integer(k, "k", 0, AUGMENTATIONS - 1)
    return torch.flip(x, _FLIPPED[k]) if k else x
