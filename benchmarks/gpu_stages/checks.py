"""Description of the machine, and checks of the results."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from gpu_stages.common import PRECISIONS, Kernels, Stage, chain_products, one_line, problem, relative

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("torch", "triton", "cupy-cuda13x", "nvidia-cuda-nvrtc", "numpy", "scipy", "jax", "pytest", "hypothesis")
PACKAGES += ("typer", "rich", "safetensors", "pooch", "scikit-image", "tensorboard", "matplotlib", "pybind11")
WORKERS = 14
"""Processes of the stage `tests`."""


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _output(*command: str) -> str:
    """Output of a command, or the reason why there is none."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
        return (result.stdout or result.stderr).strip()
    except (OSError, subprocess.TimeoutExpired) as error:
        return one_line(error)


def machine(stage: Stage) -> None:
    """Record versions, backends and ceilings."""
    stage.item("versions", lambda: _versions(stage), 10.0)
    stage.item("ceilings", lambda: _ceilings(stage), 10.0)


def _versions(stage: Stage) -> None:
    import deepreg_fast as dr

    query = "name,driver_version,memory.total,power.limit,clocks.max.sm,clocks.sm,temperature.gpu"
    packages = {p: _version(p) for p in PACKAGES}
    stage.save(
        python=platform.python_version(),
        system=platform.platform(),
        packages=packages,
        nvidia_smi=_output("nvidia-smi", f"--query-gpu={query}", "--format=csv"),
        nvcc=_output("nvcc", "--version"),
        compilers=_output("gcc", "--version").split("\n")[0],
        deepreg_fast=dr.__version__,
        backends=dr.backends(),
        date=time.strftime("%Y-%m-%d %H:%M"),
    )
    shown = ", ".join(f"{p} {packages[p]}" for p in ("torch", "triton", "cupy-cuda13x"))
    stage.say(f"Python {platform.python_version()}, {shown}; {stage.record['nvidia_smi'].splitlines()[-1:]}")
    for name, reason in dr.backends().items():
        stage.say(f"backend {name}: {reason or 'ready'}")


def _ceilings(stage: Stage) -> None:
    from deepreg_fast.bench import ceilings
    from deepreg_fast.bench.timing import HOST

    if stage.mode == "stand-in":
        stage.say("no ceilings without a device")
        return
    if not stage.on_gpu:
        measured = ceilings.measure(stage.device, HOST, side=64, megabytes=1, rounds=2)
    else:
        stage.save(gpu=ceilings.describe(stage.device))
        measured = ceilings.measure(stage.device, problem(stage).target.clock, rounds=3)
    stage.save(ceilings=vars(measured))
    stage.say(str(measured))


def tests(stage: Stage) -> None:
    """Run the tests marked gpu, or only those that failed in a previous call if its results are given."""
    stage.item("pytest", lambda: _tests(stage), seconds=max(5.0, stage.left() - 0.5))


def _tests(stage: Stage) -> None:
    missing = [p for p in ("pytest", "hypothesis") if importlib.util.find_spec(p) is None]
    if missing:
        stage.say(f"not run, as {' and '.join(missing)} is missing here; the stage smoke checks the answers")
        return
    marked = [str(p) for p in sorted((ROOT / "tests").glob("test_*.py")) if "mark.gpu" in p.read_text("utf-8")]
    failed_before = _failed_before()
    if failed_before is not None and not failed_before:
        stage.say("nothing failed in the first call")
        return
    command = [sys.executable, "-P", "-m", "pytest", "-v", "-rfE", "-p", "no:cacheprovider"]
    command += ["--continue-on-collection-errors"]
    env = {**os.environ}
    if stage.mode == "dry":
        command += ["tests/test_metrics.py"]
    elif stage.mode == "stand-in":
        # Nothing is computed, so assertions are disabled; every launch must be reached.
        env["PYTHONOPTIMIZE"] = "1"
        command += ["--assert=plain", "-p", "gpu_stages.stand_in_tests", "-m", "gpu", *(failed_before or marked)]
    else:
        command += ["-m", "gpu", *(failed_before or marked)]
    if importlib.util.find_spec("xdist") is not None and stage.mode != "dry":
        # Tests of one file share fixtures, and a worker launches the kernels that it has loaded.
        command += ["-n", str(min(WORKERS, os.cpu_count() or 1)), "--dist", "loadfile" if stage.on_gpu else "load"]
    process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    lines: list[str] = []
    counts: dict[str, int] = {}
    last = len(stage.record["summary"])
    for line in process.stdout:
        print(line, end="", flush=True)
        lines.append(line.rstrip())
        # "tests/x.py::name PASSED", or with several workers "[gw0] [ 10%] PASSED tests/x.py::name".
        outcome = re.search(r"^(?:tests/\S+::.*|\[gw.*) (PASSED|FAILED|ERROR|SKIPPED|XFAIL)\b", line)
        if outcome:
            counts[outcome[1]] = counts.get(outcome[1], 0) + 1
            # This line remains if the stage is cut off.
            stage.record["summary"][last:] = [f"so far {counts}"]
            stage.save(counts=counts)
    process.wait()
    failed = [re.split(r" - ", line.split(" ", 1)[1])[0] for line in lines if re.match(r"(FAILED|ERROR) tests/", line)]
    stage.record["summary"][last:] = []
    stage.save(returncode=process.returncode, tail=lines[-200:], failed=failed)
    stage.say(lines[-1] if lines else "pytest printed nothing")
    if stage.mode == "stand-in":
        return
    for line in [t for t in lines if t.startswith(("FAILED", "ERROR"))][:20]:
        stage.say(line[:200])
    if process.returncode not in (0, 5):
        raise RuntimeError(f"pytest ended with code {process.returncode}")


def _failed_before() -> list[str] | None:
    path = os.environ.get("DEEPREG_FAST_GPU_BEFORE")
    if not path:
        return None
    return json.loads(Path(path).read_text(encoding="utf-8"))["stages"].get("tests", {}).get("failed")


def precision(stage: Stage) -> None:
    """Measure CG in each precision, then the errors of our kernels and of torch against float64."""
    p = replace(problem(stage, 16), size=12) if stage.mode == "dry" else problem(stage, 16)
    for name in PRECISIONS[:1] if stage.mode == "dry" else PRECISIONS:
        stage.item(f"CG {name}", lambda n=name: _solved(stage, p, n), 12.0)
    if stage.mode == "stand-in":
        return
    stage.item("errors", lambda: _errors(stage, p), 15.0)


def _errors(stage: Stage, p: Any) -> None:
    from deepreg_fast.bench.ceilings import tf32
    from deepreg_fast.bench.peers import BestTorch
    from deepreg_fast.bench.workload import double

    reg, x, v = p.regularizer(), p.images(1)[0], p.images(2)[0]
    exact = chain_products(double(reg).linearize(x.double()), v.double())

    def errors(name: str, answers: dict[str, torch.Tensor], gradient: torch.Tensor) -> None:
        each = {k: relative(answers[k], exact[k]) for k in exact}
        each["gradient"] = relative(gradient, exact["linearize"])
        stage.record.setdefault("errors_by_precision", {})[name] = each
        stage.say(f"{name}: " + ", ".join(f"{k} {e:.1e}" for k, e in each.items()))

    for allow in (False, True):
        with tf32(allow):
            best = BestTorch(reg)
            hvp, theta = best.products(x)
            answers = {"linearize": best.graph(x)[1].detach(), "hvp": hvp(v)}
            answers["theta"] = torch.cat([t.flatten() for t in theta(v)])
            errors(f"torch {'tf32' if allow else 'fp32'}", answers, best.grad(x))
    for options in ({}, *({"precision": n} for n in PRECISIONS), {"storage": "bfloat16"}):
        kernels = Kernels(stage, **options)
        name = "ours as it comes" if not options else f"ours {next(iter(options.values()))}"
        errors(name, chain_products(kernels.linearize(reg, x), v), kernels.value_and_grad(reg, x)[1])


def _solved(stage: Stage, p: Any, name: str) -> None:
    from deepreg_fast.bench.solver_cases import MU, true_residual
    from deepreg_fast.bench.workload import under
    from deepreg_fast.inverse.adjoint import adjoint_named, solve_adjoint

    xs, bs = p.images(1), [0.1 * b for b in p.images(2)]
    if stage.mode == "stand-in":
        Kernels(stage, precision=name).linearize(p.regularizer(), xs[0]).hvp(xs[0])
        stage.say(f"CG {name}: launched")
        return
    reg, A = under("reference", lambda: p.solvable(xs, 0.9)), p.operator()
    residual = true_residual(p, reg, A, xs[0], bs)
    lin = Kernels(stage, precision=name).linearize(reg, xs[0])
    mu = xs[0].new_full((p.batch,), MU)
    for tolerance in (1e-2,) if stage.mode == "dry" else (1e-2, 1e-4, 1e-5):
        options = adjoint_named("cg", 100, tolerance)
        sol = under(p.target.ours, lambda o=options: solve_adjoint(lin, A, mu, bs[0], o))
        record = {
            "iterations": float(sol.iterations.double().mean()),
            "converged": int((sol.status == 0).sum()),
            "images": p.batch,
            "true_residual": residual(sol.x.double().flatten(), 0),
        }
        stage.record.setdefault("cg", {}).setdefault(name, {})[f"{tolerance:g}"] = record
        stage.say(
            f"CG {name} to {tolerance:g}: {record['converged']} of {p.batch} converged in {record['iterations']:.1f} "
            f"iterations, true residual {record['true_residual']:.1e}"
        )


def memcheck(stage: Stage) -> None:
    """Check for out-of-bounds accesses."""
    stage.item("memcheck", lambda: _sanitized(stage, "memcheck"), seconds=max(5.0, stage.left() - 0.5))


def racecheck(stage: Stage) -> None:
    """Check for races in shared memory."""
    stage.item("racecheck", lambda: _sanitized(stage, "racecheck"), seconds=max(5.0, stage.left() - 0.5))


def _sanitized(stage: Stage, name: str) -> None:
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if stage.on_gpu and not Path(tool).exists():
        stage.say("compute-sanitizer is not installed")
        return
    driver = [sys.executable, "-P", "-m", "gpu_stages.sanitized", stage.mode]
    # Exclude torch's kernels; if this version lacks the option, check all kernels.
    choices = (["--kernel-name-exclude", "kns=at::"], []) if stage.on_gpu else ([],)
    for options in choices:
        tooled = [tool, "--tool", name, "--error-exitcode", "9", *options] if stage.on_gpu else []
        output, state = _limited([*tooled, *driver], max(4.0, stage.left() - 2.0))
        if not any("unrecognised option" in t or "unrecognized option" in t for t in output):
            break
    stage.save(**{name: {"state": state, "output": output[-60:]}})
    summary = [t for t in output if "ERROR SUMMARY" in t or "RACECHECK SUMMARY" in t] or output[-1:]
    reached = sum(t.startswith("ran ") for t in output)
    stage.say(f"{name}: {state}; {reached} groups of kernels ran; {' '.join(summary)[:160]}")
    if state == "status 9":
        raise RuntimeError(f"{name} found errors: see the record")


def _limited(command: list[str], seconds: float) -> tuple[list[str], str]:
    """The output lines of a command, and how it ended."""
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    try:
        text, _ = child.communicate(timeout=seconds)
        state = f"status {child.returncode}"
    except subprocess.TimeoutExpired:
        child.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            text, _ = child.communicate(timeout=5.0)
        state = "cut"
    print(text[-8000:])
    return text.splitlines(), state
