"""Clock of a CUDA device: events around the calls, an injected delay on the device, and a flush of its L2 cache."""

from __future__ import annotations

import time
from typing import Any

import torch

from .timing import Timed

_CYCLES = 2_000_000
"""Cycles of one calibrating sleep, about a millisecond."""


class EventClock:
    """Times the work that is queued on the current stream between two events.

    `cuda` is `torch.cuda` or a test's substitute. `flush` is a buffer several times as large as the L2 cache, which a
    cold measurement overwrites before each call.
    """

    def __init__(self, flush: torch.Tensor | None = None, cuda: Any = torch.cuda) -> None:
        self.cuda, self.flush = cuda, flush
        # An idle device's clock rate is low and takes a while to rise.
        self.measure(lambda _: self.cuda._sleep(_CYCLES), 0, 200)
        # The difference of two lengths excludes the cost of the launch. The clock rate varies, so take a median.
        slept = sorted(self._sleep(_CYCLES, 3 * _CYCLES) for _ in range(5))[2]
        self.rate = 2 * _CYCLES / max(slept, 1e-9)

    def _sleep(self, short: int, long: int) -> float:
        seconds = [self.measure(lambda _, n=n: self.cuda._sleep(n), 0, 1) for n in (short, long)]
        return seconds[1] - seconds[0]

    def measure(self, f: Timed, first: int, repeats: int) -> float:
        """Seconds per call of `repeats` calls in a row: device time, or host time if the host launches more slowly."""
        begin, end = (self.cuda.Event(enable_timing=True) for _ in range(2))
        self.cuda.synchronize()
        begin.record()
        for j in range(repeats):
            f(first + j)
        end.record()
        end.synchronize()
        return 1e-3 * begin.elapsed_time(end) / repeats

    def wait(self, seconds: float) -> None:
        """Keep both device and host busy, so that a call takes longer by `seconds` whichever of them limits it."""
        self.cuda._sleep(int(seconds * self.rate))
        deadline = time.perf_counter() + seconds
        while time.perf_counter() < deadline:
            pass

    def cold(self, f: Timed, k: int) -> float | None:
        """Seconds of `f(k)` alone after other data went through the L2 cache; its launches are queued meanwhile."""
        if self.flush is None:
            return None
        begin, end = (self.cuda.Event(enable_timing=True) for _ in range(2))
        self.cuda.synchronize()
        self.flush.fill_(float(k))
        begin.record()
        f(k)
        end.record()
        end.synchronize()
        return 1e-3 * begin.elapsed_time(end)
