"""A CUDA device's clock: events around the calls, a planted wait on the device, and a flush of its L2 cache."""

from __future__ import annotations

import time
from typing import Any

import torch

from .timing import Timed

_CYCLES = 2_000_000
"""Of one calibrating sleep: about a millisecond."""


class EventClock:
    """Times what is queued on the current stream between two events.

    `cuda` is `torch.cuda`, or what a test puts in its place; `flush` is a buffer several times the L2 cache, which a
    cold measurement overwrites before each call.
    """

    def __init__(self, flush: torch.Tensor | None = None, cuda: Any = torch.cuda) -> None:
        self.cuda, self.flush = cuda, flush
        # An idle device's clock is slow, and takes a while to rise.
        self.measure(lambda _: self.cuda._sleep(_CYCLES), 0, 200)
        # Of two lengths the difference, without the cost of the launch; the clock of the multiprocessors moves, so the
        # median of several.
        took = sorted(self._sleep(_CYCLES, 3 * _CYCLES) for _ in range(5))[2]
        self.rate = 2 * _CYCLES / max(took, 1e-9)

    def _sleep(self, short: int, long: int) -> float:
        took = [self.measure(lambda _, n=n: self.cuda._sleep(n), 0, 1) for n in (short, long)]
        return took[1] - took[0]

    def measure(self, f: Timed, first: int, repeats: int) -> float:
        """Seconds of one of `repeats` calls in a row: the device's, or the host's where it cannot launch that fast."""
        begin, end = (self.cuda.Event(enable_timing=True) for _ in range(2))
        self.cuda.synchronize()
        begin.record()
        for j in range(repeats):
            f(first + j)
        end.record()
        end.synchronize()
        return 1e-3 * begin.elapsed_time(end) / repeats

    def wait(self, seconds: float) -> None:
        """Keep the device and the host busy: whichever of them a call waits for, it waits that much longer."""
        self.cuda._sleep(int(seconds * self.rate))
        until = time.perf_counter() + seconds
        while time.perf_counter() < until:
            pass

    def cold(self, f: Timed, k: int) -> float | None:
        """Seconds of `f(k)` alone after other data has gone through the L2 cache; its launches are queued meanwhile."""
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
