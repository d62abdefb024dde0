"""`deepreg-fast bench`: the kernels compared with other implementations and with the machine's bounds."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ..bench import Bounds, Ceilings, Result, Workload
    from ..bench.runner import Row
    from ..bench.target import Target


LearnedRegularizersOption = Annotated[
    Path | None,
    typer.Option(
        help="A checkout of github.com/johertrich/LearnedRegularizers, a peer of the case step.", metavar="PATH"
    ),
]
OutOption = Annotated[
    Path | None, typer.Option(help="Folder for results.json, results.csv and roofline.svg (of kernels).")
]


def bench(  # noqa: PLR0913 - one argument an option
    cases: Annotated[str, typer.Option(help="Cases, separated by commas; all by default.")] = "",
    rounds: Annotated[int, typer.Option(help="Rounds in which the candidates take turns.")] = 21,
    batch: Annotated[int, typer.Option(help="Images.")] = 8,
    size: Annotated[int, typer.Option(help="Side of an image.")] = 180,
    channels: Annotated[int, typer.Option(help="Width of the network.")] = 16,
    depth: Annotated[int, typer.Option(help="Number of convolutions.")] = 3,
    norm: Annotated[str, typer.Option(help="none or pixel.")] = "pixel",
    device: Annotated[str, typer.Option(help="cpu, or cuda: the current NVIDIA GPU.")] = "cpu",
    threads: Annotated[int, typer.Option(help="Threads; 0 leaves torch's number.")] = 0,
    learned_regularizers: LearnedRegularizersOption = None,
    out: OutOption = None,
) -> None:
    """Time the C++ kernels and compare with torch, JAX, scipy, deepinv and LearnedRegularizers. Each result is first
    checked against float64. Each competing solver runs at the loosest tolerance that matches our accuracy. Missing
    packages are listed with installation instructions.

    With --device cuda, time the GPU kernels with CUDA events, and compare with torch in eager mode, torch.func,
    torch.compile, JAX, cuFFT and fast_hadamard_transform. The bounds are the device's own matrix products and copy.

    A case is void, and marked so, if two timings of the same code differ by more than 3 % or an injected slowdown of
    10 % is not detected: the machine was too busy for reliable times.

    Example: deepreg-fast bench --cases hvp,dct --threads 1 --out results
    """
    import torch

    from .. import checks
    from ..bench import Workload, check_learned_regularizers
    from ..bench.runner import to_json
    from ..bench.target import TARGETS
    from ..files import make_folder
    from ..terminal import width

    checks.choice(device, "--device", tuple(TARGETS))
    checks.integer(rounds, "--rounds", 3)
    checks.integer(batch, "--batch", 1)
    checks.integer(size, "--size", 8)
    checks.integer(channels, "--channels", 1)
    checks.integer(depth, "--depth", 2)
    checks.choice(norm, "--norm", ("none", "pixel"))
    learned_path = None if learned_regularizers is None else check_learned_regularizers(learned_regularizers)
    if checks.integer(threads, "--threads", 0):
        torch.set_num_threads(threads)
    target = TARGETS[device]()
    names = _names(cases, target)
    problem = Workload(batch, size, channels, depth, norm, learned_regularizers=learned_path, target=target)
    if out is not None:
        # Created before anything is timed, so that minutes of work are not lost if the folder cannot be created.
        make_folder(out)
    machine, bounds, results = _run(problem, target, names, rounds, learned_path)
    print(_text(results, bounds, width(sys.stdout)))
    if out is not None:
        _write(out, results, to_json(results, problem, bounds, machine), bounds)
    if any(r.wrong for r in results):
        raise typer.Exit(1)


def _run(
    problem: Workload, target: Target, names: list[str], rounds: int, learned_path: Path | None
) -> tuple[dict[str, object], Bounds | Ceilings, list[Result]]:
    """The machine, its bounds, and the results of the cases."""
    from ..bench import run
    from ..terminal import Pulse

    results: list[Result] = []
    with Pulse("bench", len(names), "cases") as pulse, target.fair():
        pulse.begin("bounds of the machine")
        machine, bounds = target.describe(learned_path), target.bounds()
        for name in names:
            results += run(problem, [name], rounds, pulse.begin)
            pulse.done()
    return machine, bounds, results


def _names(cases: str, target: Target) -> list[str]:
    """The cases that `--cases` lists."""
    from ..bench import cases_of
    from ..errors import InputError

    table = cases_of(target)
    names = [n.strip() for n in cases.split(",") if n.strip()] or list(table)
    for n in names:
        if n not in table:
            raise InputError(f"--cases must be among {', '.join(table)}, but has {n!r}.")
    return names


def _write(out: Path, results: list[Result], report: dict[str, Any], bounds: Bounds | Ceilings) -> None:
    """Write results.json, results.csv and, of kernels, roofline.svg."""
    from ..bench.runner import to_csv
    from ..files import write_atomically
    from ..report import roofline_figure

    write_atomically(out / "results.json", (json.dumps(report, indent=1) + "\n").encode())
    write_atomically(out / "results.csv", to_csv(results).encode())
    points = {r.case.name: (r.case.flops, r.case.bytes, 1e-3 * r.rows[0].milliseconds) for r in results if r.rows}
    points = {n: v for n, v in points.items() if v[0]}
    if points:
        write_atomically(out / "roofline.svg", roofline_figure(points, bounds.rate, bounds.copy).encode())


def _text(results: list[Result], bounds: Bounds | Ceilings, columns: int | None) -> str:
    """The bounds, and a table for each case that fits 80 columns."""
    from ..terminal import table

    out = [str(bounds)]
    on_device = any(row.cold is not None for r in results for row in r.rows)
    head = ("candidate", "ms", "spread", "times ours [95 %]", "error", *(("cold", "MB") if on_device else ()))
    for result in results:
        name = result.case.name
        if result.wrong:
            out.append(f"\n{name}\nwrong: {result.wrong}")
            continue
        rows = [
            (
                row.name,
                f"{row.milliseconds:.3g}",
                f"{row.spread:.0%}",
                str(row.ratio),
                f"{row.error:.0e}" if row.error else "",
                *(_device_columns(row) if on_device else ()),
            )
            for row in result.rows
        ]
        out.append("\n" + table(head, rows, name, columns))
        if share := bounds.share(result.case.flops, result.case.bytes, result.rows[0].milliseconds):
            out.append(f"ours reaches {share}.")
        if result.void:
            out.append(f"VOID: {result.void}")
        out += [f"missing: {peer} ({reason})" for peer, reason in result.case.missing.items()]
        out += [f"{peer}: {note}." for peer, note in result.case.notes.items()]
    if on_device:
        out.append("\ncold: ms with a cold L2 cache; MB: the most memory that a call held.")
    return "\n".join(out)


def _device_columns(row: Row) -> tuple[str, str]:
    return (
        "" if row.cold is None else f"{row.cold:.3g}",
        "" if row.peak is None else f"{row.peak / 1e6:.0f}",
    )
