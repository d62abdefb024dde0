"""Context manager for the active-image mask, so that kernels can skip inactive images.

A loop that does not synchronize keeps inactive images in the batch. Inside `active_images(rows)` kernels may skip the
images for which `rows` is false; their results are undefined and must not be read.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

_ACTIVE: ContextVar[torch.Tensor | None] = ContextVar("deepreg_fast_active", default=None)


@contextmanager
def active_images(rows: torch.Tensor | None) -> Iterator[None]:
    """Within this context kernels may skip images for which `rows` `[B]`, bool, is false; None processes all images."""
    token = _ACTIVE.set(rows)
    try:
        yield
    finally:
        _ACTIVE.reset(token)


def mask_bytes(mask: torch.Tensor | None) -> torch.Tensor | None:
    """A mask as contiguous bytes, which kernels read on every device; None stays None."""
    return None if mask is None else mask.contiguous().view(torch.uint8)


def active_mask(like: torch.Tensor) -> torch.Tensor | None:
    """The current mask if it has the length and device of `like`; otherwise None, which means all images."""
    rows = _ACTIVE.get()
    fits = rows is not None and len(rows) == len(like) and rows.device == like.device
    return rows if fits else None
