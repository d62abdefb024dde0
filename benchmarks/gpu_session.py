"""One command for a machine with an NVIDIA GPU: tests, precision, benchmarks, sweeps, in less than ten minutes.

    python benchmarks/gpu_session.py --out results --data BSD400 --minutes 9

It needs torch, and from a checkout nothing else: the package need not be installed. Stages run one after another, the
most important first, each in a process of its own with its own limit, so that a fault or a hang costs one stage.
`session.json` and `session.log` in the folder are complete up to what is running whenever the session is cut. With
`--dry-run` the same runs on the host's tensors in tiny sizes, which tests this script and measures nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Stage:
    """A name in `gpu_stages.STAGES`, the seconds that it may take, and what it is for."""

    name: str
    seconds: int
    purpose: str


STAGES = (
    Stage("machine", 40, "versions, ceilings"),
    Stage("tests", 110, "the tests marked gpu"),
    Stage("precision", 45, "errors and CG by precision"),
    Stage("kernels", 100, "the conv chain beside its peers"),
    Stage("sweep", 80, "launch options"),
    Stage("srm", 45, "the structurally random matrix beside a copy"),
    Stage("loops", 60, "CG iteration, recovery, step"),
    Stage("scale", 60, "sizes, memory, same bits"),
    Stage("sanitizer", 50, "memcheck and racecheck"),
    Stage("training", 60, "bi-level training on --data"),
    Stage("compiled", 80, "torch.compile and JAX as peers"),
)
NAMES = tuple(s.name for s in STAGES)


def site(folder: Path) -> Path:
    """A copy of the checkout from which `import deepreg_fast` works, `kernels/` and `csrc/cuda` in their places."""
    package = folder / "deepreg_fast"
    skip = shutil.ignore_patterns("__pycache__", "kernels", "cuda")
    shutil.copytree(ROOT / "deepreg_fast", package, ignore=skip)
    shutil.copytree(ROOT / "kernels", package / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "csrc/cuda", package / "cuda", ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def environment(folder: Path, dry: bool) -> dict[str, str]:
    """Of a stage's process."""
    found = {**os.environ, "PYTHONPATH": os.pathsep.join((str(folder), str(ROOT / "benchmarks")))}
    found |= {"PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    found["TRITON_DEFAULT_FP_FUSION"] = "1"
    # Nothing compiled is taken from elsewhere, or left behind; the stages share it.
    caches = {"TRITON_CACHE_DIR": "triton", "CUPY_CACHE_DIR": "cupy", "XDG_CACHE_HOME": "cache"}
    found |= {name: str(folder / place) for name, place in caches.items()}
    if dry:
        found |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return found


class Session:
    """What has been found so far, in `session.json` and `session.log`."""

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        self.arguments, self.folder, self.began = arguments, folder, time.monotonic()
        self.out = Path(arguments.out).resolve()
        self.out.mkdir(parents=True, exist_ok=True)
        self.log = (self.out / "session.log").open("w", encoding="utf-8")
        self.found: dict[str, Any] = {"dry_run": arguments.dry_run, "stages": {}}

    def left(self) -> float:
        """Seconds until the end of the session."""
        return 60.0 * self.arguments.minutes - (time.monotonic() - self.began)

    def run(self, stage: Stage) -> None:
        """One stage in its own process; its findings are kept as they come."""
        # Some seconds are for ending in order.
        limit = min(float(stage.seconds), self.left() - 8.0)
        if self.left() < 18.0:
            self.keep(stage.name, {"state": "no time left"})
            return
        partial, began = self.folder / f"{stage.name}.json", time.monotonic()
        command = [sys.executable, "-P", "-m", "gpu_stages", stage.name, "--json", str(partial)]
        command += ["--seconds", str(int(limit)), *(["--data", self.arguments.data] if self.arguments.data else [])]
        command += ["--dry-run"] if self.arguments.dry_run else []
        self.write(f"\n== {stage.name}: {stage.purpose}, at most {limit:.0f} s\n")
        # A session of its own, so that what the stage has started ends with it.
        child = subprocess.Popen(
            command, cwd=ROOT, env=environment(self.folder, self.arguments.dry_run), stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        assert child.stdout is not None
        os.set_blocking(child.stdout.fileno(), False)
        state = "running"
        while state == "running":
            time.sleep(0.2)
            self.write((child.stdout.read() or b"").decode(errors="replace"))
            if child.poll() is not None:
                state = "done" if child.returncode == 0 else f"ended with code {child.returncode}"
            elif time.monotonic() - began > limit:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
                state = "cut"
            self.keep(stage.name, {"state": state, "seconds": round(time.monotonic() - began, 1), **_read(partial)})
        self.write((child.stdout.read() or b"").decode(errors="replace"))
        print(f"{stage.name}: {state}, {time.monotonic() - began:.0f} s", flush=True)

    def write(self, text: str) -> None:
        """To the log, at once."""
        if text:
            self.log.write(text)
            self.log.flush()

    def keep(self, name: str, found: dict[str, Any]) -> None:
        """Put a stage's findings into `session.json`, if they are new."""
        if self.found["stages"].get(name) == found:
            return
        self.found["stages"][name] = found
        scratch = self.out / ".session.json"
        scratch.write_text(json.dumps(self.found, indent=1) + "\n", encoding="utf-8")
        scratch.replace(self.out / "session.json")


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def summary(found: dict[str, Any]) -> str:
    """The short lines of every stage, in order."""
    lines = []
    for name, stage in found["stages"].items():
        lines.append(f"[{name}] {stage['state']}, {stage.get('seconds', 0):.0f} s")
        lines += [f"  {line}" for line in stage.get("summary", [])]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Run the stages; 0 if every one was done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="folder for session.json and session.log")
    parser.add_argument("--data", default="", help="folder of BSD400, for a short training")
    parser.add_argument("--minutes", type=float, default=9.0, help="of the whole session")
    parser.add_argument("--stages", default=",".join(NAMES), help=f"of {', '.join(NAMES)}")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the host's tensors; measures nothing")
    arguments = parser.parse_args(argv)
    chosen = [n for n in arguments.stages.split(",") if n]
    unknown = [n for n in chosen if n not in NAMES]
    if unknown:
        parser.error(f"--stages must be among {', '.join(NAMES)}, but has {unknown[0]!r}")
    with tempfile.TemporaryDirectory(prefix="gpu_session_") as name:
        session = Session(arguments, site(Path(name)))
        for stage in STAGES:
            if stage.name in chosen:
                session.run(stage)
    print(summary(session.found), flush=True)
    return int(any(s["state"] != "done" for s in session.found["stages"].values()))


if __name__ == "__main__":
    sys.exit(main())
