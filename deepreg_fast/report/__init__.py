"""Self-contained HTML reports: embedded figures, no scripts, no external resources."""

from __future__ import annotations

from .figures import images_figure, lines_figure, psnr_figure, roofline_figure, strips_figure, to_svg
from .html import Report

__all__ = [
    "Report",
    "images_figure",
    "lines_figure",
    "psnr_figure",
    "roofline_figure",
    "strips_figure",
    "to_svg",
]
