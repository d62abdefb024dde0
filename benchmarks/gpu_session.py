"""Two independent commands for a machine with an NVIDIA GPU (docs/devices.md).

    python benchmarks/gpu_session.py --call 1 --out OUT
    python benchmarks/gpu_session.py --call 2 --out OUT --before benchmarks/results/gpu/call1/session.json

They run from a checkout with torch and Triton, without an installation. `prebuild.py` compiles the kernels in advance;
`--cache` names its archive. Stages run one after another, the most important first. The stages of a group share a
process. An item that hangs or loses the CUDA context ends only that process, and another continues with the next item.
Whenever the command is killed, `summary.txt` and `session.json` in OUT contain everything except the running item.

`--dry-run` runs everything on the host with tiny sizes and Triton's interpreter. `--stand-in` sends launches of the
real sizes through the real compilers and launchers on a machine without a GPU. Neither measures anything.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[1]
CACHE = Path("/tmp/deepreg-fast-gpu-cache")
"""Folder of the compiled kernels, the same on every machine, because Triton's cache contains absolute paths."""
ARCHIVE = ROOT / ".gpu-cache" / "cache.tar.xz"
RESERVE = 4.0
"""Seconds reserved at the end for writing the results."""
PATIENCE = {"gpu": 1.0, "dry": 60.0, "stand-in": 60.0}
"""Factor of every time limit: a rehearsal is slow, and its machine may be busy."""


@dataclass(frozen=True)
class Stage:
    """A stage: its name in `gpu_stages.__main__.MODULES`, its time limit in seconds, the group that shares a process,
    and its purpose."""

    name: str
    seconds: int
    group: str
    purpose: str


CALLS = {
    1: (
        Stage("machine", 14, "main", "versions, ceilings"),
        Stage("smoke", 32, "main", "every kernel family once, against float64"),
        Stage("timing", 46, "main", "our kernels alone"),
        Stage("micro", 6, "main", "instruction rates"),
        Stage("ncu", 30, "ncu", "hardware counters of a few launches"),
        Stage("peers", 58, "main", "the conv chain and CG beside their peers"),
        Stage("tests", 95, "tests", "the tests marked gpu"),
        Stage("memcheck", 35, "memcheck", "compute-sanitizer"),
    ),
    2: (
        Stage("machine", 10, "main", "versions, ceilings"),
        Stage("smoke", 25, "main", "what failed in the first call"),
        Stage("tests", 35, "tests", "what failed in the first call"),
        Stage("timing", 46, "main", "our kernels alone"),
        Stage("precision", 35, "main", "CG and errors by precision"),
        Stage("compiled", 45, "main", "torch.compile as a peer"),
        Stage("loops", 35, "main", "whole solves beside their peers"),
        Stage("training", 35, "main", "an epoch of bi-level training"),
        Stage("scale", 25, "main", "large batches and images"),
        Stage("racecheck", 25, "racecheck", "compute-sanitizer"),
    ),
}


def site(folder: Path) -> Path:
    """A copy of the checkout, with `kernels/` and `csrc/cuda` in place, from which `import deepreg_fast` works."""
    package = folder / "deepreg_fast"
    skip = shutil.ignore_patterns("__pycache__", "kernels", "cuda")
    shutil.copytree(ROOT / "deepreg_fast", package, ignore=skip)
    shutil.copytree(ROOT / "kernels", package / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "csrc/cuda", package / "cuda", ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def environment(folder: Path, mode: str, cache: Path) -> dict[str, str]:
    """The environment of the workers."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join((str(folder), str(ROOT / "benchmarks")))}
    env |= {"PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    # The default of all versions of Triton up to 3.9; part of the cache's keys.
    env["TRITON_DEFAULT_FP_FUSION"] = "1"
    folders = {"TRITON_CACHE_DIR": "triton", "CUPY_CACHE_DIR": "cupy", "XDG_CACHE_HOME": "cache"}
    env |= {name: str(cache / subfolder) for name, subfolder in folders.items()}
    env["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "inductor")
    env.pop("TRITON_INTERPRET", None)
    if mode != "gpu":
        env |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    if mode == "dry":
        env["TRITON_INTERPRET"] = "1"
    return env


def unpack(archive: Path, cache: Path) -> str:
    """Unpack the prebuilt cache. Returns a line for the summary."""
    cache.mkdir(parents=True, exist_ok=True)
    if not archive.exists():
        return f"no prebuilt cache at {archive}: everything is compiled here"
    began = time.monotonic()
    try:
        with tarfile.open(archive) as tar:
            tar.extractall(cache, filter="data")
    except (OSError, tarfile.TarError) as error:
        return f"the prebuilt cache {archive} cannot be unpacked ({error}): everything is compiled here"
    entries = sum(1 for _ in (cache / "triton").glob("*")) if (cache / "triton").exists() else 0
    size = archive.stat().st_size / 2**20
    return f"prebuilt cache: {entries} entries, {size:.1f} MiB packed, unpacked in {time.monotonic() - began:.1f} s"


class Worker:
    """A process that runs the stages of one group, in a separate process group."""

    def __init__(self, mode: str, env: dict[str, str], log: IO[bytes]) -> None:
        command = [sys.executable, "-P", "-m", "gpu_stages", mode]
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=env, stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True
        )

    def start(self, request: dict[str, Any]) -> None:
        """Send a stage to the worker."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
            self.process.stdin.flush()

    def alive(self) -> bool:
        """Whether the worker can take another stage."""
        return self.process.poll() is None

    def kill(self) -> None:
        """Kill the worker and all processes that it started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


class Session:
    """Runs the stages and writes `summary.txt`, `session.json` and `session.log`."""

    def __init__(self, arguments: argparse.Namespace, folder: Path, cache: Path) -> None:
        self.arguments, self.folder, self.began = arguments, folder, time.monotonic()
        self.mode = "dry" if arguments.dry_run else "stand-in" if arguments.stand_in else "gpu"
        self.env, self.cache = environment(folder, self.mode, cache), cache
        self.env["DEEPREG_FAST_GPU_OUT"] = str(Path(arguments.out).resolve())
        if arguments.before and Path(arguments.before).exists():
            self.env["DEEPREG_FAST_GPU_BEFORE"] = str(Path(arguments.before).resolve())
        self.out = Path(arguments.out).resolve()
        self.out.mkdir(parents=True, exist_ok=True)
        self.log = (self.out / "session.log").open("ab", buffering=0)
        self.record: dict[str, Any] = {"call": arguments.call, "mode": self.mode, "notes": [], "stages": {}}
        self.workers: dict[str, Worker] = {}

    def left(self) -> float:
        """Seconds left in the session."""
        return float(self.arguments.seconds) * PATIENCE[self.mode] - (time.monotonic() - self.began)

    def note(self, line: str) -> None:
        """Add a line at the top of the summary."""
        self.record["notes"].append(line)
        self.write()

    def run(self, stage: Stage) -> None:
        """Run one stage. Results are written immediately, including those of processes that end early."""
        limit, began = min(PATIENCE[self.mode] * stage.seconds, self.left() - RESERVE), time.monotonic()
        if limit < 3.0:
            self.keep(stage.name, {"state": "no time left", "seconds": 0.0})
            return
        partial, entries = self.folder / f"{stage.name}.json", _entries(self.cache)
        while True:
            remaining = limit - (time.monotonic() - began)
            skip = sorted(_read(partial).get("items", {}))
            request = {"stage": stage.name, "path": str(partial), "seconds": remaining - 0.5, "skip": skip}
            state = self._watch(stage, {**request, "data": self.arguments.data}, began, limit)
            record = _read(partial)
            if state == "again" and set(record.get("items", {})) > set(skip) and time.monotonic() - began < limit - 2:
                continue
            state = record.get("state", "cut") if state == "again" else state
            # Includes entries of processes that the stage started.
            record["new_cache_entries"] = _entries(self.cache) - entries
            self.keep(stage.name, {**record, "state": state, "seconds": round(time.monotonic() - began, 1)})
            print(f"{stage.name}: {state}, {time.monotonic() - began:.0f} s", flush=True)
            return

    def _watch(self, stage: Stage, request: dict[str, Any], began: float, limit: float) -> str:
        """Send the stage to its worker and wait. Returns "done", "cut" at the stage's limit, or "again" if the process
        ended and items remain."""
        worker = self.workers.get(stage.group)
        if worker is None or not worker.alive():
            worker = self.workers[stage.group] = Worker(self.mode, self.env, self.log)
        partial = Path(request["path"])
        worker.start(request)
        while True:
            time.sleep(0.05)
            record = _read(partial)
            self.keep(stage.name, {**record, "state": "running", "seconds": round(time.monotonic() - began, 1)})
            if record.get("state") == "done":
                return "done"
            if not worker.alive():
                _mark(partial, f"ended its process (status {worker.process.returncode})")
                return "again"
            running = record.get("running")
            if time.monotonic() - began > limit:
                worker.kill()
                _mark(partial, "was cut by the stage's limit")
                return "cut"
            if running and time.time() - running["since"] > PATIENCE[self.mode] * running["seconds"]:
                worker.kill()
                _mark(partial, f"hung: killed after {PATIENCE[self.mode] * running['seconds']:.0f} s")
                return "again"

    def close(self) -> None:
        """Kill the workers."""
        for worker in self.workers.values():
            worker.kill()

    def keep(self, name: str, record: dict[str, Any]) -> None:
        """Add a stage's record to the results, if it has changed."""
        previous = self.record["stages"].get(name, {})
        if {**previous, "seconds": 0} == {**record, "seconds": 0}:
            return
        self.record["stages"][name] = record
        self.write()

    def write(self) -> None:
        """Write the summary and the record atomically."""
        self.record["seconds"] = round(time.monotonic() - self.began, 1)
        for name, text in (("session.json", json.dumps(self.record, indent=1)), ("summary.txt", summary(self.record))):
            scratch = self.folder / f".{name}"
            scratch.write_text(text + "\n", encoding="utf-8")
            # The folder of the results may be on another file system.
            shutil.copyfile(scratch, self.out / f".{name}")
            (self.out / f".{name}").replace(self.out / name)


def _entries(cache: Path) -> int:
    """Number of entries in Triton's cache."""
    return sum(1 for _ in (cache / "triton").glob("*"))


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _mark(path: Path, why: str) -> None:
    """Record in a stage's record why the running item ended."""
    record = _read(path)
    running = record.pop("running", None)
    record.pop("state", None)
    if running:
        record["items"][running["item"]] = why
        record["summary"].append(f"{running['item']}: FAILED: {why}")
    elif not record:
        record = {"items": {"start": why}, "summary": [f"start: FAILED: {why}"]}
    path.write_text(json.dumps(record), encoding="utf-8")


def summary(record: dict[str, Any]) -> str:
    """The summary: for every stage in order, its verdicts and its lines."""
    lines = [f"call {record['call']} ({record['mode']}), {record.get('seconds', 0):.0f} s", *record["notes"]]
    for name, stage in record["stages"].items():
        compile_record = stage.get("compile", {})
        anew = compile_record.get("compiled", {})
        head = f"[{name}] {stage['state']}, {stage.get('seconds', 0):.0f} s"
        if compile_record:
            head += (
                f"; {len(anew)} compiled anew in {compile_record['seconds']:.1f} s, {compile_record['cached']} cached"
            )
        if stage.get("new_cache_entries"):
            head += f"; {stage['new_cache_entries']} new cache entries"
        verdicts = list(stage.get("verdicts", {}).values())
        if verdicts:
            head += "; " + ", ".join(f"{verdicts.count(v)} {v}" for v in dict.fromkeys(verdicts))
        lines += ["", head, *(f"  {line}" for line in stage.get("summary", []))]
        lines += [f"  compiled anew: {n}, {s:.1f} s" for n, s in list(anew.items())[:20]]
        lines += [f"  warning: {w}" for w in stage.get("warnings", [])[:10]]
        if stage.get("graphs_off"):
            lines.append(f"  CUDA graphs were given up on {', '.join(stage['graphs_off'])}")
    return "\n".join(lines)


def compile_ahead(session: Session) -> subprocess.Popen[bytes] | None:
    """Start torch.compile of the peers in the background; the stage `compiled` then finds the results on disk."""
    if session.mode != "gpu":
        return None
    partial = session.folder / "compile_ahead.json"
    worker = Worker(session.mode, session.env, session.log)
    request = {"stage": "compile_ahead", "path": str(partial), "seconds": 240.0, "skip": [], "data": ""}
    worker.start(request)
    session.workers["compile_ahead"] = worker
    return worker.process


def main(argv: list[str] | None = None) -> int:
    """Run the stages of one call. Returns 0 if all were completed and nothing was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--call", type=int, choices=sorted(CALLS), default=1, help="which of the two")
    parser.add_argument("--out", required=True, help="folder for summary.txt, session.json, session.log and tables")
    parser.add_argument("--data", default="", help="folder of BSD400, for the training")
    parser.add_argument("--cache", default=str(ARCHIVE), help="archive of prebuild.py")
    parser.add_argument("--before", default="", help="session.json of the first call: what failed is run again")
    parser.add_argument("--seconds", type=float, default=322.0, help="of the whole call")
    parser.add_argument("--stages", default="", help="some of the call's stages, separated by commas")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the host's tensors; measures nothing")
    parser.add_argument("--stand-in", action="store_true", help="launches without a GPU; measures nothing")
    arguments = parser.parse_args(argv)
    stages = CALLS[arguments.call]
    names = [n for n in arguments.stages.split(",") if n] or [s.name for s in stages]
    unknown = [n for n in names if n not in [s.name for s in stages]]
    if unknown:
        known = ", ".join(s.name for s in stages)
        parser.error(f"--stages must be among {known} for call {arguments.call}, but has {unknown[0]!r}")
    with tempfile.TemporaryDirectory(prefix="gpu_session_") as name:
        folder = site(Path(name))
        cache = CACHE if not arguments.dry_run else folder / "cache"
        session = Session(arguments, folder, cache)
        if not arguments.dry_run:
            session.note(unpack(Path(arguments.cache), cache))
        # SIGTERM ends the session cleanly, with its workers.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        try:
            if "compiled" in names:
                compile_ahead(session)
            for stage in stages:
                if stage.name in names:
                    session.run(stage)
        finally:
            session.close()
            session.write()
    print(summary(session.record), flush=True)
    return int(any(_failed(s) for s in session.record["stages"].values()))


def _failed(stage: dict[str, Any]) -> bool:
    if stage["state"] != "done" or any(v in ("WRONG", "not written") for v in stage.get("verdicts", {}).values()):
        return True
    return any(state != "done" for state in stage.get("items", {}).values())


if __name__ == "__main__":
    sys.exit(main())
