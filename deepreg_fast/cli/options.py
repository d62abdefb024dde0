"""Command-line options made from a dataclass of settings, so that nothing is written twice."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from .. import checks
from ..weights.cards import card_of

if TYPE_CHECKING:
    import torch

    from ..solvers import PGDOptions

DeviceOption = Annotated[str, typer.Option(help="Where to compute: cpu, cuda, cuda:1 or auto (CUDA if it is here).")]

AccelerationOption = Annotated[
    str,
    typer.Option(
        help="none (the paper's), fista or anderson [default: what the weights' card tells, else fista].",
        show_default=False,
    ),
]

KeepDcOption = Annotated[
    bool | None,
    typer.Option(
        "--keep-dc/--no-keep-dc",
        help="Keep the coefficients that hold the means [default: for a permutation only].",
        show_default=False,
    ),
]


def default_mu(meta: dict[str, Any], sigma: float) -> float:
    """The weight mu to take with weights where none is given: the one they came with (1e-2 where a file tells none),
    or `lam sigma^2` where that is larger. lam is the card's, else that of the noise the weights were trained with, else
    the one that suited weights trained without (`mu_with_noise`)."""
    from ..inverse.data_term import LAM, mu_with_noise

    mu = checks.number(meta.get("mu", 1e-2), "mu of the weight file", 0.0, open_low=True)
    trained = checks.number(_trained(meta).get("sigma", 0.0), "sigma of the weight file", 0.0)
    return mu_with_noise(mu, sigma, card_of(meta).get("lam") or (mu / trained**2 if trained else LAM))


def _trained(meta: dict[str, Any]) -> dict[str, Any]:
    """The problem that weights were trained on, as far as their file tells it."""
    told = card_of(meta).get("operator") or meta.get("config")
    return told if isinstance(told, dict) else {}


LIMIT = 500
"""Gradients of a recovery where neither the command nor the weights' file tells."""
MAX_ITERATIONS = f"Gradients per image; 0 takes what the weights' file tells, else {LIMIT}."


def pgd_options(meta: dict[str, Any], acceleration: str, max_iterations: int, **others: Any) -> PGDOptions:
    """Options of a recovery; an empty `acceleration` and 0 `max_iterations` take what the weights' file tells of
    theirs, else FISTA and `LIMIT`."""
    from ..solvers import PGDOptions

    told = card_of(meta).get("recovery") or meta.get("recovery")
    told = told if isinstance(told, dict) else {}
    if not acceleration:
        others |= {k: told[k] for k in ("acceleration", "memory") if k in told}
    others.setdefault("acceleration", acceleration or "fista")
    return PGDOptions(max_iterations=max_iterations or told.get("max_iterations", LIMIT), **others)


def unlike_training(meta: dict[str, Any], **problem: float) -> str:
    """How a problem, as `ratio` and `sigma`, differs by more than 1 % from the one that weights were trained on; empty
    if it does not, or if the file does not tell its training."""
    trained = _trained(meta)
    other = [
        (k, trained[k], v)
        for k, v in problem.items()
        if isinstance(trained.get(k), (int, float)) and not math.isclose(v, trained[k], rel_tol=0.01)
    ]
    return ", ".join(f"{k} {here:g} instead of {there:g}" for k, there, here in other)


def use_device(name: str) -> torch.device:
    """The device that `--device` names, made the current one of this process; torch's convolutions there are float32
    proper, not in TF32 as is their default."""
    import torch

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
    return "none" if default in ("", None) else str(default)
