"""Loops that do not wait for the device: its queue is never drained to decide whether to go on.

On the CPU looking at a number costs nothing, so a loop looks each round and drops the images that have ended. On any
other device images that have ended stay in the batch under a mask (`masked`), the loop learns of its end late (`Poll`),
and the rounds that came too many change no bit of an ended image. `graphs.py` replays them as CUDA graphs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch

from ..errors import OutOfMemory

LAG = 1
"""Questions that are open at a time: enough for the device to have the next round when it ends one."""

_AS_DEVICE: ContextVar[bool] = ContextVar("deepreg_fast_as_device", default=False)


@contextmanager
def as_device() -> Iterator[None]:
    """Run loops on CPU tensors the way they run on a device; what this is for is to test that."""
    token = _AS_DEVICE.set(True)
    try:
        yield
    finally:
        _AS_DEVICE.reset(token)


def masked(like: torch.Tensor) -> bool:
    """Whether images that have ended stay in the batch, because looking for them would wait for `like`'s device."""
    return like.device.type != "cpu" or _AS_DEVICE.get()


class Poll:
    """Whether any image is still at work, asked after every round and answered `lag` (`LAG`) questions later.

    The answer to one question is awaited only after `lag` more rounds have been queued, so the device always has work
    and the host is never more than that ahead. Until there is an answer it is yes. On the CPU there is no lag.
    """

    def __init__(self, lag: int | None = None) -> None:
        self.lag = LAG if lag is None else lag
        self._open: deque[Callable[[], bool]] = deque()

    def __call__(self, running: torch.Tensor) -> bool:
        """Whether `running` `[B]` held a true one, `lag` calls ago."""
        if not masked(running):
            return bool(running.any())
        self._open.append(_ask(running.any()))
        return True if len(self._open) <= self.lag else self._open.popleft()()


def _ask(flag: torch.Tensor) -> Callable[[], bool]:
    """Send a flag to the host without waiting; what is returned waits for it."""
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
def keeping(partial: Callable[[], Any]) -> Iterator[None]:
    """Turn running out of a device's memory into `OutOfMemory` with what has been computed so far."""
    try:
        yield
    except (torch.OutOfMemoryError, OutOfMemory) as error:
        reason = str(error).partition("\n")[0]
        raise OutOfMemory(
            f"The solve must fit the device's memory, but: {reason} Use a smaller batch; what has been computed so far "
            "is in the attribute 'partial' of this error.",
            partial(),
        ) from error
