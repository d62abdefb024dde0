"""The augmentation of the training images: 370 images become 1480."""

from __future__ import annotations

import torch

from .. import checks

AUGMENTATIONS = 4
_FLIPPED: tuple[tuple[int, ...], ...] = ((), (-1,), (-2,), (-2, -1))


def augment(x: torch.Tensor, k: int) -> torch.Tensor:
    """The `k`-th of four exact rearrangements of the pixels of `x` `[..., H, W]`.

    `k = 0` is the image itself, 1 the mirror image (left and right exchanged), 2 the image upside down, and 3 both
    at once, which is the rotation by 180 degrees. The four form a group, each its own inverse, and keep `H x W`
    for images that are not square, which quarter turns would not.
    """
    k = checks.integer(k, "k", 0, AUGMENTATIONS - 1)
    return torch.flip(x, _FLIPPED[k]) if k else x
