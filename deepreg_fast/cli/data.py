"""`deepreg-fast data`: data sets."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Get data sets.", no_args_is_help=True)


@app.callback()
def _data() -> None:
    """Makes typer treat `bsd400` as a subcommand although it is the only one."""


@app.command()
def bsd400(
    out: Annotated[Path, typer.Option(help="Folder for the 400 images.")] = Path("BSD400"),
    base_url: Annotated[str, typer.Option(help="Where the files are; empty for the public copy.")] = "",
) -> None:
    """Download the 400 gray 180 x 180 images of BSD400, verified by SHA-256. Valid files that exist are kept."""
    from ..data import BASE_URL, download_bsd400

    download_bsd400(out, base_url or BASE_URL)
    typer.echo(f"The 400 images are in {out}; the split into 370 and 30 is known as --split bsd400.")
