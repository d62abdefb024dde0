"""Self-contained HTML reports: figures inside the file, no script, no outside resource."""

from __future__ import annotations

from .figures import curves_figure, images_figure, psnr_figure, roofline_figure, to_svg
from .html import Report

__all__ = ["Report", "curves_figure", "images_figure", "psnr_figure", "roofline_figure", "to_svg"]
