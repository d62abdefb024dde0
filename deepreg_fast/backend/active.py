"""Which images of a batch are still at work, told to the kernels without changing any signature.

A loop that does not ask the host keeps images that have ended in the batch. Inside `only(rows)` kernels that can do so
skip the images where `rows` is false; what they leave in those places is undefined and must not be read.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

_ACTIVE: ContextVar[torch.Tensor | None] = ContextVar("deepreg_fast_rows", default=None)


@contextmanager
def active_images(rows: torch.Tensor | None) -> Iterator[None]:
    """Let kernels skip the images of the batch where `rows` `[B]`, bool, is false; None asks for all of them."""
    token = _ACTIVE.set(rows)
    try:
        yield
    finally:
        _ACTIVE.reset(token)


def active_mask(like: torch.Tensor) -> torch.Tensor | None:
    """The `rows` in force, if they are those of a batch of `like`'s length and device; else None, that is all."""
    rows = _ACTIVE.get()
    fits = rows is not None and len(rows) == len(like) and rows.device == like.device
    return rows if fits else None
