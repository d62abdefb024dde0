"""`deepreg-fast evaluate`: methods side by side on the test images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from ..data import ImageSet, carve_validation, centre_crop, embedded_images, load_folder, load_split
from ..errors import InputError
from ..evaluation import Method, tune_mu, tuned_tv
from ..evaluation import evaluate as compare
from ..fidelity import add_noise
from ..files import write_atomically
from ..operators import SRM
from ..solvers import PGDOptions
from ..weights import load
from .options import DeviceOption, use_device


def evaluate(  # noqa: PLR0913 - one argument for each option of the command line
    weights: Annotated[list[Path] | None, typer.Option(help="Weight files; repeat for several methods.")] = None,
    data: Annotated[str, typer.Option(help="Folder of images, or 'embedded'.")] = "embedded",
    split: Annotated[str, typer.Option(help="JSON split file, or 'bsd400': its test part is evaluated.")] = "",
    limit: Annotated[int, typer.Option(help="Only the first N test images; 0 for all.")] = 0,
    crop: Annotated[int, typer.Option(help="Centre crop of the images; 0 takes them whole.")] = 0,
    validation: Annotated[int, typer.Option(help="Training images on which weights mu are tuned.")] = 6,
    ratio: Annotated[float, typer.Option(help="Measurements per pixel.")] = 0.2,
    transform: Annotated[str, typer.Option(help="dct, hadamard or walsh.")] = "dct",
    randomizer: Annotated[str, typer.Option(help="sign, permutation or both.")] = "sign",
    operator_seed: Annotated[int, typer.Option(help="Seed of the operator.")] = 0,
    sigma: Annotated[float, typer.Option(help="Standard deviation of the measurement noise.")] = 0.0,
    tune: Annotated[bool, typer.Option(help="Tune mu of the trained baselines on validation images.")] = True,
    acceleration: Annotated[str, typer.Option(help="none (the paper's), fista or anderson.")] = "anderson",
    tolerance: Annotated[float, typer.Option(help="Relative residual at which a recovery has converged.")] = 1e-4,
    max_iterations: Annotated[int, typer.Option(help="Gradients per image.")] = 500,
    device: DeviceOption = "cpu",
    out: Annotated[Path | None, typer.Option(help="Also write the JSON object to this file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Compare regularizers with tuned TV and the minimum-norm solution on images that nobody trained on.

    Example: deepreg-fast evaluate --weights runs/beta10/weights.safetensors --data BSD400 --split bsd400 --json
    """
    settings = {k: v for k, v in locals().items() if k not in ("weights", "out", "as_json")}
    place = use_device(device)
    settings["device"] = str(place)
    test, tuning = _images(data, split, crop, validation)
    if limit:
        test = ImageSet(test.names[:limit], test.x[:limit])
    A = SRM(
        (1, test.x.shape[-2], test.x.shape[-1]), ratio, transform=transform, randomizer=randomizer, seed=operator_seed
    )
    # Measured on the CPU, so that every device is given the same numbers.
    y = add_noise(A.A(test.x), sigma, seed=1).to(place)
    y_tuning = add_noise(A.A(tuning), sigma, seed=2).to(place)
    A, x, tuning = A.to(place), test.x.to(place), tuning.to(place)
    options = PGDOptions(max_iterations, tolerance, acceleration)
    methods = [Method("adjoint"), Method("minimum_norm"), tuned_tv(tuning, y_tuning, A)]
    for path in weights or []:
        methods.append(_method(path, methods, options, place))
        if tune and _needs_tuning(path):
            methods[-1] = tune_mu(methods[-1], tuning, y_tuning, A)
    result: dict[str, Any] = dict(compare(methods, x, y, A))
    result["settings"] = {**settings, "images": list(test.names)}
    text = json.dumps(result)
    if out is not None:
        write_atomically(out, text.encode())
    print(text) if as_json else _table(result)


def _images(data: str, split: str, crop: int, validation: int) -> tuple[ImageSet, torch.Tensor]:
    """Test images, and images of the training part for tuning; the two share none."""
    if data == "embedded":
        train, test = embedded_images(crop or 96)
        return test, train.x[:: max(1, len(train.x) // max(1, validation))][:validation]
    if split:
        names = load_split(split)
        test = load_folder(data, names=names.test)
        tuning = load_folder(data, names=carve_validation(names.train, validation, 0)[1])
    else:
        images = load_folder(data)
        if len(images.names) <= validation:
            raise InputError(
                f"{data} must hold more images than the {validation} set apart for tuning, but holds "
                f"{len(images.names)}; add images, or lower --validation."
            )
        test_names, tuning_names = carve_validation(images.names, validation, 0)
        test, tuning = load_folder(data, names=test_names), load_folder(data, names=tuning_names)
    if crop:
        return ImageSet(test.names, centre_crop(test.x, crop)), centre_crop(tuning.x, crop)
    return test, tuning.x


def _method(path: Path, others: list[Method], options: PGDOptions, place: torch.device) -> Method:
    reg, meta = load(path)
    name = str(meta.get("method", path.stem))
    taken = {m.name for m in others}
    unique = name if name not in taken else f"{name}:{path.parent.name}"
    while unique in taken:
        unique += "'"
    return Method(unique, reg.to(place), float(meta.get("mu", 1e-2)), options)


def _needs_tuning(path: Path) -> bool:
    """Only bi-level training gives its own mu."""
    return load(path)[1].get("method") != "bilevel"


def _table(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("method", "PSNR mean", "median", "SSIM", "vs TV", "wins", "gradients", "status", "mu")
    for name, f in result.items():
        if name == "settings":
            continue
        against = f.get("vs_tv")
        table.add_row(
            name,
            f"{f['psnr_mean']:.2f}",
            f"{f['psnr_median']:.2f}",
            f"{f['ssim_mean']:.3f}",
            f"{against['mean']:+.2f}" if against else "",
            f"{against['wins']}/{against['images']}" if against else "",
            f"{sum(f['gradients']) / len(f['gradients']):.0f}",
            ", ".join(f"{v} {k}" for k, v in f["status"].items()),
            "" if f["mu"] is None else f"{f['mu']:.2g}",
        )
    Console().print(table)
