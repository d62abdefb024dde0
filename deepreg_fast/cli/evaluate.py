"""`deepreg-fast evaluate`: comparison of methods on the test images."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import checks
from ..files import check_outputs, same_file, write_atomically
from ..terminal import Pulse, table, width
from ..weights.cards import card_of
from .options import (
    MAX_ITERATIONS,
    AccelerationOption,
    ColorOption,
    DeviceOption,
    KeepDcOption,
    ProblemOption,
    default_mu,
    pgd_options,
    unlike_training,
    use_device,
)

if TYPE_CHECKING:
    from ..evaluation.compare import Experiment, Method


WeightsOption = Annotated[
    list[str] | None,
    typer.Option(help="Weight file, or the name of a shipped one such as cs5-beta10; repeat for several methods."),
]
SplitOption = Annotated[
    str,
    typer.Option(
        help="JSON split file, 'bsd400' or 'none': its test part is evaluated, its training part tunes. "
        "Default: bsd400 for a folder with the file names of BSD400, else none.",
        show_default=False,
    ),
]
TuneOnOption = Annotated[
    str,
    typer.Option(
        help="Folder of images to tune on, or 'embedded'; then all images of --data are evaluated. Default: images "
        "of the split's training part or of --data.",
        metavar="FOLDER",
        show_default=False,
    ),
]
TuneMuOption = Annotated[
    bool,
    typer.Option(
        "--tune-mu",
        help="Tune mu of bi-level weights too. By default they keep the mu they were trained with, or with more noise "
        "lam sigma^2 if their card contains lam.",
    ),
]


def evaluate(  # noqa: PLR0913 - one argument for each option of the command line
    weights: WeightsOption = None,
    data: Annotated[str, typer.Option(help="Folder of images, or 'embedded'.")] = "embedded",
    split: SplitOption = "",
    limit: Annotated[int, typer.Option(help="Only the first N test images; 0 for all.")] = 0,
    crop: Annotated[int, typer.Option(help="Side of the images' center crop; 0 for whole images.")] = 0,
    validation: Annotated[int, typer.Option(help="Number of held-out images on which weights mu are tuned.")] = 12,
    tune_on: TuneOnOption = "",
    problem: ProblemOption = "cs",
    ratio: Annotated[float, typer.Option(help="Measurements per pixel of cs.")] = 0.2,
    transform: Annotated[str, typer.Option(help="dct, hadamard or walsh.")] = "dct",
    randomizer: Annotated[str, typer.Option(help="sign, permutation or both.")] = "sign",
    keep_dc: KeepDcOption = None,
    operator_seed: Annotated[int, typer.Option(help="Seed of the operator.")] = 0,
    sigma: Annotated[float, typer.Option(help="Standard deviation of the measurement noise.")] = 0.0,
    color: ColorOption = False,
    tune: Annotated[bool, typer.Option(help="Tune mu of the trained baselines on validation images.")] = True,
    tune_mu: TuneMuOption = False,
    acceleration: AccelerationOption = "",
    tolerance: Annotated[float, typer.Option(help="Relative residual at which a recovery has converged.")] = 1e-4,
    max_iterations: Annotated[int, typer.Option(min=0, help=MAX_ITERATIONS)] = 0,
    device: DeviceOption = "cpu",
    out: Annotated[Path | None, typer.Option(help="Also write the JSON object to this file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Compare regularizers with tuned TV and the minimum-norm solution on images that were not used for training.

    Examples:

    deepreg-fast evaluate --weights cs5-beta10 --data BSD400

    deepreg-fast evaluate --weights runs/beta10/weights.safetensors --data pictures --sigma 0.03 --tune-mu --json

    deepreg-fast evaluate --weights cs5-beta10 --data three-pictures --crop 180 --tune-on embedded

    deepreg-fast evaluate --weights cs5-ridge-net --problem deblur-gaussian --sigma 0.01 --tune-mu

    deepreg-fast evaluate --weights cs5-ridge-weak --problem deblur-gaussian --sigma 0.03 --tune-mu --color
    """
    from ..evaluation.compare import Experiment

    checks.integer(limit, "--limit", 0)
    checks.integer(crop, "--crop", 0)
    checks.integer(validation, "--validation", 1)
    split = _split(data, split)
    if out is not None:
        _check_out(out, data, split, weights or [])
    images = {"data": data, "split": split, "test_crop": crop, "tuning": validation}
    experiment = Experiment(problem, ratio, transform, randomizer, keep_dc, operator_seed, sigma, color, **images)
    recovery = {"acceleration": acceleration, "tolerance": tolerance, "max_iterations": max_iterations}
    chosen = {"limit": limit, "tune_on": tune_on, "tune": tune, "tune_mu": tune_mu, "device": str(use_device(device))}
    result = _compare(experiment, weights or [], recovery, chosen)
    text = json.dumps(result)
    if out is not None:
        write_atomically(out, text.encode())
    print(text) if as_json else _table(result)


def _compare(
    experiment: Experiment, weights: list[str], recovery: dict[str, Any], chosen: dict[str, Any]
) -> dict[str, Any]:
    """Results by method, and the settings under "settings"."""
    from ..evaluation.compare import Method, measure
    from ..evaluation.compare import evaluate as compare
    from ..evaluation.tuning import tune_mu as tuned
    from ..evaluation.tuning import tuned_tv
    from ..regularizers import for_channels
    from ..weights.io import load

    device = chosen["device"]
    measured = measure(experiment, device, chosen["limit"], chosen["tune_on"])
    tuning = measured.x_tuning, measured.y_tuning, measured.A
    loaded = [(source, *load(source)) for source in weights]
    methods = [Method("adjoint"), Method("minimum_norm")]
    # Each method is tuned, then run.
    with Pulse("evaluate", 2 * (3 + len(loaded)), "parts") as pulse:
        pulse.done(2, "tuning tv")
        methods.append(tuned_tv(*tuning))
        for source, reg, meta in loaded:
            options = pgd_options(meta, **recovery)
            mu = default_mu(meta, experiment.sigma)
            method = Method(
                _name(source, meta, methods), for_channels(reg, experiment.image_channels).to(device), mu, options
            )
            pulse.done(text=f"tuning {method.name}")
            # Only bi-level training learns mu.
            bilevel = meta.get("method") == "bilevel"
            if chosen["tune_mu"] or (chosen["tune"] and not bilevel):
                method = tuned(method, *tuning)
            elif bilevel:
                _note_mismatch(method, unlike_training(meta, experiment))
            methods.append(method)
        pulse.done()
        result: dict[str, Any] = dict(compare(methods, measured.x, measured.y, measured.A, pulse.done))
    # The options of the recoveries come from the command line or from the weight files.
    solved = {
        option: {m.name: getattr(m.options, option) for m in methods if m.reg is not None}
        for option in ("acceleration", "max_iterations")
    }
    described = asdict(experiment)
    described["crop"], described["validation"] = described.pop("test_crop"), described.pop("tuning")
    result["settings"] = {**described, **chosen, **recovery, **solved, "images": list(measured.names)}
    return result


def _split(data: str, split: str) -> str:
    """The split to use: the named one, otherwise that of BSD400 if the images are BSD400's, otherwise none."""
    if split or data == "embedded":
        return "" if split == "none" else split
    from ..data import is_bsd400

    if not is_bsd400(data):
        return ""
    typer.echo(
        f"{data} holds the images of BSD400: its 30 test images are evaluated, as by --split bsd400 "
        "(--split none evaluates all images).",
        err=True,
    )
    return "bsd400"


def _name(source: str, meta: dict[str, Any], others: list[Method]) -> str:
    """A unique name of the row: the name of shipped weights, otherwise the method that trained the weights."""
    path = Path(source)
    name = str(card_of(meta).get("name") or meta.get("method", path.stem))
    # The JSON object has one key per name, and the key "settings".
    taken = {"settings", *(m.name for m in others)}
    unique = name if name not in taken else f"{name}:{path.parent.name}"
    while unique in taken:
        unique += "'"
    return unique


def _note_mismatch(method: Method, differs: str) -> None:
    """Note on stderr that a method was trained for another problem, but keeps its trained mu."""
    if differs:
        typer.echo(
            f"{method.name} was trained for another problem (here {differs}): mu is {method.mu:.2g}, see --tune-mu.",
            err=True,
        )


def _check_out(out: Path, data: str, split: str, weights: list[str]) -> None:
    """Check that the output file replaces no input file."""
    from ..data import image_names
    from ..weights.io import locate

    inputs: list[str | Path] = [locate(w) for w in weights]
    inputs += [split] if split and split != "bsd400" else []
    if data != "embedded" and same_file(out.parent, Path(data)):
        inputs += [Path(data) / name for name in image_names(data)]
    check_outputs([out], inputs, "name another --out")


def _table(result: dict[str, Any]) -> None:
    head = ("method", "PSNR mean", "median", "SSIM", "vs TV", "wins", "gradients", "s/image", "status", "mu")
    rows = []
    for name, f in result.items():
        if name == "settings":
            continue
        vs_tv = f.get("vs_tv")
        rows.append(
            (
                name,
                f"{f['psnr_mean']:.2f}",
                f"{f['psnr_median']:.2f}",
                f"{f['ssim_mean']:.3f}",
                f"{vs_tv['mean']:+.2f}" if vs_tv else "",
                f"{vs_tv['wins']}/{vs_tv['images']}" if vs_tv else "",
                f"{sum(f['gradients']) / len(f['gradients']):.0f}",
                f"{f['seconds'] / len(f['psnr']):.2f}",
                ", ".join(f"{v} {k}" for k, v in f["status"].items()),
                "" if f["mu"] is None else f"{f['mu']:.2g}",
            )
        )
    print(table(head, rows, columns=width(sys.stdout)))
