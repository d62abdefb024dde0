"""`deepreg-fast train`: bi-level training and the baselines."""

from __future__ import annotations

import inspect
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import training
from ..errors import InputError
from ..training import BaselineConfig, BilevelConfig
from .options import command_from

if TYPE_CHECKING:
    from ..training import TrainConfig

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


def _settings(cls: type[TrainConfig], given: dict[str, Any], config: Path | None, resume: Path | None) -> TrainConfig:
    """Settings from the checkpoint or the file, overridden by what was given."""
    base: dict[str, Any] = {}
    if resume is not None:
        from ..training.checkpoint import load_checkpoint

        where = resume / "last.safetensors" if resume.is_dir() else resume
        base = load_checkpoint(where)[1]["config"]
        base["out"] = str(where.parent)
    elif config is not None:
        if not config.is_file():
            raise InputError(f"--config must name a JSON file of settings, but there is none at {config}.")
        try:
            base = asdict(cls.from_json(config.read_text(encoding="utf-8")))
        except ValueError as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{config} must be a JSON object of settings, but is not: {error}.") from error
    return cls(**{**base, **given})


def _run(trainer: str, cls: type[TrainConfig], given: dict[str, Any], **extra: Path | None) -> None:
    settings = _settings(cls, given, extra["config"], extra["resume"])
    if extra["resume"] is None and (Path(settings.out) / "last.safetensors").exists():
        raise InputError(
            f"{settings.out} must be a new folder, but holds a run; go on with it by --resume {settings.out}, or name "
            "another folder with --out."
        )
    run = getattr(training, trainer)(settings)
    try:
        if extra["resume"] is not None:
            run.resume(extra["resume"])
        else:
            run.fit()
    except KeyboardInterrupt:
        typer.echo(f"Stopped after step {run.step_done}; go on with --resume {run.folder}.", err=True)
        raise typer.Exit(130) from None
    typer.echo(f"Trained {run.step_done} steps; weights are in {run.folder / 'weights.safetensors'}.")


def _register(name: str, trainer: str, config: type[TrainConfig], text: str) -> None:
    def body(given: dict[str, Any], **extra: Any) -> None:
        _run(trainer, config, given, **extra)

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
