"""Command-line options made from a dataclass of settings, so that nothing is written twice."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Annotated, Any, get_type_hints

import torch
import typer

from .. import checks

DeviceOption = Annotated[str, typer.Option(help="Where to compute: cpu, cuda, cuda:1 or auto (CUDA if it is here).")]


def use_device(name: str) -> torch.device:
    """The device that `--device` names, made the current one of this process; torch's convolutions there are float32
    proper, not in TF32 as is their default."""
    device = checks.device(name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.allow_tf32 = False
    return device


def command_from(config: type, body: Callable[..., None], extra: list[inspect.Parameter]) -> Callable[..., None]:
    """A command whose options are the fields of `config` and the parameters `extra`.

    It calls `body(given, **extras)`, `given` being the fields that the user set.
    """
    hints = get_type_hints(config)
    parameters = [
        inspect.Parameter(
            f.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[
                hints[f.name] | None,
                typer.Option(help=f"{f.metadata.get('help', '')} [default: {_shown(f.default)}]", show_default=False),
            ],
        )
        for f in dataclasses.fields(config)
    ]

    def command(**values: Any) -> None:
        given = {f.name: values.pop(f.name) for f in dataclasses.fields(config)}
        body({k: v for k, v in given.items() if v is not None}, **values)

    command.__signature__ = inspect.Signature([*extra, *parameters])  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in [*extra, *parameters]}
    command.__doc__ = body.__doc__
    return command


def _shown(default: object) -> str:
    if isinstance(default, bool):
        return "on" if default else "off"
    return "none" if default == "" else str(default)
