"""`deepreg-fast recover`: recovery of one image, or from measurements in a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import checks
from ..errors import InputError
from ..files import check_outputs, make_folder, write_atomically
from ..problem import Problem
from .options import (
    MAX_ITERATIONS,
    AccelerationOption,
    ColorOption,
    DeviceOption,
    KeepDcOption,
    ProblemOption,
    default_mu,
    described_by,
    lifted,
    load_weights,
    mu_of,
    pgd_options,
    unlike_training,
    use_device,
)
from .recover_many import DATA, SHARD, Many, Weighting, recover_many

if TYPE_CHECKING:
    import torch

    from ..operators import LinearOperator
    from ..regularizers.base import Regularizer
    from ..solvers import Solution

MU = (
    "Weight of the regularizer. Default: the one it was trained with, or lam sigma^2 where the noise is larger than in "
    "the training (lam of the weights' card; 60 if it tells none)."
)


def recover(  # noqa: PLR0913 - one argument for each option of the command line
    weights: Annotated[
        str, typer.Option(help="Weight file (others' are .pt, .pth), or a shipped name, as cs5-beta10.")
    ],
    source: Annotated[
        Path | None, typer.Argument(help="An image (measured here), or measurements (.npz, .safetensors).")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for images, figure and results.json.")] = Path("recovered"),
    mu: Annotated[float | None, typer.Option(help=MU)] = None,
    lam: Annotated[float | None, typer.Option(help="With --sigma: mu = lam sigma^2.")] = None,
    sigma: Annotated[float, typer.Option(help="Noise added to simulated measurements.")] = 0.0,
    color: ColorOption = False,
    problem: ProblemOption = "cs",
    measured: Annotated[
        bool,
        typer.Option("--measured", help="The picture holds the measurements: it is blurred, small or masked already."),
    ] = False,
    ratio: Annotated[float, typer.Option(help="Measurements per pixel of simulated measurements of cs.")] = 0.2,
    transform: Annotated[str, typer.Option(help="dct, hadamard or walsh.")] = "dct",
    randomizer: Annotated[str, typer.Option(help="sign, permutation or both.")] = "sign",
    keep_dc: KeepDcOption = None,
    operator_seed: Annotated[int, typer.Option(help="Seed of the operator.")] = 0,
    acceleration: AccelerationOption = "",
    tolerance: Annotated[float, typer.Option(help="Relative residual at which the recovery has converged.")] = 1e-4,
    max_iterations: Annotated[int, typer.Option(min=0, help=MAX_ITERATIONS)] = 0,
    device: DeviceOption = "cpu",
    data: Annotated[str, typer.Option(help=DATA)] = "",
    split: Annotated[str, typer.Option(help="With --data of HDF5 or zarr: read y_<split> only.")] = "",
    images: Annotated[str, typer.Option(help="With --data: write npy, png, both or none of each image.")] = "npy",
    unit: Annotated[int, typer.Option(help="With --data: images that are claimed and written together.")] = 256,
    slots: Annotated[int, typer.Option(help="With --data: images that are recovered at the same time.")] = 64,
    workers: Annotated[int, typer.Option(help="With --data: threads that read, and as many that encode.")] = 2,
    shard: Annotated[str, typer.Option(help=SHARD)] = "",
) -> None:
    """Recover images and write each as PNG and float32 .npy, plus results.json and a figure.

    Examples:

    deepreg-fast recover picture.png --weights cs5-beta10

    deepreg-fast recover blurred.png --measured --problem kernel.png --sigma 0.01 --weights cs5-ridge-weak

    deepreg-fast recover blurred.png --color --measured --problem kernel.png --sigma 0.01 --weights cs5-ridge-weak

    deepreg-fast recover measured.npz --weights runs/beta10/weights.safetensors --mu 1e-3 --out recovered

    deepreg-fast recover --data shards --weights cs5-beta10 --out recovered
    """
    described = Problem(problem, ratio, transform, randomizer, keep_dc, operator_seed, sigma, color)
    if data:
        if source is not None:
            raise InputError(f"Images must come from SOURCE or --data, but {source} and {data} came; leave one out.")
        many = Many(data, split, images, unit, slots, workers, shard)
        solver = {"acceleration": acceleration, "max_iterations": max_iterations, "tolerance": tolerance}
        recover_many(many, weights, out, described, measured, Weighting(mu, lam), device, solver)
        return
    if source is None:
        raise InputError("An image must be named as SOURCE, or many as --data, but neither came; name one.")
    from ..data import load_image, npy, png
    from ..inverse.data_term import add_noise
    from ..inverse.measurements import load_measurements
    from ..inverse.problem import build_operator, operator_measuring
    from ..inverse.recovery import recover as solve
    from ..weights.io import locate

    torch_device = use_device(device)
    way_out = "name another --out or rename the source"
    # Checked before anything is computed, so that minutes of work are not lost.
    summary_files = [out / "results.json", out / "figure.png"]
    check_outputs(
        [out / f"{source.stem}.png", out / f"{source.stem}.npy", *summary_files], [source, locate(weights)], way_out
    )
    reg, meta = load_weights(weights)
    truth: torch.Tensor | None = None
    A: LinearOperator
    if source.suffix.lower() in (".npz", ".safetensors"):
        y, A, noise = load_measurements(source)
        described = described_by(A, noise)
    else:
        picture, noise = load_image(source, color=color)[None], sigma
        shape = (picture.shape[1], picture.shape[2], picture.shape[3])
        if measured:
            A = operator_measuring(described, shape)
            y = picture
        else:
            A = build_operator(described, shape)
            y, truth = add_noise(A.A(picture), sigma, seed=1), picture
    reg = lifted(reg, A)
    names = [source.stem] if len(y) == 1 else [f"{source.stem}_{i:03d}" for i in range(len(y))]
    check_outputs([out / f"{n}{s}" for n in names for s in (".npy", ".png")] + summary_files, [source], way_out)
    make_folder(out)
    checks.finite(y, "The measurements")
    y, truth = _as_weights(reg, y, truth)
    if lam is None and mu is None:
        mu = default_mu(meta, noise)
        if differs := unlike_training(meta, described):
            typer.echo(f"The weights were trained for another problem (here {differs}); mu is {mu:.2g}.", err=True)
    weight = mu if lam is None else mu_of(lam, noise)
    options = pgd_options(meta, acceleration, max_iterations=max_iterations, tolerance=tolerance, record=True)
    reg, A, y = reg.to(torch_device), A.to(torch_device), y.to(torch_device)
    sol = solve(y, A, reg, mu, lam=lam, sigma=noise if lam is not None else None, options=options)
    sol.x = sol.x.cpu()
    for name, image in zip(names, sol.x, strict=True):
        write_atomically(out / f"{name}.npy", npy(image))
        write_atomically(out / f"{name}.png", png(_shown(image).clamp(0, 1)))
    results = {**_results(sol, truth), "mu": weight, "device": str(torch_device)}
    write_atomically(out / "results.json", json.dumps(results, indent=1).encode())
    write_atomically(out / "figure.png", _figure(sol, truth, A, y))
    for i, row in enumerate(results["images"]):
        quality = f", {row['psnr']:.2f} dB" if "psnr" in row else ""
        typer.echo(f"image {i}: {row['status']} after {row['iterations']} iterations{quality}. {row['advice']}")
    typer.echo(f"Written to {out}; mu was {weight:.2g}.")


def _shown(image: torch.Tensor) -> torch.Tensor:
    """An image `[C, H, W]` as a picture, gray or in color: the magnitude of two channels, the first of other ones."""
    if image.shape[0] == 2:
        return image.norm(dim=0, keepdim=True)
    return image if image.shape[0] == 3 else image[:1]


def _as_weights(
    reg: Regularizer, y: torch.Tensor, truth: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Convert measurements and image to the weights' precision. A conversion of measurements is reported."""
    dtype = next((p.dtype for p in reg.parameters()), y.dtype)
    if y.dtype != dtype and truth is None:
        y_type, reg_type = (str(t).removeprefix("torch.") for t in (y.dtype, dtype))
        typer.echo(
            f"The measurements are {y_type} and the weights {reg_type}: they are converted to {reg_type}.",
            err=True,
        )
    return y.to(dtype), None if truth is None else truth.to(dtype)


def _results(sol: Solution, truth: torch.Tensor | None) -> dict[str, Any]:
    from ..evaluation.metrics import psnr, ssim
    from ..status import statuses

    rows: list[dict[str, Any]] = []
    for i, s in enumerate(statuses(sol.status)):
        row: dict[str, Any] = {
            "status": s.name.lower(),
            "advice": s.advice,
            "iterations": int(sol.iterations[i]),
            "gradients": int(sol.gradients[i]),
            "residual": float(sol.residual[i]),
        }
        if truth is not None:
            row["psnr"] = float(psnr(sol.x[i : i + 1], truth)[0])
            if min(truth.shape[-2:]) >= 11:
                row["ssim"] = float(ssim(sol.x[i : i + 1], truth)[0])
        rows.append(row)
    return {"images": rows, "backend": sol.backend}


def _figure(sol: Solution, truth: torch.Tensor | None, A: LinearOperator, y: torch.Tensor) -> bytes:
    """The measurements if they are a picture, else the back-projection; the recovery; truth and error if known."""
    import io

    from matplotlib.figure import Figure

    shown = len(A.measurement_shape) == 3
    first = ("measured", A.as_image(y)[0].cpu()) if shown else ("Aᵀy", A.A_adjoint(y)[0].cpu())
    panels = [first, ("recovered", sol.x[0])]
    if truth is not None:
        panels += [("truth", truth[0]), ("error × 5", 0.5 + 5 * (sol.x[0] - truth[0]))]
    figure = Figure(figsize=(3.2 * len(panels), 3.5), layout="constrained")
    for axis, (title, channels) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        image = _shown(channels)
        low, high = (float(image.min()), float(image.max())) if title in ("Aᵀy", "measured") else (0.0, 1.0)
        # Colors are scaled here, because the figure scales gray values only.
        level = ((image - low) / max(high - low, 1e-9)).clamp(0.0, 1.0)
        if len(image) == 3:
            axis.imshow(level.permute(1, 2, 0).numpy())
        else:
            axis.imshow(image[0].numpy(), cmap="gray", vmin=low, vmax=high)
        axis.set_title(title)
        axis.set_axis_off()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()
