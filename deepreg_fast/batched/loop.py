"""Iteration loops without device synchronization.

On the CPU a loop tests after every iteration which images are active, and drops the others from the batch. On a device
inactive images stay in the batch under a mask (`uses_mask`), the loop detects termination late (`AnyActive`), and extra
iterations leave converged images bit-identical. `graphs.py` replays iterations as CUDA graphs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch

from ..errors import OutOfMemory

QUERY_LAG = 1
"""Number of outstanding termination queries; one keeps the device's queue non-empty."""

_AS_DEVICE: ContextVar[bool] = ContextVar("deepreg_fast_as_device", default=False)


@contextmanager
def simulate_device() -> Iterator[None]:
    """For tests: run CPU tensors through the masked code path of a device."""
    token = _AS_DEVICE.set(True)
    try:
        yield
    finally:
        _AS_DEVICE.reset(token)


def uses_mask(like: torch.Tensor) -> bool:
    """Whether inactive images stay in the batch, because finding them would synchronize with the device of `like`."""
    return like.device.type != "cpu" or _AS_DEVICE.get()


class AnyActive:
    """Whether any image is active: queried after every round, with the answer `lag` (`QUERY_LAG`) queries later.

    A query is read only after `lag` more rounds have been queued, so the device always has work and the host is never
    more than that ahead. Before the first answer the result is True. On the CPU there is no lag.
    """

    def __init__(self, lag: int | None = None) -> None:
        self.lag = QUERY_LAG if lag is None else lag
        self._open: deque[Callable[[], bool]] = deque()

    def __call__(self, running: torch.Tensor) -> bool:
        """Whether any entry of `running` `[B]` was true `lag` calls ago."""
        if not uses_mask(running):
            return bool(running.any())
        self._open.append(_ask(running.any()))
        return True if len(self._open) <= self.lag else self._open.popleft()()


def _ask(flag: torch.Tensor) -> Callable[[], bool]:
    """Copy a flag to the host asynchronously; the returned function waits for it."""
    if flag.device.type != "cuda":
        return lambda: bool(flag)
    answer = torch.empty((), dtype=torch.bool, device="cpu", pin_memory=True)
    answer.copy_(flag, non_blocking=True)
    sent = torch.cuda.Event()
    sent.record(torch.cuda.current_stream(flag.device))

    def read() -> bool:
        sent.synchronize()
        return bool(answer)

    return read


@contextmanager
def attach_partial_result(partial: Callable[[], Any]) -> Iterator[None]:
    """Convert out-of-memory errors into `OutOfMemory` with the partial result."""
    try:
        yield
    except (torch.OutOfMemoryError, OutOfMemory) as error:
        reason = str(error).partition("\n")[0]
        raise OutOfMemory(
            f"The solve must fit the device's memory, but: {reason} Use a smaller batch; what has been computed so far "
            "is in the attribute 'partial' of this error.",
            partial(),
        ) from error
