"""Hardware counters of a gradient, of both products and of a proximal step, by Nsight Compute."""

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
    """Run this file under ncu. Its table is saved with the results, and the summary gets one line per kernel."""
    stage.item("ncu", lambda: _profile(stage), seconds=max(5.0, stage.left() - 1.0))


def _profile(stage: Stage) -> None:
    # The program under ncu has no time to compile, so it uses kernels of the other stages.
    command = [sys.executable, "-P", "-m", "gpu_stages.ncu", stage.mode]
    if stage.on_gpu:
        tool = shutil.which("ncu") or "/usr/local/cuda/bin/ncu"
        if not Path(tool).exists():
            stage.say("ncu is not installed")
            return
        options = ["--clock-control", "none", "--profile-from-start", "off", "--launch-count", "16", "--csv"]
        options += [word for section in SECTIONS for word in ("--section", section)]
        command = [tool, *options, *command]
    result = subprocess.run(command, capture_output=True, text=True, timeout=max(5.0, stage.left() - 2.0), check=False)
    print(result.stderr[-4000:])
    table = "\n".join(line for line in result.stdout.splitlines() if line.startswith('"'))
    folder = Path(os.environ["DEEPREG_FAST_GPU_OUT"])
    (folder / "ncu.csv").write_text(table or result.stdout[-100_000:], encoding="utf-8")
    if not table:
        output = (result.stdout + result.stderr).strip().splitlines() or ["nothing"]
        stage.say(f"no counters (status {result.returncode}): {output[-1][:160]}")
        return
    for kernel, metrics in _kernels(table).items():
        stage.say(f"{kernel}: " + ", ".join(f"{label} {metrics[m]}" for m, label in SHOWN.items() if m in metrics))
        stage.record.setdefault("metrics", {})[kernel] = metrics
    stage.save()


def _kernels(table: str) -> dict[str, dict[str, str]]:
    """Metrics of each launch, from ncu's long format."""
    launches: dict[str, dict[str, str]] = {}
    for row in csv.DictReader(io.StringIO(table)):
        key = f"{row.get('ID', '?')} {row.get('Kernel Name', '?')[:32]}"
        unit = row.get("Metric Unit", "")
        launches.setdefault(key, {})[row.get("Metric Name", "")] = f"{row.get('Metric Value', '')} {unit}".strip()
    return {k: m for k, m in launches.items() if m}


def main() -> None:
    """Make the launches, after one call of each that loads the compiled kernels."""
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
