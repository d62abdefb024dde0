"""Self-contained HTML reports: embedded figures, no scripts, no external resources."""

from __future__ import annotations

from .figures import lines_figure, psnr_figure, roofline_figure, strips_figure, to_svg
from .html import Report

__all__ = [
    "Report",
    "lines_figure",
    "psnr_figure",
    "roofline_figure",
    "strips_figure",
    "to_svg",
]
