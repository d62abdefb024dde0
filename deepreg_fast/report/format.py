"""Number formatting for reports: significant digits only; a dash for missing values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np

NONE = "–"


def fixed(value: float | None, digits: int) -> str:
    """A number with `digits` decimals: `27.76`."""
    return NONE if value is None else f"{value:.{digits}f}".replace("-", "−")


def signed(value: float | None, digits: int = 2) -> str:
    """A number with its sign: `+0.75`."""
    return NONE if value is None else f"{value:+.{digits}f}".replace("-", "−")


def difference(comparison: Mapping[str, Any] | None) -> str:
    """Mean of paired differences with its interval: `+0.75 [+0.61, +0.90]`."""
    if not comparison:
        return NONE
    interval = comparison.get("interval")
    ends = f" [{signed(interval[0])}, {signed(interval[1])}]" if isinstance(interval, Sequence) else ""
    return signed(comparison.get("mean")) + ends


def wins(comparison: Mapping[str, Any] | None) -> str:
    """Number of wins: `27 of 30`."""
    if not comparison or "wins" not in comparison or "images" not in comparison:
        return NONE
    return f"{comparison['wins']} of {comparison['images']}"


def whole(value: float | None) -> str:
    """A number without decimals, with thousands separators: `3,057`."""
    return NONE if value is None else f"{value:,.0f}"


def significant(value: float | None, digits: int = 2) -> str:
    """A number with `digits` significant digits, without an exponent if it is readable: `0.0012`."""
    return NONE if value is None else f"{value:#.{digits}g}".rstrip(".").replace("-", "−")


def duration(seconds: float | None) -> str:
    """A duration: `8.1 s`, `12 min`, `3.1 h`."""
    if seconds is None:
        return NONE
    if seconds < 90:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def milliseconds(seconds: float | None, count: int) -> str:
    """Milliseconds per item, for `count` items in `seconds`: `136`, `0.4`."""
    if seconds is None or not count:
        return NONE
    value = 1e3 * seconds / count
    return f"{value:,.0f}" if value >= 10 else f"{value:.1f}"


def times(value: float | None) -> str:
    """A factor: `1.30 ×`."""
    return NONE if value is None else f"{value:.2f} ×"


def median(values: np.ndarray) -> float | None:
    """The median of the finite values; None if there are none."""
    finite = values[np.isfinite(values)]
    return float(np.median(finite)) if len(finite) else None


def largest(values: np.ndarray) -> float | None:
    """The largest finite value; None if there is none."""
    finite = values[np.isfinite(values)]
    return float(finite.max()) if len(finite) else None


def ratio(value: float) -> str:
    """A ratio of measurements, as a fraction if possible: `1/5`."""
    fraction = Fraction(value).limit_denominator(50)
    return str(fraction) if abs(float(fraction) - value) < 1e-9 else f"{value:.3g}"


def counted(status: Mapping[str, Any]) -> str:
    """Counts of statuses: `28 converged, 2 max iterations`."""
    positive = {k: v for k, v in status.items() if isinstance(v, int) and v > 0}
    return ", ".join(f"{v} {k.replace('_', ' ')}" for k, v in sorted(positive.items(), key=lambda p: -p[1])) or NONE


def listed(items: Sequence[str]) -> str:
    """A list in words: `a, b and c`."""
    return ", ".join(items[:-1]) + " and " + items[-1] if len(items) > 1 else "".join(items)


def plain(value: Any) -> str:
    """A value of a settings file, without quotes or braces."""
    if isinstance(value, dict):
        return pairs(value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    return NONE if value in (None, "") else str(value)


def pairs(values: Mapping[str, Any]) -> str:
    """Names with values: `max_iterations 500, tolerance 0.0001`."""
    return ", ".join(f"{k} {plain(v)}" for k, v in values.items() if v is not None) or NONE
