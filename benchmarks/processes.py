"""Images per second of a training that one, two or more processes share, and the share of time that they wait.

    python benchmarks/processes.py [--processes 1 2] [--lanes 8] [--batch 16] [--steps 24] [--crop 96] [--rounds 2]

Starts `torchrun -m deepreg_fast train bilevel`, one thread per process, alternating the numbers of processes. It fails
unless all runs end with the same weights. The first steps of a run are not counted. Prints JSON.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import torch

from deepreg_fast.machine import instruction_set

FIRST = 4


def train(processes: int, out: Path, options: argparse.Namespace) -> dict[str, Any]:
    """One run: median seconds of a step, the share of waiting, and a hash of the weights."""
    settings = {"lanes": options.lanes, "batch": options.batch, "steps": options.steps, "crop": options.crop}
    settings |= {"norm": "pixel", "validation": 0, "threads": 1, "checkpoint-seconds": 1e6, "out": out}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command += ["-m", "deepreg_fast", "train", "bilevel", *(f"--{k}={v}" for k, v in settings.items())]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()][FIRST:]
    seconds = [line["seconds"] for line in lines]
    return {
        "processes": processes,
        "seconds_per_step": median(seconds),
        "images_per_second": options.batch * len(seconds) / sum(seconds),
        "waiting_of_first": sum(line.get("waiting", 0.0) for line in lines) / sum(seconds),
        "weights": hashlib.sha256((out / "weights.safetensors").read_bytes()).hexdigest()[:16],
    }


def main() -> None:
    """Print the measurements."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    for name, value in (("lanes", 8), ("batch", 16), ("steps", 24), ("crop", 96), ("rounds", 2)):
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for _ in range(options.rounds):
            for processes in options.processes:
                # The weights' file records the folder: one name for all runs.
                out = Path("run")
                runs.append(train(processes, out, options))
                out.rename(f"run{len(runs)}")
    if len({r["weights"] for r in runs}) != 1:
        raise SystemExit(f"The weights must not depend on the number of processes, but differ: {runs}")
    # By the median step of the better run: on a shared machine, other programs take a core at times.
    step = {p: min(r["seconds_per_step"] for r in runs if r["processes"] == p) for p in options.processes}
    rate = {p: options.batch / seconds for p, seconds in step.items()}
    record = {
        "machine": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "isa": instruction_set(),
        "load": os.getloadavg(),
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "options": vars(options),
        "runs": runs,
        "best_images_per_second": rate,
        "speedup": {p: r / rate[min(rate)] for p, r in rate.items()},
    }
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
