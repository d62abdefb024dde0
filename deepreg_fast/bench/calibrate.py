"""Calibration of a peer's tolerance, so that it is as accurate as our solver, but not more accurate than necessary."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

Error = Callable[[float], float]
"""The error of a peer's result as a function of its tolerance."""


@dataclass(frozen=True)
class Setting:
    """A peer's tolerance and the resulting error."""

    tolerance: float
    error: float


def loosest(error: Error, target: float, start: float = 1e-2, last: float = 1e-7) -> Setting:
    """The largest tolerance among `start`, `start / 10`, ... `last` whose error is at most `target`, refined by thirds
    of a decade. If there is none, the tolerance with the smallest error.

    A peer's stopping rule differs from ours (step size, one decision for the whole batch), so equal tolerances would
    compare results of different accuracy.
    """
    best = Setting(start, float("inf"))
    t = start
    while t >= 0.99 * last:
        setting = Setting(t, error(t))
        if setting.error <= target:
            return _loosened(error, target, setting) if t < start else setting
        if setting.error < best.error:
            best = setting
        t /= 10
    return best


def _loosened(error: Error, target: float, setting: Setting) -> Setting:
    for third in (2, 1):
        t = setting.tolerance * 10 ** (third / 3)
        e = error(t)
        if e <= target:
            return Setting(t, e)
    return setting
