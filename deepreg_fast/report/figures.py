"""Figures of reports, from plain data, as SVG elements."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from .theme import INK, LINE, SERIES, SOFT

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DASHES = ("-", (0, (5, 1.6)), (0, (5, 1.5, 1, 1.5)))
SMALL = 4.6
"""Width in inches of a panel, chosen so that its text is readable on a phone and next to another panel."""
_LETTERS = 8.5
_LONGEST = 27
_STEP = 0.14


@dataclass(frozen=True)
class Line:
    """One line of a chart, labeled at its end."""

    name: str
    x: Sequence[float] | np.ndarray
    y: Sequence[float] | np.ndarray
    style: int | None = 0
    """Number of its color and dashes; None for the reference, in gray."""
    smooth: bool = False
    """Draw a running mean over faint values."""

    @property
    def color(self) -> str:
        """The line's color."""
        return _color(self.style)

    @property
    def dashes(self) -> Any:
        """Solid for the first half of the colors, then other dashes for each further half."""
        return ":" if self.style is None else DASHES[self.style * 2 // len(SERIES) % len(DASHES)]


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def to_svg(figure: Figure, transparent: bool = True) -> str:
    """The `<svg>` element of a figure, with text as shapes, so that it looks the same everywhere."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None}, transparent=transparent)
    text = buffer.getvalue()
    svg = text[text.index("<svg") :]
    # Matplotlib's metadata contains an external address, which is not needed.
    return re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)


def lines_figure(
    lines: Sequence[Line], xlabel: str, ylabel: str, log: str = "", height: float = 3.2, *, opaque: bool = False
) -> str:
    """A panel of lines with their names at their ends. `log` names the axes with a logarithmic scale ("x", "xy").
    `opaque` draws a background, for pages of unknown color.

    Points that are not finite, or not positive on a logarithmic scale, are omitted.
    """
    figure = _figure(SMALL, height)
    axis = figure.subplots()
    lines = [line for line in (_drawable(line, log) for line in lines) if len(line.x)]
    for line in lines:
        if line.smooth:
            axis.plot(line.x, line.y, color=line.color, alpha=0.2, linewidth=0.8)
    lines = [_smoothed(line) for line in lines]
    for line in lines:
        x, y = np.asarray(line.x, float), np.asarray(line.y, float)
        axis.plot(x, y, color=line.color, linestyle=line.dashes, linewidth=1.6)
        axis.plot(x[-1:], y[-1:], color=line.color, marker="o", markersize=3.5)
    axis.locator_params(nbins=6)
    if lines and "x" in log:
        axis.set_xscale("log")
        _logarithmic(axis.xaxis, [np.asarray(line.x, float) for line in lines])
    if lines and "y" in log:
        axis.set_yscale("log")
        _logarithmic(axis.yaxis, [np.asarray(line.y, float) for line in lines])
    axis.set_xlabel(xlabel)
    axis.set_ylabel(ylabel)
    _tidy(axis)
    _name_ends(axis, [line for line in lines if line.name], height)
    return to_svg(figure, transparent=not opaque)


def psnr_figure(curves: Mapping[str, tuple[Sequence[float], Sequence[float]]]) -> str:
    """Mean PSNR against gradient evaluations, one line per method: name -> (gradients, dB)."""
    lines = [Line(name, x, y, i) for i, (name, (x, y)) in enumerate(curves.items())]
    return lines_figure(lines, "evaluations of the gradient of r", "mean PSNR (dB)")


@dataclass(frozen=True)
class Strip:
    """Values of one kind in one row of a strip chart: a dot for each, a stroke for the median."""

    values: Sequence[float] | np.ndarray
    style: int | None = 0


def strips_figure(
    rows: Mapping[str, Sequence[Strip]],
    xlabel: str,
    log: bool = False,
    mark: float | None = None,
    legend: Sequence[tuple[str, int]] = (),
) -> str:
    """Strip chart with one row per name and a dot per image. `mark` draws a vertical line; `legend` names styles."""
    height = (1.0 if legend else 0.75) + sum(0.1 + _STEP * max(1, len(strips)) for strips in rows.values())
    figure = _figure(SMALL, height)
    axis = figure.subplots()
    y, ticks = 0.0, []
    for strips in rows.values():
        ticks.append(y + _STEP * (len(strips) - 1) / 2)
        for strip in strips:
            values = np.asarray(strip.values, float)
            color = _color(strip.style)
            axis.plot(values, np.full(len(values), y), "o", color=color, markersize=3.2, alpha=0.4, markeredgewidth=0)
            axis.plot([np.median(values)], [y], "|", color=color, markersize=9, markeredgewidth=2)
            y += _STEP
        y += 0.1
    if log:
        axis.set_xscale("log")
        _logarithmic(axis.xaxis, [np.asarray(s.values, float) for strips in rows.values() for s in strips])
    if mark is not None:
        axis.axvline(mark, color=INK, linewidth=1, linestyle=DASHES[1])
    axis.set_yticks(ticks, list(rows))
    axis.set_ylim(y, -0.15)
    axis.set_xlabel(xlabel)
    _tidy(axis)
    axis.grid(visible=False, axis="y")
    axis.tick_params(axis="y", length=0, labelcolor=INK)
    for name, style in legend:
        axis.plot([], [], "o", color=SERIES[style], markersize=4, label=name)
    if legend:
        figure.legend(loc="outside upper right", ncols=3, frameon=False, fontsize=_LETTERS, labelcolor=INK)
    return to_svg(figure)


def roofline_figure(points: Mapping[str, tuple[float, float, float]], flops: float, bandwidth: float) -> str:
    """Roofline plot of name -> (flops, bytes, seconds); the bounds are in GFLOP/s and GB/s."""
    figure = _figure(9.0, 4.0)
    axis = figure.subplots()
    intensities = [f / b for f, b, _ in points.values()] or [1.0]
    x = np.geomspace(min(0.1, *intensities) / 2, max(100.0, *intensities) * 2, 200)
    axis.loglog(x, np.minimum(flops, bandwidth * x), color=SOFT, linewidth=1.5)
    axis.annotate(f"{flops:.0f} GFLOP/s of multiply-adds", (x[-1], flops), ha="right", va="bottom", fontsize=9)
    for i, (name, (f, b, s)) in enumerate(points.items()):
        color = SERIES[i % len(SERIES)]
        axis.plot(f / b, f / s / 1e9, "o", color=color, label=f"{name}: {f / s / 1e9:.0f} GFLOP/s")
    axis.set(xlabel="flops per byte from memory", ylabel="GFLOP/s (direct sums)")
    axis.legend(frameon=False, loc="lower right")
    _tidy(axis)
    return to_svg(figure, transparent=False)


def _color(style: int | None) -> str:
    return SOFT if style is None else SERIES[style % len(SERIES)]


def _drawable(line: Line, log: str) -> Line:
    x, y = np.asarray(line.x, float), np.asarray(line.y, float)
    drawable = np.isfinite(x) & np.isfinite(y) & ((x > 0) | ("x" not in log)) & ((y > 0) | ("y" not in log))
    return replace(line, x=x[drawable], y=y[drawable])


def _smoothed(line: Line) -> Line:
    """The running mean over a thirtieth of the line, if it is to be smoothed."""
    width = max(1, len(line.y) // 30) if line.smooth else 1
    y = np.convolve(np.asarray(line.y, float), np.ones(width) / width, "valid")
    return replace(line, x=line.x[width - 1 :], y=y)


def _name_ends(axis: Axes, lines: Sequence[Line], height: float) -> None:
    """Place the names to the right of the axis, each as close to the end of its line as the others allow, and draw
    connectors from the ends to the names. Connectors do not cross."""
    from scipy.optimize import isotonic_regression

    if not lines:
        return
    axis.set_xlim(axis.get_xlim())
    axis.set_ylim(axis.get_ylim())
    to_axis = axis.transData + axis.transAxes.inverted()
    points = [to_axis.transform((line.x[-1], line.y[-1])) for line in lines]
    ends = sorted(zip(points, lines, strict=True), key=lambda end: end[0][1])
    gap = 1.25 * _LETTERS / (72 * (height - 0.6))
    steps = gap * np.arange(len(ends))
    target = np.array([y for (_, y), _ in ends]) - steps
    placed = np.clip(isotonic_regression(target).x, 0.0, max(0.0, 1.0 - gap * (len(ends) - 1))) + steps
    for ((x, y), line), label_y in zip(ends, placed, strict=True):
        style = {"color": line.color, "linewidth": 0.6, "alpha": 0.7, "transform": axis.transAxes, "clip_on": False}
        axis.plot([x, 1.01, 1.06, 1.075], [y, y, label_y, label_y], **style)
        name = line.name if len(line.name) <= _LONGEST else line.name[: _LONGEST - 1] + "…"
        color = INK if line.style is None else line.color
        axis.text(1.09, label_y, name, transform=axis.transAxes, va="center", fontsize=_LETTERS, color=color)


def _logarithmic(axis: Any, values: Sequence[np.ndarray]) -> None:
    """Ticks at 1, 2, 5 if the values are within two decades, otherwise at powers of ten; without exponents."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = min(float(v.min()) for v in values), max(float(v.max()) for v in values)
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < 100 * low else (1.0,)))
    axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    axis.set_minor_formatter(NullFormatter())


def _tidy(axis: Axes) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color(SOFT)
    axis.grid(color=LINE, linewidth=0.7)
    axis.set_axisbelow(True)
    axis.tick_params(colors=SOFT, labelsize=_LETTERS, which="both")
    for label in (axis.xaxis.label, axis.yaxis.label):
        label.set(color=INK, fontsize=_LETTERS + 0.5)
