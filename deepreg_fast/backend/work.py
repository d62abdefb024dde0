"""Which images of a batch are still at work, told to the kernels without changing any signature; and on which device.

A loop that does not ask the host keeps images that have ended in the batch. Inside `only(rows)` kernels that can do so
skip the images where `rows` is false; what they leave in those places is undefined and must not be read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")

_ROWS: ContextVar[torch.Tensor | None] = ContextVar("deepreg_fast_rows", default=None)


@contextmanager
def only(rows: torch.Tensor | None) -> Iterator[None]:
    """Let kernels skip the images of the batch where `rows` `[B]`, bool, is false; None asks for all of them."""
    token = _ROWS.set(rows)
    try:
        yield
    finally:
        _ROWS.reset(token)


def rows_at_work(like: torch.Tensor) -> torch.Tensor | None:
    """The `rows` in force, if they are those of a batch of `like`'s length and device; else None, that is all."""
    rows = _ROWS.get()
    fits = rows is not None and len(rows) == len(like) and rows.device == like.device
    return rows if fits else None


def on_its_device(function: Callable[P, T]) -> Callable[P, T]:
    """Run `function` with its first tensor's device as the current one, on which Triton and CuPy launch."""

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        device = next(a.device for a in args if isinstance(a, torch.Tensor))
        if device.type != "cuda" or device.index == torch.cuda.current_device():
            return function(*args, **kwargs)
        with torch.cuda.device(device):
            return function(*args, **kwargs)

    return run
