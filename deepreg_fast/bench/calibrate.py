"""How a peer is set so that it answers as accurately as ours, and no more accurately than it must."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

Error = Callable[[float], float]
"""The error of a peer's answer at a tolerance of its own."""


@dataclass(frozen=True)
class Setting:
    """A peer's tolerance and the error that it gives."""

    tolerance: float
    error: float


def loosest(error: Error, target: float, start: float = 1e-2, last: float = 1e-7) -> Setting:
    """The largest tolerance of `start`, `start / 10`, ... `last` whose error is at most `target`, then refined by
    thirds of a decade; where none is, the one with the least error.

    A peer's stopping rule is not ours (size of a step, decision for the whole batch), so that equal tolerances would
    compare answers of different quality.
    """
    best = Setting(start, float("inf"))
    t = start
    while t >= 0.99 * last:
        found = Setting(t, error(t))
        if found.error <= target:
            return _loosened(error, target, found) if t < start else found
        if found.error < best.error:
            best = found
        t /= 10
    return best


def _loosened(error: Error, target: float, found: Setting) -> Setting:
    for third in (2, 1):
        t = found.tolerance * 10 ** (third / 3)
        e = error(t)
        if e <= target:
            return Setting(t, e)
    return found
