"""`deepreg-fast demo`: the whole method in minutes, with a report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import DeviceOption, use_device


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the report and the run.")] = Path("demo-report"),
    steps: Annotated[int, typer.Option(help="Training steps.")] = 600,
    size: Annotated[int, typer.Option(help="Side of the held-out images.")] = 96,
    device: DeviceOption = "cpu",
) -> None:
    """Train a small regularizer on photographs, recover held-out ones, compare with TV and with shipped weights, write
    an HTML report."""
    from rich.console import Console
    from rich.table import Table

    from .. import checks
    from ..report.demo import run_demo

    checks.integer(steps, "steps", 1)
    checks.integer(size, "size", 64, 300)
    found = run_demo(out, steps, size, device=str(use_device(device)))
    table = Table("method", "PSNR mean", "median", "SSIM")
    for name, f in found.results.items():
        table.add_row(name, f"{f['psnr_mean']:.2f} dB", f"{f['psnr_median']:.2f} dB", f"{f['ssim_mean']:.3f}")
    console = Console()
    console.print(table)
    console.print(f"The report is in {found.report.resolve()}", soft_wrap=True, markup=False, highlight=False)
