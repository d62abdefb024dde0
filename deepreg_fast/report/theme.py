"""Colors of reports in the light and the dark theme.

Figures are drawn in the light colors, so that a standalone figure looks right. In a page each of these colors is
replaced by a CSS variable, which the page sets by the reader's preference.
"""

from __future__ import annotations

import re

INK, SOFT, LINE = "#1d2733", "#5b6876", "#dde3ea"
SERIES = ("#1b6ef0", "#b74769", "#5c6f01", "#621b3c", "#173d00", "#006547", "#884a7c", "#500f79")
"""Colors of lines and of their names, found by search. Their contrast with the page is above 4.5, and any two have a
CIEDE2000 difference above 10 (14 among the first five), for normal vision and for the protanopia, deuteranopia and
tritanopia of Machado (2009). The same holds for the colors of the dark page."""

DARK_INK, DARK_SOFT, DARK_LINE = "#e6ebf1", "#a3afbc", "#333e4a"
_DARK_SERIES = ("#aea5f6", "#c96493", "#d7da3b", "#54915b", "#2cdbc1", "#9da30c", "#bce097", "#957ec5")

_NAMES = {INK: "ink", SOFT: "soft", LINE: "line", **{c: f"series-{i}" for i, c in enumerate(SERIES)}}
_DARK = (DARK_INK, DARK_SOFT, DARK_LINE, *_DARK_SERIES)


def css() -> str:
    """CSS variables of both themes."""
    light = " ".join(f"--{name}: {color};" for color, name in _NAMES.items())
    dark = " ".join(f"--{name}: {color};" for name, color in zip(_NAMES.values(), _DARK, strict=True))
    return (
        f":root {{ color-scheme: light dark; {light} --page: #fff; --tint: #eef4fd; --accent: #1f5fbf; }}\n"
        f"@media (prefers-color-scheme: dark) {{ :root {{ {dark} --page: #12181f; --tint: #1c2937; "
        "--accent: #8ab8ff; } }\n"
    )


def themed(svg: str) -> str:
    """The figure with the page's CSS variables instead of the light colors."""
    pattern = "|".join(map(re.escape, _NAMES))
    return re.sub(pattern, lambda match: f"var(--{_NAMES[match[0]]})", svg)
