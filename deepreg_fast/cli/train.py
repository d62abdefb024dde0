"""`deepreg-fast train`: bi-level training and the baselines."""

from __future__ import annotations

import inspect
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import training
from ..errors import CheckpointError, InputError
from ..files import check_outputs
from ..training import BaselineConfig, BilevelConfig
from .options import command_from

if TYPE_CHECKING:
    from ..training import TrainConfig, Trainer
    from ..training.world import World

app = typer.Typer(help="Train a regularizer: bilevel, or one of the baselines.", no_args_is_help=True)

_RESUME = inspect.Parameter(
    "resume",
    inspect.Parameter.KEYWORD_ONLY,
    default=None,
    annotation=Annotated[
        Path | None, typer.Option(help="Go on with the run in this folder; its settings are taken from its checkpoint.")
    ],
)
_CONFIG = inspect.Parameter(
    "config",
    inspect.Parameter.KEYWORD_ONLY,
    default=None,
    annotation=Annotated[Path | None, typer.Option(help="JSON file of settings; options on the line override it.")],
)


def _settings(method: str, cls: type[TrainConfig], chosen: dict[str, Any], **extra: Path | None) -> TrainConfig:
    """Settings from the checkpoint or the file, overridden by those from the command line."""
    config, resume = extra["config"], extra["resume"]
    base: dict[str, Any] = {}
    if resume is not None:
        from ..training.checkpoint import load_checkpoint

        source = resume / "last.safetensors" if resume.is_dir() else resume
        state = load_checkpoint(source)[1]
        if state.get("method") != method:
            raise CheckpointError(
                f"{source} must be a {method!r} run, but is a {state.get('method')!r} run; resume it with "
                f"'deepreg-fast train {str(state.get('method')).replace('_', '-')}'."
            )
        base = state["config"]
        base["out"] = str(source.parent)
    elif config is not None:
        try:
            base = asdict(cls.from_json(config.read_text(encoding="utf-8")))
        except OSError as error:
            raise InputError(
                f"--config must name a JSON file of settings, but {config} cannot be read ({error.strerror or error})."
            ) from error
        except ValueError as error:
            raise InputError(f"{config} must be a JSON object of settings: {error}") from error
    return cls.from_values({**base, **chosen})


def _run(name: str, cls: type[TrainConfig], chosen: dict[str, Any], **extra: Path | None) -> None:
    from ..training.world import joined

    with joined() as world:
        _train(world, getattr(training, name), cls, chosen, **extra)


def _train(world: World, trainer: Any, cls: type[TrainConfig], chosen: dict[str, Any], **extra: Path | None) -> None:
    from ..training.world import was_restarted

    settings = _settings(trainer.method, cls, chosen, **extra)
    if was_restarted() and (Path(settings.out) / "last.safetensors").exists():
        # torchrun starts the same command again: what the failed one saved goes on.
        extra = {"config": None, "resume": extra["resume"] or Path(settings.out)}
        settings = _settings(trainer.method, cls, {}, **extra)
    world.check_lanes(settings.lanes)
    resume, config = extra["resume"], extra["config"]
    if resume is None and (Path(settings.out) / "last.safetensors").exists():
        raise InputError(
            f"{settings.out} must be a new folder, but holds a run; go on with it by --resume {settings.out}, or name "
            "another folder with --out."
        )
    if config is not None:
        from ..training.folder import FILES

        check_outputs((Path(settings.out) / f for f in FILES), [config], "name another folder with --out")
    run: Trainer = trainer(settings)
    try:
        with _stopped_by_signals(run):
            if resume is not None:
                run.resume(resume)
            else:
                run.fit()
    except KeyboardInterrupt:
        if world.is_first:
            typer.echo(f"Stopped after step {run.step_done}; go on with --resume {run.folder}.", err=True)
        raise typer.Exit(130) from None
    if world.is_first:
        typer.echo(f"Trained {run.step_done} steps; weights are in {run.folder / 'weights.safetensors'}.")


@contextmanager
def _stopped_by_signals(run: Trainer) -> Iterator[None]:
    """The first SIGINT or SIGTERM ends the training after the current step with a checkpoint; the second, at once."""

    def stop(*_: object) -> None:
        if run.stopping:
            raise KeyboardInterrupt
        run.stopping = True

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for name, handler in previous.items():
            signal.signal(name, handler)


def _register(name: str, trainer: str, config: type[TrainConfig], text: str) -> None:
    def body(chosen: dict[str, Any], **extra: Any) -> None:
        _run(trainer, config, chosen, **extra)

    body.__doc__ = text
    app.command(name)(command_from(config, body, [_RESUME, _CONFIG]))


_register(
    "bilevel",
    "BilevelTrainer",
    BilevelConfig,
    "Train a regularizer so that recovery with it gives back the images.\n\n"
    "Example: deepreg-fast train bilevel --data BSD400 --split bsd400 --steps 5000 --beta 10 --out runs/beta10",
)
_register("denoiser", "DenoiserTrainer", BaselineConfig, "RED: train a denoiser d, recover with the field x - d(x).")
_register("gradient-step", "GradientStepTrainer", BaselineConfig, "Train x - grad r(x) to denoise.")
_register("adversarial", "AdversarialTrainer", BaselineConfig, "Train an input-convex critic of true images.")
