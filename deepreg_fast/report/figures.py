"""Figures of a report, from plain data, as SVG elements."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLORS = ("#1f6feb", "#d1242f", "#1a7f37", "#8250df", "#9a6700", "#57606a")


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def to_svg(figure: Figure) -> str:
    """The `<svg>` element of a figure, with text as shapes so that it looks the same everywhere."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    svg = text[text.index("<svg") :]
    # The namespace of matplotlib's metadata is an outside address that nothing here needs.
    return re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)


def curves_figure(
    loss: tuple[Sequence[float], Sequence[float]], validation: tuple[Sequence[float], Sequence[float]]
) -> str:
    """Training loss (steps, values; log scale, with its running mean) beside validation PSNR (steps, dB)."""
    figure = _figure(9.0, 3.2)
    left, right = figure.subplots(1, 2)
    steps, values = np.asarray(loss[0]), np.asarray(loss[1])
    left.semilogy(steps, values, color=COLORS[0], alpha=0.25, linewidth=1)
    width = max(1, len(values) // 30)
    if len(values) > width:
        mean = np.convolve(values, np.ones(width) / width, "valid")
        left.semilogy(steps[width - 1 :], mean, color=COLORS[0], linewidth=2)
    left.set(xlabel="step", ylabel="1000 × mean squared error")
    right.plot(validation[0], validation[1], color=COLORS[1], marker="o", markersize=4)
    right.set(xlabel="step", ylabel="validation PSNR (dB)")
    _tidy(left, right)
    return to_svg(figure)


def psnr_figure(curves: Mapping[str, tuple[Sequence[float], Sequence[float]]]) -> str:
    """Mean PSNR against gradient evaluations, one line a method: name -> (gradients, dB)."""
    figure = _figure(9.0, 3.6)
    axis = figure.subplots()
    for color, (name, (x, y)) in zip(COLORS, curves.items(), strict=False):
        axis.plot(x, y, color=color, linewidth=2, label=name)
    axis.set(xlabel="evaluations of the gradient of r", ylabel="mean PSNR (dB)")
    axis.legend(frameon=False)
    _tidy(axis)
    return to_svg(figure)


def roofline_figure(points: Mapping[str, tuple[float, float, float]], flops: float, bandwidth: float) -> str:
    """Rates under the machine's roof: name -> (flops, bytes, seconds); the bounds in GFLOP/s and GB/s."""
    figure = _figure(9.0, 4.0)
    axis = figure.subplots()
    at = [f / b for f, b, _ in points.values()] or [1.0]
    x = np.geomspace(min(0.1, *at) / 2, max(100.0, *at) * 2, 200)
    axis.loglog(x, np.minimum(flops, bandwidth * x), color=COLORS[-1], linewidth=1.5)
    axis.annotate(f"{flops:.0f} GFLOP/s of multiply-adds", (x[-1], flops), ha="right", va="bottom", fontsize=9)
    for color, (name, (f, b, s)) in zip(COLORS, points.items(), strict=False):
        axis.plot(f / b, f / s / 1e9, "o", color=color, label=f"{name}: {f / s / 1e9:.0f} GFLOP/s")
    axis.set(xlabel="flops per byte from memory", ylabel="GFLOP/s (direct sums)")
    axis.legend(frameon=False, loc="lower right")
    _tidy(axis)
    return to_svg(figure)


def images_figure(columns: Sequence[str], rows: Sequence[Sequence[tuple[np.ndarray, str, str]]]) -> str:
    """A grid of images: each cell is `(image [H, W], caption, kind)`, kind "gray" (0 to 1), "auto" or "error"."""
    figure = _figure(2.2 * len(columns), 2.45 * len(rows))
    axes = figure.subplots(len(rows), len(columns), squeeze=False)
    for i, row in enumerate(rows):
        for j, (image, caption, kind) in enumerate(row):
            axis = axes[i][j]
            low, high, colors = 0.0, 1.0, "gray"
            if kind == "auto":
                low, high = float(image.min()), float(image.max())
            elif kind == "error":
                low, high, colors = -0.2, 0.2, "RdBu"
            axis.imshow(image, cmap=colors, vmin=low, vmax=high, interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
            axis.set_xlabel(caption, fontsize=9)
            if i == 0:
                axis.set_title(columns[j], fontsize=10)
    return to_svg(figure)


def _tidy(*axes) -> None:  # type: ignore[no-untyped-def]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
