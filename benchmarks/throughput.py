"""Measure the recovery of many images: kills, memory, and continuous batching.

    python benchmarks/throughput.py kills [--size 32] [--count 10000] [--processes 1 2 4] [--kills 5]
    python benchmarks/throughput.py speed [--size 32] [--count 192]

`kills` recovers a folder of measurement files once without and then with processes that are killed at random moments
and started again. It fails unless every key has exactly one line, the bytes of all units are those of the undisturbed
run, and a sample of images has the bits of `recover`. It reports images per second, and the memory of the undisturbed
process while it runs.

`speed` compares continuous batching with a plain loop of batches of the same size, on images whose iterations vary:
crops of photographs with noise of three strengths. It fails unless every image has the same bits in both. Times are of
this process's CPU, so that other load disturbs less; the two alternate.

One thread per process. Each prints JSON, to be redirected into a file of `results/throughput`.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import platform
import random
import resource
import signal
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch

import deepreg_fast as dr
from deepreg_fast.data import embedded_images
from deepreg_fast.inverse.measurements import save_measurements
from deepreg_fast.machine import instruction_set
from deepreg_fast.problem import Problem
from deepreg_fast.throughput import Job, Measurement, Source, open_source, run
from deepreg_fast.throughput.results import read_lines
from deepreg_fast.throughput.solve import Solver
from deepreg_fast.throughput.units import done_units

SIGMAS = (0.0, 0.02, 0.1)
MU = 1e-3
OPTIONS = dr.PGDOptions(60, 1e-2, "fista")
PER_FILE = 500


def crops(count: int, size: int, seed: int = 0) -> torch.Tensor:
    """Random crops of the embedded photographs."""
    photographs, rng = embedded_images(180).train.x, random.Random(seed)
    places = [(rng.randrange(len(photographs)), rng.randint(0, 180 - size), rng.randint(0, 180 - size))
              for _ in range(count)]  # fmt: skip
    return torch.stack([photographs[i, :, r : r + size, c : c + size] for i, r, c in places]).float()


# -- kills -------------------------------------------------------------------------------------------------------------


def write_source(folder: Path, count: int, size: int) -> None:
    """Measurement files of `PER_FILE` images, with noise of three strengths."""
    A = dr.SRM((1, size, size), 0.2)
    for number, start in enumerate(range(0, count, PER_FILE)):
        sigma = SIGMAS[number % 3]
        x = crops(min(PER_FILE, count - start), size, seed=number)
        save_measurements(folder / f"y{number:05d}.safetensors", dr.add_noise(A.A(x), sigma, number), A, sigma)


def weight(sigma: float) -> float:
    """mu of an image."""
    return dr.mu_with_noise(MU, sigma, lam=3.0)


def start(source: Source, out: Path, shard: tuple[int, int], unit: int, slots: int) -> int:
    """A process that works on the run."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            run(Job(source, dr.TV(0.01), weight, OPTIONS, {}, unit=unit, slots=slots), out, shard)
            status = 0
        finally:
            os._exit(status)
    return child


def resident(child: int) -> float:
    """Resident memory of a process in MB, without what it shares with this one."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{child}/status").read_text().splitlines())
    return int(fields.get("RssAnon", "0 kB").split()[0]) / 1024


def done(out: Path) -> int:
    """Units that are done."""
    return len(done_units(out)) if (out / "units").is_dir() else 0


def supervise(
    begin: Callable[[int], int], out: Path, total: int, processes: int, kills: int
) -> tuple[float, float, list[float]]:
    """Run `processes`, kill one at `kills` random moments and start it again; seconds, seconds of the processors, and
    memory in MB over time."""
    rng, memory, began, used = random.Random(processes), [], time.perf_counter(), processor_seconds()
    children = [begin(i) for i in range(processes)]
    moments = [total * rng.uniform(k, k + 1) / (kills + 1) for k in range(kills)]
    while children:
        time.sleep(0.05)
        if not kills and processes == 1 and (Path(f"/proc/{children[0]}/status")).exists():
            memory.append(resident(children[0]))
        if moments and done(out) >= moments[0]:
            moments.pop(0)
            # Somewhere within a unit.
            time.sleep(rng.uniform(0.0, 0.5))
            place = rng.randrange(len(children))
            os.kill(children[place], signal.SIGKILL)
            os.waitpid(children[place], 0)
            children[place] = begin(place)
        for child in list(children):
            number, status = os.waitpid(child, os.WNOHANG)
            if number and moments:
                raise SystemExit("the run ended before the last kill; raise --count")
            if number:
                assert status == 0, "a process failed"
                children.remove(child)
    return time.perf_counter() - began, processor_seconds() - used, memory


def processor_seconds() -> float:
    """What all children have used that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def digest(out: Path) -> str:
    """SHA-256 of all results."""
    total = hashlib.sha256()
    for path in sorted((out / "units").iterdir()):
        total.update(path.name.encode() + path.read_bytes())
    return total.hexdigest()


def check(source: Source, out: Path, sample: int) -> None:
    """Every key exactly once; some images against `recover`."""
    keys = [line["key"] for line in read_lines(out)]
    assert keys == [source.key(i) for i in range(len(source))], "a key is missing, or comes twice"
    assert len({p.suffix for p in (out / "units").iterdir()}) == 2, "there are temporary files"
    images: dict[str, bytes] = {}
    for path in sorted((out / "units").glob("*.tar")):
        with tarfile.open(path) as archive:
            images.update((m.name, f.read()) for m in archive if (f := archive.extractfile(m)) is not None)
    assert len(images) == len(source)
    for i in random.Random(0).sample(range(len(source)), sample):
        m = source.measurement(i)
        assert m.y is not None
        alone = dr.recover(m.y[None], source.A, dr.TV(0.01), weight(m.sigma), options=OPTIONS)
        assert np.array_equal(np.load(io.BytesIO(images[f"{source.key(i)}.npy"])), alone.x[0].numpy()), i


def measure_kills(options: argparse.Namespace) -> dict[str, Any]:
    """The whole of `kills`."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "data").mkdir()
        write_source(folder / "data", options.count, options.size)
        source = open_source(str(folder / "data"), Problem())
        total = -(-options.count // options.unit)
        expected = ""
        for processes, kills in ((1, 0), *((p, options.kills) for p in options.processes)):
            out = folder / f"out-{processes}-{kills}"

            def begin(i: int, out: Path = out, n: int = processes) -> int:
                return start(source, out, (i, n), options.unit, options.slots)

            seconds, busy, memory = supervise(begin, out, total, processes, kills)
            check(source, out, 20)
            found = digest(out)
            expected = expected or found
            assert found == expected, "the bytes differ from those of the undisturbed run"
            row = {"processes": processes, "kills": kills, "images_per_second": round(options.count / seconds, 1)}
            row["images_per_processor_second"] = round(options.count / busy, 1)
            if memory:
                parts = [memory[len(memory) * k // 5 : len(memory) * (k + 1) // 5] for k in range(5)]
                row["memory_mb_by_fifths"] = [round(max(part), 1) for part in parts]
            rows.append(row)
            print(row, file=sys.stderr, flush=True)
    return {"size": options.size, "count": options.count, "unit": options.unit, "slots": options.slots, "runs": rows}


# -- speed -------------------------------------------------------------------------------------------------------------

CASES = (
    (32, "cs5-beta10", "fista", 16),
    (32, "cs5-beta10", "fista", 64),
    (32, "cs5-beta10", "anderson", 16),
    (32, "cs5-beta10", "anderson", 64),
    (32, "cs5-ridge-weak", "fista", 64),
    (180, "cs5-beta10", "anderson", 8),
)
"""Size, weights, acceleration, and images in a batch or slots; those of `--size` are measured."""


def continuous(solver: Solver[int], y: torch.Tensor, sigmas: list[float], slots: int) -> dict[int, torch.Tensor]:
    """All images through the slots, as in `throughput/loop.py`."""
    following, results = 0, dict[int, torch.Tensor]()
    while len(results) < len(y):
        free = solver.free()
        if following < len(y) and (free >= max(1, slots // 8) or not len(solver)):
            chosen = range(following, min(len(y), following + free))
            solver.admit([(i, i, Measurement(y[i], None, sigmas[i])) for i in chosen])
            following = chosen.stop
        results.update((i, result.x) for i, result in solver.advance())
    return results


def compare(size: int, weights: str, acceleration: str, batch: int, count: int, rounds: int) -> dict[str, Any]:
    """One case."""
    reg, meta = dr.load(weights)
    A, x = dr.SRM((1, size, size), 0.2), crops(count, size)
    sigmas = [SIGMAS[i % 3] for i in range(count)]
    y = torch.cat([dr.add_noise(A.A(x[i : i + 1]), s, i) for i, s in enumerate(sigmas)])
    mu = torch.tensor([dr.mu_with_noise(meta["mu"], s) for s in sigmas])
    options = dr.PGDOptions(500, 1e-4, acceleration)
    times: dict[str, list[float]] = {"plain": [], "continuous": []}
    gradients = torch.zeros(0)
    for _ in range(rounds):
        began = time.process_time()
        solutions = [dr.recover(y[i : i + batch], A, reg, mu[i : i + batch], options=options)
                     for i in range(0, count, batch)]  # fmt: skip
        times["plain"].append(time.process_time() - began)
        began = time.process_time()
        solver: Solver[int] = Solver(A, reg, lambda s: dr.mu_with_noise(meta["mu"], s), options, batch)
        results = continuous(solver, y, sigmas, batch)
        times["continuous"].append(time.process_time() - began)
        plain = torch.cat([s.x for s in solutions])
        assert all(torch.equal(results[i], plain[i]) for i in range(count)), "an image has other bits"
        gradients = torch.cat([s.gradients for s in solutions]).float()
    quantiles = torch.quantile(gradients, torch.tensor([0.0, 0.5, 0.9, 1.0])).round().int().tolist()
    ratio = median(p / c for p, c in zip(times["plain"], times["continuous"], strict=True))
    return {
        "size": size,
        "weights": weights,
        "acceleration": acceleration,
        "batch": batch,
        "gradients_min_median_p90_max": quantiles,
        "plain_images_per_second": round(count / median(times["plain"]), 1),
        "continuous_images_per_second": round(count / median(times["continuous"]), 1),
        "ratio": round(ratio, 2),
    }


def measure_speed(options: argparse.Namespace) -> dict[str, Any]:
    """The whole of `speed`."""
    rows = []
    for case in (c for c in CASES if c[0] == options.size):
        rows.append(compare(*case, options.count, options.rounds))
        print(rows[-1], file=sys.stderr, flush=True)
    return {"count": options.count, "rounds": options.rounds, "cases": rows}


def processor() -> str:
    """The name of the processor, where the system tells it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())


def main() -> None:
    """Parse and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("kills", "speed"))
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--count", type=int, default=0)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--unit", type=int, default=256)
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=1)
    options = parser.parse_args()
    options.count = options.count or (10_000 if options.part == "kills" else 192)
    torch.set_num_threads(1)
    measured = measure_kills(options) if options.part == "kills" else measure_speed(options)
    load = f"{os.getloadavg()[1]:.1f} on {os.cpu_count()} cores"
    machine = {"cpu": processor(), "instructions": instruction_set(), "load": load, "torch": torch.__version__}
    print(json.dumps({"command": sys.argv[1:], "machine": machine, **measured}, indent=1))


if __name__ == "__main__":
    main()
