"""`deepreg-fast recover --data`: recovery of many images by any number of processes; `deepreg-fast summary`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import InputError
from ..problem import Problem
from ..terminal import Pulse, facts, visible
from .options import (
    default_mu,
    described_by,
    lifted,
    load_weights,
    mu_of,
    pgd_options,
    unlike_training,
    use_device,
)

DATA = (
    "Recover many images: a folder of pictures or measurement files, tar shards (a file, a folder, or shards-{000..003}"
    ".tar), HDF5 (y_train, x_train), or zarr. Any number of processes may share --out."
)
SHARD = (
    "With --data: i/n, where this process begins; by default from torchrun's or SLURM's variables. All images are "
    "recovered however many processes run."
)


@dataclass(frozen=True)
class Many:
    """The options of `recover` that concern many images."""

    data: str
    split: str
    images: str
    unit: int
    slots: int
    workers: int
    shard: str


@dataclass(frozen=True)
class Weighting:
    """The options of the weight mu."""

    mu: float | None
    lam: float | None


def recover_many(  # noqa: PLR0913 - the groups of options
    many: Many,
    weights: str,
    out: Path,
    problem: Problem,
    measured: bool,
    weighting: Weighting,
    device: str,
    solver: dict[str, Any],
) -> None:
    """Recover what is not done yet, and print the summary of all."""
    from ..throughput import Job, open_source, run, shard_of_environment
    from ..throughput.measured_files import MeasurementFiles
    from ..throughput.units import RESULTS, done_units, parse_shard
    from ..weights.io import locate

    shard = parse_shard(many.shard) if many.shard else shard_of_environment()
    torch_device = use_device(device)
    reg, meta = load_weights(weights)
    source = open_source(many.data, problem, measured, many.split)
    reg = lifted(reg, source.A)
    if isinstance(source, MeasurementFiles):
        problem = described_by(source.A, source.sigma)
    if weighting == Weighting(None, None) and (differs := unlike_training(meta, problem)):
        typer.echo(f"The weights were trained for another problem (here {differs}).", err=True)
    weight = _weight(weighting, meta)
    weight(problem.sigma)
    source.A.to(torch_device)
    settings = {
        "weights": hashlib.sha256(locate(weights).read_bytes()).hexdigest(),
        "operator": source.A.fingerprint(),
        "problem": asdict(problem),
        "measured": measured,
        **asdict(weighting),
    }
    job = Job(
        source,
        reg.to(torch_device),
        weight,
        pgd_options(meta, **solver),
        settings,
        many.images,
        many.unit,
        many.slots,
        many.workers,
    )
    units = -(-len(source) // many.unit)
    before = len(done_units(out)) if (out / RESULTS).is_dir() else 0
    with Pulse("recover", units, "units", before) as pulse:
        count = run(job, out, shard, lambda done, _: pulse.done(done))
    typer.echo(f"This process recovered {count} images. All results:")
    typer.echo(_text(out))


def _weight(weighting: Weighting, meta: dict[str, Any]) -> Callable[[float], float]:
    """`mu` of an image from the standard deviation of its noise, by the rules of `recover`."""
    mu, lam = weighting.mu, weighting.lam
    if mu is not None and lam is not None:
        raise InputError("The weight must be given as --mu or as --lam, but both came; leave one out.")

    def weight(sigma: float) -> float:
        if mu is not None:
            value = mu
        elif lam is None:
            value = default_mu(meta, sigma)
        else:
            value = mu_of(lam, sigma)
        if not value > 0:
            raise InputError(f"The weight mu must be positive, but is {value:g}; give another --mu or --lam.")
        return value

    return weight


def summarize(
    out: Annotated[Path, typer.Argument(help="The folder of recover --data.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Count the images of recover --data by status, also while it runs.

    Example:

    deepreg-fast summary recovered
    """
    from ..throughput import summary

    typer.echo(json.dumps(summary(out), indent=1) if as_json else _text(out))


def _text(out: Path) -> str:
    from ..throughput import summary

    total = summary(out)
    pairs = [("images", f"{total['done']} of {total['images']} done")]
    pairs += [(status, str(count)) for status, count in total["statuses"].items()]
    if "iterations" in total:
        pairs.append(("iterations", f"{total['iterations']:.1f} on average"))
    if "psnr" in total:
        pairs.append(("PSNR", f"{total['psnr']:.2f} dB on average"))
    pairs += [(f"error of {visible(e['key'])}", e["error"]) for e in total.get("errors", [])]
    return facts(pairs)
