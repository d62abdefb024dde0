"""Hardware counters of one gradient, one product of each kind and one proximal step, by Nsight Compute."""

from __future__ import annotations

import csv
import io
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from gpu_stages.common import Stage

SECTIONS = (
    "SpeedOfLight", "WarpStateStats", "SchedulerStats", "MemoryWorkloadAnalysis", "Occupancy", "LaunchStats",
    "InstructionStats",
)  # fmt: skip
SHOWN = {
    "Duration": "time", "Compute (SM) Throughput": "SM", "DRAM Throughput": "DRAM", "L2 Cache Throughput": "L2",
    "Issue Slots Busy": "issue", "Executed Ipc Active": "IPC", "L2 Hit Rate": "L2 hits",
    "Achieved Occupancy": "occupancy", "Registers Per Thread": "registers",
}  # fmt: skip


def ncu(stage: Stage) -> None:
    """Run this file under ncu; its table goes beside the results, one line a kernel into the summary."""
    stage.item("ncu", lambda: _profile(stage), seconds=max(5.0, stage.left() - 1.0))


def _profile(stage: Stage) -> None:
    # The program under ncu has no time to compile: its kernels are those of the other stages.
    command = [sys.executable, "-P", "-m", "gpu_stages.ncu", stage.mode]
    if stage.on_gpu:
        tool = shutil.which("ncu") or "/usr/local/cuda/bin/ncu"
        if not Path(tool).exists():
            stage.say("ncu is not installed")
            return
        options = ["--clock-control", "none", "--profile-from-start", "off", "--launch-count", "16", "--csv"]
        options += [word for section in SECTIONS for word in ("--section", section)]
        command = [tool, *options, *command]
    done = subprocess.run(command, capture_output=True, text=True, timeout=max(5.0, stage.left() - 2.0), check=False)
    print(done.stderr[-4000:])
    table = "\n".join(line for line in done.stdout.splitlines() if line.startswith('"'))
    folder = Path(os.environ["DEEPREG_FAST_GPU_OUT"])
    (folder / "ncu.csv").write_text(table or done.stdout[-100_000:], encoding="utf-8")
    if not table:
        said = (done.stdout + done.stderr).strip().splitlines() or ["nothing"]
        stage.say(f"no counters (status {done.returncode}): {said[-1][:160]}")
        return
    for kernel, metrics in _kernels(table).items():
        stage.say(f"{kernel}: " + ", ".join(f"{label} {metrics[m]}" for m, label in SHOWN.items() if m in metrics))
        stage.record.setdefault("metrics", {})[kernel] = metrics
    stage.save()


def _kernels(table: str) -> dict[str, dict[str, str]]:
    """The metrics of each launch, from ncu's long format."""
    launches: dict[str, dict[str, str]] = {}
    for row in csv.DictReader(io.StringIO(table)):
        key = f"{row.get('ID', '?')} {row.get('Kernel Name', '?')[:32]}"
        unit = row.get("Metric Unit", "")
        launches.setdefault(key, {})[row.get("Metric Name", "")] = f"{row.get('Metric Value', '')} {unit}".strip()
    return {k: m for k, m in launches.items() if m}


def main() -> None:
    """The launches, after one call of each that loads what was compiled."""
    mode = sys.argv[1]
    if mode == "stand-in":
        from gpu_stages import stand_in

        stand_in.install()
    from gpu_stages.common import problem

    stage = Stage("ncu", Path(os.devnull), 60.0, mode)
    p: Any = problem(stage, 256)
    reg, x, v, A = p.regularizer(), p.images(1)[0], p.images(2)[0], p.operator()
    y = A.A(x)
    lin = reg.linearize(x)

    def once() -> None:
        reg.value_and_grad(x)
        lin.hvp(v)
        lin.param_vjp(v)
        A.prox_l2(x, y, 2.0)

    once()
    if mode == "gpu":
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
    once()
    if mode == "gpu":
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()
    print("every launch was made")


if __name__ == "__main__":
    main()
