"""`deepreg-fast reproduce`: the paper's table from a settings file."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..problem import PROBLEM_HELP
from .options import DeviceOption

if TYPE_CHECKING:
    from ..experiments import Reproduction

ProblemOption = Annotated[
    str, typer.Option(help=f"{PROBLEM_HELP} Default: what the settings name.", show_default=False)
]
SigmaOption = Annotated[
    float | None,
    typer.Option(help="Standard deviation of the noise; default: what the settings name.", show_default=False),
]


def reproduce(  # noqa: PLR0913 - one argument for each option of the command line
    data: Annotated[str, typer.Option(help="Folder of images, or 'embedded'; default: what the settings name.")] = "",
    out: Annotated[Path, typer.Option(help="Folder of the reproduction.")] = Path("reproduction"),
    settings: Annotated[str, typer.Option(help="bsd400, quick, ledger, or a TOML file.")] = "bsd400",
    quick: Annotated[bool, typer.Option("--quick", help="The settings 'quick': minutes, on embedded images.")] = False,
    problem: ProblemOption = "",
    sigma: SigmaOption = None,
    rows: Annotated[str, typer.Option(help="Only these rows, separated by commas, and those they begin from.")] = "",
    group: Annotated[str, typer.Option(help="Only the rows of this group: paper, beyond or ledger.")] = "",
    workers: Annotated[int, typer.Option(help="Processes at a time; 0: one a core, or one on a GPU.")] = 0,
    device: DeviceOption = "cpu",
    report_only: Annotated[bool, typer.Option("--report-only", help="Run nothing; write tables and report.")] = False,
) -> None:
    """Train and evaluate every row of a table, and write the table and a report. Run the same command again to resume.

    Examples:

    deepreg-fast reproduce --data BSD400 --out reproduction

    deepreg-fast reproduce --quick --problem inpaint --sigma 0.01 --out inpainting
    """
    from .. import checks
    from ..errors import InputError
    from ..experiments import load_settings
    from ..experiments import reproduce as run
    from ..files import same_file

    if quick and settings != "bsd400":
        raise InputError("--quick stands for --settings quick; give one of the two.")
    checks.integer(workers, "--workers", 0)
    if data and data != "embedded" and same_file(out, Path(data)):
        raise InputError(f"--out must be another folder than --data, but both are {data}; name another one.")
    parsed = load_settings("quick" if quick else settings, problem, sigma)
    outcome = run(
        parsed.with_data(data) if data else parsed,
        out,
        rows=tuple(n for n in rows.split(",") if n),
        group=group,
        device=device,
        workers=workers,
        report_only=report_only,
        command=shlex.join(["deepreg-fast", *sys.argv[1:]]),
    )
    _print_outcome(outcome, out)


def _print_outcome(outcome: Reproduction, out: Path) -> None:
    """Print the table and what failed; exit with a code other than 0 if the reproduction is not complete."""
    if outcome.results:
        _table(outcome.results)
    if outcome.report is not None:
        typer.echo(
            f"The report is in {outcome.report}; figures are in {out / 'results.json'} and {out / 'results.csv'}."
        )
    for name, sentence in outcome.failed.items():
        typer.echo(f"deepreg-fast: {name} failed: {sentence}", err=True)
    if outcome.fatal:
        typer.echo(f"deepreg-fast: {outcome.fatal}", err=True)
    if outcome.failed or outcome.fatal:
        raise typer.Exit(2)
    if outcome.stopped:
        typer.echo("Stopped; the same command goes on from here.", err=True)
        raise typer.Exit(130)


def _table(results: list[dict[str, Any]]) -> None:
    from ..terminal import table, width

    rows = []
    for r in results:
        v, poster = r["vs_tv"], r["poster"] or {}
        rows.append(
            (
                r["label"],
                f"{r['psnr_mean']:.2f}",
                f"{r['psnr_median']:.2f}",
                f"{r['ssim_mean']:.3f}",
                f"{v['mean']:+.2f}" if v else "",
                f"{v['wins']}/{v['images']}" if v else "",
                f"{poster['psnr']:.2f}" if "psnr" in poster else "",
            )
        )
    head = ("row", "PSNR mean", "median", "SSIM", "vs TV", "wins", "poster")
    print(table(head, rows, columns=width(sys.stdout)))
