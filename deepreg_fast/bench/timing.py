"""Reliable timing: candidates alternate in random order, and each run validates itself."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

Timed = Callable[[int], object]
"""Called with the number of the round, so that inputs can alternate; returns its result so that no work is dropped."""

CONTROL, PLANTED = "ours again", "ours + 10 %"


@dataclass(frozen=True)
class Ratio:
    """A median of ratios with its 95 % bootstrap interval."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} [{self.low:.2f}, {self.high:.2f}]"


@dataclass(frozen=True)
class Timing:
    """Seconds of each candidate in each round, `[rounds]`, and the validity of the run."""

    seconds: dict[str, np.ndarray]
    void: str | None
    """The reason why the run is not valid, or None."""

    def median(self, name: str) -> float:
        """Median seconds."""
        return float(np.median(self.seconds[name]))

    def spread(self, name: str) -> float:
        """Half the interquartile range over the median."""
        low, high = np.percentile(self.seconds[name], [25, 75])
        return float((high - low) / 2 / self.median(name))

    def ratio(self, name: str, to: str = "ours") -> Ratio:
        """Time of `name` relative to `to`, from the ratios within each round."""
        return ratio(self.seconds[name], self.seconds[to])


def ratio(a: np.ndarray, b: np.ndarray, seed: int = 0) -> Ratio:
    """Median of `a / b` over paired rounds, with a bootstrap over the rounds."""
    r = a / b
    picks = np.random.default_rng(seed).integers(0, len(r), (2000, len(r)))
    low, high = np.percentile(np.median(r[picks], axis=1), [2.5, 97.5])
    return Ratio(float(np.median(r)), float(low), float(high))


class Clock(Protocol):
    """A clock: the host's or a device's."""

    def measure(self, f: Timed, first: int, repeats: int) -> float:
        """Seconds per call of `repeats` calls `f(first)`, `f(first + 1)`, ... in a row."""
        ...

    def wait(self, seconds: float) -> None:
        """Delay by `seconds` of the measured time."""
        ...

    def cold(self, f: Timed, k: int) -> float | None:
        """Seconds of `f(k)` with none of its inputs in the last cache; None if the clock cannot measure it."""
        ...


class HostClock:
    """The host's clock: a call is complete when it returns."""

    def measure(self, f: Timed, first: int, repeats: int) -> float:
        """Seconds per call of `repeats` calls in a row."""
        began = time.perf_counter()
        for j in range(repeats):
            f(first + j)
        return (time.perf_counter() - began) / repeats

    def wait(self, seconds: float) -> None:
        """Keep the processor busy."""
        deadline = time.perf_counter() + seconds
        while time.perf_counter() < deadline:
            pass

    def cold(self, f: Timed, k: int) -> float | None:
        """Not measured on the host."""
        return None


HOST = HostClock()


def interleave(candidates: Mapping[str, Timed], rounds: int, seed: int = 0, clock: Clock = HOST) -> Timing:
    """Time every candidate once per round, in a new random order each; `"ours"` must be among them.

    Two controls are added: our code again, whose ratio must be 1 +- 0.03, and our code with an injected slowdown of
    10 %, which must be detected. Otherwise the run is void.
    """
    ours = candidates["ours"]
    for f in candidates.values():
        f(0)
    pilot = sorted(clock.measure(ours, k, 1) for k in range(3))[1]
    # Short calls are repeated within a measurement, so that neither clock resolution nor an interruption matters.
    repeats = {n: max(1, min(1000, round(2e-2 / max(clock.measure(f, 1, 1), 1e-9)))) for n, f in candidates.items()}
    if repeats["ours"] > 1:
        # A repeated short call takes less time than a single one; the injected slowdown is a tenth of that time.
        pilot = clock.measure(ours, 0, repeats["ours"])
    all_candidates: dict[str, Timed] = {
        **candidates,
        CONTROL: ours,
        PLANTED: lambda k: (clock.wait(0.1 * pilot), ours(k)),
    }
    repeats |= {CONTROL: repeats["ours"], PLANTED: repeats["ours"]}
    order, rng = list(all_candidates), random.Random(seed)
    seconds: dict[str, list[float]] = {n: [] for n in all_candidates}
    for k in range(rounds):
        rng.shuffle(order)
        for name in order:
            seconds[name].append(clock.measure(all_candidates[name], k, repeats[name]))
    arrays = {n: np.asarray(s) for n, s in seconds.items()}
    return Timing(arrays, _void(arrays))


def cold(candidates: Mapping[str, Timed], rounds: int, clock: Clock, seed: int = 1) -> dict[str, float]:
    """Median seconds of each candidate with cold caches, alternately; empty if the clock cannot measure them."""
    order, rng = list(candidates), random.Random(seed)
    seconds: dict[str, list[float]] = {}
    for k in range(rounds):
        rng.shuffle(order)
        for name in order:
            elapsed = clock.cold(candidates[name], k)
            if elapsed is not None:
                seconds.setdefault(name, []).append(elapsed)
    return {name: float(np.median(s)) for name, s in seconds.items()}


def _void(seconds: Mapping[str, np.ndarray]) -> str | None:
    control, slower = ratio(seconds[CONTROL], seconds["ours"]), ratio(seconds[PLANTED], seconds["ours"])
    if abs(control.median - 1.0) > 0.03:
        return f"the same code timed twice differs: {control}"
    if not (slower.low > 1.0 and slower.median > 1.05):
        return f"a planted slowdown of 10 % was not seen: {slower}"
    return None
