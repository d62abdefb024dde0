"""Compile everything that the two calls of `gpu_session.py` launch, on a machine without a GPU, into an archive.

    python3.12 -m venv device && device/bin/pip install torch==2.11.0 triton==3.6.0 cupy-cuda13x==14.2.0 \
        pytest hypothesis scipy scikit-image pillow safetensors typer rich tensorboard matplotlib filelock
    device/bin/python benchmarks/prebuild.py

The keys of Triton's and NVRTC's caches contain the versions of the compilers, so the environment must match that of the
machine with the GPU (`--expect`). The stages run with the stand-in driver, which compiles everything that they launch.
A second run of the same stages must then find everything in the cache; this is checked unless `--no-check`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import gpu_session

EXPECTED = "torch=2.11.0,triton=3.6.0,cupy-cuda13x=14.2.0,python=3.12"
NEEDED = (".cubin", ".json", ".so")
"""Suffixes of the files of Triton's entries that a launch reads; intermediate code is not packed."""


def mismatches(expected: str) -> list[str]:
    """Packages whose version differs from the expected one, each with both versions."""
    wrong = []
    for pair in filter(None, expected.split(",")):
        name, _, expected_version = pair.partition("=")
        try:
            installed = sys.version.split()[0] if name == "python" else version(name)
        except PackageNotFoundError:
            installed = "missing"
        if not installed.startswith(expected_version):
            wrong.append(f"{name} must be {expected_version}, but is {installed}")
    return wrong


def rehearse(call: int, stages: str = "") -> dict[str, object]:
    """Run a call with the stand-in and the current cache. Returns what was compiled and the stages' states."""
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, str(Path(gpu_session.__file__)), "--stand-in", "--call", str(call), "--out", out]
        command += ["--cache", "none", "--data", "embedded", *(["--stages", stages] if stages else [])]
        subprocess.run(command, stdout=sys.stderr, check=False)
        record = json.loads((Path(out) / "session.json").read_text(encoding="utf-8"))
    # The cache's new entries include those of pytest and the profilers.
    compiled = {
        n: s.get("compile", {}).get("compiled") or s.get("new_cache_entries", 0) for n, s in record["stages"].items()
    }
    failed = [
        f"{stage}: {line}"
        for stage, entry in record["stages"].items()
        for line in entry.get("summary", [])
        if "FAILED" in line
    ]
    states = {n: s["state"] for n, s in record["stages"].items()}
    return {"compiled": {n: c for n, c in compiled.items() if c}, "states": states, "failed": failed}


def pack(cache: Path, archive: Path) -> int:
    """Pack the cache without intermediate code as a tar.xz. Returns the number of files."""
    archive.parent.mkdir(parents=True, exist_ok=True)
    count = 0
    partial = archive.with_suffix(".part")
    with tarfile.open(partial, "w:xz", preset=6) as tar:
        for path in sorted(cache.rglob("*")):
            if path.is_file() and (path.suffix in NEEDED or "cuda" in path.parts):
                tar.add(path, path.relative_to(cache).as_posix())
                count += 1
    partial.replace(archive)
    return count


def main() -> int:
    """Build, check, pack."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=gpu_session.ARCHIVE, help="the archive")
    parser.add_argument("--expect", default=EXPECTED, help="versions of the machine with the GPU")
    parser.add_argument("--stages", default="", help="of call 1 alone, separated by commas; for trying")
    parser.add_argument("--keep", action="store_true", help="add to the cache that is there")
    parser.add_argument("--no-check", action="store_true", help="leave out the second run")
    arguments = parser.parse_args()
    wrong = mismatches(arguments.expect)
    if wrong:
        parser.error(f"{'; '.join(wrong)}: use an environment as in --help, or --expect ''")
    cache, began = gpu_session.CACHE, time.monotonic()
    if not arguments.keep:
        shutil.rmtree(cache, ignore_errors=True)
    calls = (1,) if arguments.stages else (1, 2)
    for call in calls:
        report = rehearse(call, arguments.stages)
        print(f"call {call}: {report['states']}", *report["failed"], sep="\n  ")  # type: ignore[misc]
    seconds = time.monotonic() - began
    files = pack(cache, arguments.out)
    size = arguments.out.stat().st_size / 2**20
    entries = sum(1 for _ in (cache / "triton").glob("*"))
    print(f"{entries} entries of Triton, {files} files, {size:.1f} MiB packed, built in {seconds:.0f} s")
    if arguments.no_check:
        return 0
    shutil.rmtree(cache)
    print(gpu_session.unpack(arguments.out, cache))
    missed = {call: rehearse(call, arguments.stages)["compiled"] for call in calls}
    print(f"compiled anew with the archive in place: {missed}")
    return int(any(missed.values()))


if __name__ == "__main__":
    sys.exit(main())
