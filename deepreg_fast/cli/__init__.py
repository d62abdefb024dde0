"""The `deepreg-fast` command: train, recover, summary, evaluate, reproduce, demo, data, bench, info."""

from __future__ import annotations

import sys
import traceback

import typer

from ..errors import DeepRegError
from ..terminal import drop, prepare, say
from . import bench, data, demo, evaluate, info, recover, recover_many, reproduce, train

app = typer.Typer(
    name="deepreg-fast",
    help="Learned regularizers for imaging, trained bi-level. Start with 'deepreg-fast demo'.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.add_typer(train.app, name="train")
app.command()(recover.recover)
app.command("summary")(recover_many.summarize)
app.command()(evaluate.evaluate)
app.command()(reproduce.reproduce)
app.command()(demo.demo)
app.add_typer(data.app, name="data")
app.command()(bench.bench)
app.command()(info.info)


@app.callback(invoke_without_command=True)
def _root(version: bool = typer.Option(False, "--version", help="Print the version and exit.", is_eager=True)) -> None:
    if version:
        from .._version import __version__

        print(__version__)
        raise typer.Exit


def main() -> None:
    """Entry point. A `DeepRegError` prints its message on stderr and exits with code 2, without a traceback. A closed
    pipe ends the command silently."""
    prepare()
    try:
        app()
    except DeepRegError as error:
        say(f"deepreg-fast: {error}")
        _leave(2)
        sys.exit(2)
    except BrokenPipeError:
        drop()
        _leave(1)
        sys.exit(1)
    except SystemExit as error:
        _leave(error.code)
        raise
    except BaseException:
        _leave(1, unexpected=True)
        raise
    finally:
        drop()


def _leave(code: object, unexpected: bool = False) -> None:
    """End the process here if it trains with others (`training/world.py`). An `unexpected` error is printed first."""
    world = sys.modules.get("deepreg_fast.training.world")
    if world is not None and world.has_joined():
        if unexpected:
            traceback.print_exc()
        world.leave(code if isinstance(code, int) else int(bool(code)))
