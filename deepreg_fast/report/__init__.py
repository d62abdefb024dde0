"""Self-contained HTML reports: figures inside the file, no script, no outside resource."""

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
