"""Colours of a report in light and in dark, and how a figure takes the page's.

Figures are drawn in the light colours, so that one that stands alone looks right; inside a page each of these colours
becomes a CSS variable, which the page sets by the reader's preference.
"""

from __future__ import annotations

import re

INK, SOFT, LINE = "#1d2733", "#5b6876", "#dde3ea"
SERIES = ("#1b6ef0", "#b74769", "#5c6f01", "#621b3c", "#173d00", "#006547", "#884a7c", "#500f79")
"""Colours of lines and of their names. Found by search: contrast with the page above 4.5, and between any two a
CIEDE2000 difference above 10 (14 among the first five), with normal sight and with the protanopia, deuteranopia and
tritanopia of Machado (2009); those of the dark page likewise."""

DARK_INK, DARK_SOFT, DARK_LINE = "#e6ebf1", "#a3afbc", "#333e4a"
_DARK_SERIES = ("#aea5f6", "#c96493", "#d7da3b", "#54915b", "#2cdbc1", "#9da30c", "#bce097", "#957ec5")

_NAMES = {INK: "ink", SOFT: "soft", LINE: "line", **{c: f"series-{i}" for i, c in enumerate(SERIES)}}
_DARK = (DARK_INK, DARK_SOFT, DARK_LINE, *_DARK_SERIES)


def css() -> str:
    """The variables of both themes."""
    light = " ".join(f"--{name}: {color};" for color, name in _NAMES.items())
    dark = " ".join(f"--{name}: {color};" for name, color in zip(_NAMES.values(), _DARK, strict=True))
    return (
        f":root {{ color-scheme: light dark; {light} --page: #fff; --tint: #eef4fd; --accent: #1f5fbf; }}\n"
        f"@media (prefers-color-scheme: dark) {{ :root {{ {dark} --page: #12181f; --tint: #1c2937; "
        "--accent: #8ab8ff; } }\n"
    )


def themed(svg: str) -> str:
    """The figure in the page's variables instead of the light colours."""
    pattern = "|".join(map(re.escape, _NAMES))
    return re.sub(pattern, lambda found: f"var(--{_NAMES[found[0]]})", svg)
