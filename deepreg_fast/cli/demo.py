"""`deepreg-fast demo`: training, recovery and a report in minutes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from .options import ColorOption, DeviceOption, ProblemOption, use_device


def demo(  # noqa: PLR0913 - one argument for each option of the command line
    out: Annotated[Path, typer.Option(help="Folder for the report and the run.")] = Path("demo-report"),
    steps: Annotated[int, typer.Option(help="Training steps.")] = 250,
    size: Annotated[int, typer.Option(help="Side of the held-out images.")] = 128,
    problem: ProblemOption = "cs",
    sigma: Annotated[
        float | None,
        typer.Option(
            help="Standard deviation of the measurement noise [default: 0 for cs, else 2.55/255].", show_default=False
        ),
    ] = None,
    color: ColorOption = False,
    device: DeviceOption = "cpu",
) -> None:
    """Train a small regularizer on photographs, recover held-out ones, compare with TV and with shipped weights, and
    write an HTML report.

    Examples:

    deepreg-fast demo

    deepreg-fast demo --problem deblur-gaussian --out deblurring
    """
    from .. import checks
    from ..experiments.demo import NOISE, TRAINED, run_demo
    from ..problem import Problem
    from ..terminal import table, width

    checks.integer(steps, "--steps", 1)
    checks.integer(size, "--size", 64, 300)
    noise = (0.0 if problem == "cs" else NOISE) if sigma is None else sigma
    described = Problem(problem, sigma=noise, color=color)
    outcome = run_demo(out, steps, size, device=str(use_device(device)), problem=described)
    rows = [
        (name, f"{f['psnr_mean']:.2f} dB", f"{f['psnr_median']:.2f} dB", f"{f['ssim_mean']:.3f}")
        for name, f in outcome.results.items()
    ]
    print(table(("method", "PSNR mean", "median", "SSIM"), rows, columns=width(sys.stdout)))
    print(f"The regularizer trained here in {outcome.seconds:.0f} s reaches {_against(outcome.results[TRAINED])}.")
    print(
        f"The shipped weights {outcome.best.removeprefix('shipped ')} reach {_against(outcome.results[outcome.best])}."
    )
    print(f"The report is in {outcome.report.resolve()}")


def _against(figures: dict[str, Any]) -> str:
    tv = figures["vs_tv"]
    return (
        f"{figures['psnr_mean']:.2f} dB, {tv['mean']:+.2f} dB against tuned TV, with the higher PSNR on "
        f"{tv['wins']} of {tv['images']} held-out images"
    )
