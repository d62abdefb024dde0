"""Shared command-line options, and commands whose options are generated from a dataclass of settings."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from .. import checks
from ..errors import InputError
from ..problem import FIELDS, PROBLEM_HELP, Problem
from ..weights.cards import card_of

if TYPE_CHECKING:
    import torch

    from ..operators import LinearOperator
    from ..regularizers.base import Regularizer
    from ..solvers import PGDOptions

DeviceOption = Annotated[
    str, typer.Option(help="Where to compute: cpu, cuda, cuda:1 or auto (CUDA if it is available).")
]

AccelerationOption = Annotated[
    str,
    typer.Option(
        help="none (the paper's), fista or anderson [default: as in the weights' card, else fista].",
        show_default=False,
    ),
]

ProblemOption = Annotated[str, typer.Option(help=PROBLEM_HELP)]
ColorOption = Annotated[
    bool,
    typer.Option("--color", help="Read images in color. Weights of gray images are applied to each channel."),
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
    """Default weight mu: the trained one (1e-2 if the file has none), or `lam sigma^2` if that is larger. lam is taken
    from the card, otherwise `mu / sigma^2` of training with noise, otherwise the default for training without noise
    (`mu_with_noise`)."""
    from ..inverse.data_term import LAM, mu_with_noise

    mu = checks.number(meta.get("mu", 1e-2), "mu of the weight file", 0.0, open_low=True)
    trained = checks.number(_trained(meta).get("sigma", 0.0), "sigma of the weight file", 0.0)
    return mu_with_noise(mu, sigma, card_of(meta).get("lam") or (mu / trained**2 if trained else LAM))


def mu_of(lam: float, sigma: float) -> float:
    """`lam sigma^2`.

    Raises
    ------
    InputError
        If there is no noise.
    """
    if not sigma > 0:
        raise InputError("--lam needs noisy measurements (mu = lam sigma^2), but sigma is 0; give --mu instead.")
    return lam * sigma**2


def load_weights(weights: str) -> tuple[Regularizer, dict[str, Any]]:
    """The regularizer of a weight file, ours or another package's (.pt, .pth), and the notes beside it."""
    from ..adapters.peers import load_peer
    from ..weights.io import load

    return load_peer(weights) if Path(weights).suffix.lower() in (".pt", ".pth") else load(weights)


def described_by(A: LinearOperator, sigma: float) -> Problem:
    """The problem of a measurement file."""
    kind, color = A.describe()["kind"], A.image_shape[0] == 3
    if kind == "srm":
        return Problem(ratio=A.measurements / math.prod(A.image_shape), sigma=sigma, color=color)
    return Problem(kind, sigma=sigma, color=color)


def lifted(reg: Regularizer, A: LinearOperator) -> Regularizer:
    """The regularizer for the operator's images: one of gray images on each channel, or on both parts of a complex
    image."""
    from ..operators import MRI
    from ..regularizers import RealImag, for_channels

    if isinstance(A, MRI) and reg.image_channels == 1:
        return RealImag(reg)
    return for_channels(reg, A.image_shape[0])


def _trained(meta: dict[str, Any]) -> dict[str, Any]:
    """The problem that the weights were trained on, as far as their file contains it."""
    problem = card_of(meta).get("operator") or meta.get("config")
    return problem if isinstance(problem, dict) else {}


LIMIT = 500
"""Default number of gradients of a recovery, if neither the command nor the weight file sets it."""
MAX_ITERATIONS = f"Gradients per image; 0 for the limit in the weights' file, else {LIMIT}."


def pgd_options(meta: dict[str, Any], acceleration: str, max_iterations: int, **others: Any) -> PGDOptions:
    """Options of a recovery. An empty `acceleration` and `max_iterations` of 0 take the values in the weight file,
    otherwise FISTA and `LIMIT`."""
    from ..solvers import PGDOptions

    recovery = card_of(meta).get("recovery") or meta.get("recovery")
    recovery = recovery if isinstance(recovery, dict) else {}
    if not acceleration:
        others |= {k: recovery[k] for k in ("acceleration", "memory") if k in recovery}
    others.setdefault("acceleration", acceleration or "fista")
    return PGDOptions(max_iterations=max_iterations or recovery.get("max_iterations", LIMIT), **others)


def unlike_training(meta: dict[str, Any], problem: Problem) -> str:
    """Text that lists what of a problem differs from the training's: its name, or the ratio of cs and sigma by more
    than 1 %. Empty if nothing differs or the file does not contain it."""
    trained = _trained(meta)
    name = trained.get("problem", "cs")
    if problem.problem != name:
        return f"problem {problem.problem} instead of {name}"
    differences = [
        (k, trained[k], getattr(problem, k))
        for k in (("ratio", "sigma") if name == "cs" else ("sigma",))
        if isinstance(trained.get(k), (int, float)) and not math.isclose(getattr(problem, k), trained[k], rel_tol=0.01)
    ]
    return ", ".join(f"{k} {value:g} instead of {trained_value:g}" for k, trained_value, value in differences)


def use_device(name: str) -> torch.device:
    """The device named by `--device`. Makes it current in this process, and torch's convolutions on it true float32
    instead of TF32, their default."""
    import torch

    device = checks.device(name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.allow_tf32 = False
    return device


def command_from(config: type, body: Callable[..., None], extra: list[inspect.Parameter]) -> Callable[..., None]:
    """A command whose options are the fields of `config` and the parameters `extra`.

    It calls `body(fields, **extras)` with the fields that the user set.
    """
    hints = get_type_hints(config)
    # The folders first, then the problem, then the rest as declared.
    first = ("out", "data", "split", *FIELDS)
    ordered = sorted(dataclasses.fields(config), key=lambda f: first.index(f.name) if f.name in first else len(first))
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
        for f in ordered
    ]

    def command(**values: Any) -> None:
        fields = {f.name: values.pop(f.name) for f in dataclasses.fields(config)}
        body({k: v for k, v in fields.items() if v is not None}, **values)

    command.__signature__ = inspect.Signature([*extra, *parameters])  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in [*extra, *parameters]}
    command.__doc__ = body.__doc__
    return command


def _shown(default: object) -> str:
    if isinstance(default, bool):
        return "on" if default else "off"
    return "none" if default in ("", None) else str(default)
