"""What the machine is, and whether the answers are right."""

from __future__ import annotations

import importlib.util
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from gpu_stages.common import PRECISIONS, Ours, Stage, problem, relative

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("torch", "triton", "cupy-cuda13x", "nvidia-cuda-nvrtc", "numpy", "scipy", "jax", "pytest", "hypothesis")
PACKAGES += ("typer", "rich", "safetensors", "pooch", "scikit-image", "tensorboard", "matplotlib", "pybind11")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _told(*command: str) -> str:
    """What a command prints; why there is nothing, where there is none."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
        return (done.stdout or done.stderr).strip()
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{type(error).__name__}: {error}"


def machine(stage: Stage) -> None:
    """Versions, backends, ceilings."""
    query = "name,driver_version,memory.total,power.limit,clocks.max.sm,clocks.sm,temperature.gpu"
    stage.save(
        python=platform.python_version(),
        system=platform.platform(),
        packages={p: _version(p) for p in PACKAGES},
        nvidia_smi=_told("nvidia-smi", f"--query-gpu={query}", "--format=csv"),
        nvcc=_told("nvcc", "--version"),
        compilers=_told("gcc", "--version").split("\n")[0],
    )
    import deepreg_fast as dr

    stage.save(deepreg_fast=dr.__version__, backends=dr.backends())
    for name, reason in dr.backends().items():
        stage.say(f"backend {name}: {reason or 'ready'}")
    from deepreg_fast.bench import ceilings
    from deepreg_fast.bench.events import EventClock
    from deepreg_fast.bench.timing import HOST

    if stage.dry:
        found = ceilings.measure(stage.device, HOST, side=64, megabytes=1, rounds=2)
    else:
        stage.save(gpu=ceilings.describe(stage.device))
        found = ceilings.measure(stage.device, EventClock())
    stage.save(ceilings=vars(found))
    stage.say(str(found))


def tests(stage: Stage) -> None:
    """Those that are marked gpu; where pytest or what they import is missing, `precision` has to do."""
    lacking = [p for p in ("pytest", "hypothesis") if importlib.util.find_spec(p) is None]
    if lacking:
        stage.say(f"not run, as {' and '.join(lacking)} is missing here; the stage precision checks the answers")
        return
    junit = stage.path.with_suffix(".xml")
    marked = [str(p) for p in sorted((ROOT / "tests").glob("test_*.py")) if "mark.gpu" in p.read_text("utf-8")]
    command = [sys.executable, "-P", "-m", "pytest", "-v", "-rfE", "-p", "no:cacheprovider", f"--junitxml={junit}"]
    command += ["--continue-on-collection-errors"]
    command += ["tests/test_metrics.py"] if stage.dry else ["-m", "gpu", *marked]
    if importlib.util.find_spec("xdist") is not None and not stage.dry:
        # Compiling takes most of the time, and runs on the host.
        command += ["-n", "6"]
    done = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.stdout is not None
    lines: list[str] = []
    counts: dict[str, int] = {}
    for line in done.stdout:
        print(line, end="", flush=True)
        lines.append(line.rstrip())
        # "tests/x.py::name PASSED", or of several workers "[gw0] [ 10%] PASSED tests/x.py::name".
        outcome = re.search(r"^(?:tests/\S+::.*|\[gw.*) (PASSED|FAILED|ERROR|SKIPPED|XFAIL)\b", line)
        if outcome:
            counts[outcome[1]] = counts.get(outcome[1], 0) + 1
            # Should the stage be cut, this line is what it leaves.
            stage.save(counts=counts, summary=[f"so far {counts}"])
    done.wait()
    stage.save(returncode=done.returncode, tail=lines[-200:], summary=[])
    stage.say(lines[-1] if lines else "pytest printed nothing")
    for line in [t for t in lines if t.startswith(("FAILED", "ERROR"))][:20]:
        stage.say(line[:200])
    if done.returncode not in (0, 5):
        raise RuntimeError(f"pytest ended with code {done.returncode}")


def precision(stage: Stage) -> None:
    """Errors against float64 of ours at each precision and of torch, and what CG makes of them."""
    from deepreg_fast.bench.ceilings import tf32
    from deepreg_fast.bench.peers import BestTorch
    from deepreg_fast.bench.problem import double

    p = replace(problem(stage, 16), size=12) if stage.dry else problem(stage, 16)
    reg, x, v = p.regularizer(), p.images(1)[0], p.images(2)[0]

    def products(lin: Any, v: torch.Tensor) -> dict[str, torch.Tensor]:
        theta = torch.cat([t.flatten() for t in lin.param_vjp(v).values()])
        return {"linearize": lin.grad, "hvp": lin.hvp(v), "theta": theta}

    wide = double(reg)
    exact = products(wide.linearize(x.double()), v.double())

    def errors(name: str, found: dict[str, torch.Tensor], gradient: torch.Tensor) -> None:
        told = {k: relative(found[k], exact[k]) for k in exact}
        told["gradient"] = relative(gradient, exact["linearize"])
        stage.found.setdefault("errors_by_precision", {})[name] = told
        stage.say(f"{name}: " + ", ".join(f"{k} {e:.1e}" for k, e in told.items()))

    def of_torch(allow: bool) -> None:
        with tf32(allow):
            best = BestTorch(reg)
            hvp, theta = best.products(x)
            found = {"linearize": best.graph(x)[1].detach(), "hvp": hvp(v)}
            found["theta"] = torch.cat([t.flatten() for t in theta(v)])
            errors(f"torch {'tf32' if allow else 'fp32'}", found, best.grad(x))

    def of_ours(name: str, kernels: Ours) -> None:
        errors(name, products(kernels.linearize(reg, x), v), kernels.gradient(reg, x))

    for allow in (False, True):
        stage.attempt("torch", lambda a=allow: of_torch(a))
    stage.attempt("ours", lambda: of_ours("ours as it comes", Ours(stage)))
    for name in PRECISIONS:
        stage.attempt(name, lambda n=name: of_ours(f"ours {n}", Ours(stage, precision=n)))
    for name in PRECISIONS[:1] if stage.dry else PRECISIONS:
        stage.attempt(f"cg {name}", lambda n=name: _solved(stage, p, n))


def _solved(stage: Stage, p: Any, name: str) -> None:
    from deepreg_fast.bench.problem import under
    from deepreg_fast.bench.solver_cases import MU, true_residual
    from deepreg_fast.implicit import AdjointOptions, solve_adjoint

    xs, bs = p.images(1), [0.1 * b for b in p.images(2)]
    reg, A = under("reference", lambda: p.solvable(xs, 0.9)), p.operator()
    residual = true_residual(p, reg, A, xs[0], bs)
    lin = Ours(stage, precision=name).linearize(reg, xs[0])
    mu = xs[0].new_full((p.batch,), MU)
    for tolerance in (1e-2,) if stage.dry else (1e-2, 1e-4, 1e-5):
        options = AdjointOptions("cg", 100, tolerance)
        sol = under(p.target.ours, lambda o=options: solve_adjoint(lin, A, mu, bs[0], o))
        told = {
            "iterations": float(sol.iterations.double().mean()),
            "converged": int((sol.status == 0).sum()),
            "images": p.batch,
            "true_residual": residual(sol.x.double().flatten(), 0),
        }
        stage.found.setdefault("cg", {}).setdefault(name, {})[f"{tolerance:g}"] = told
        stage.say(
            f"CG {name} to {tolerance:g}: {told['converged']} of {p.batch} converged in {told['iterations']:.1f} "
            f"iterations, true residual {told['true_residual']:.1e}"
        )


def sanitizer(stage: Stage) -> None:
    """compute-sanitizer over every product of small SRMs."""
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not stage.dry and not Path(tool).exists():
        stage.say("compute-sanitizer is not here")
        return
    driver = [sys.executable, "-P", "-m", "gpu_stages.sanitized", *(["--dry-run"] if stage.dry else [])]
    for name in ("memcheck", "racecheck"):
        options = (
            [] if stage.dry else [tool, "--tool", name, "--error-exitcode", "9", "--kernel-name-exclude", "kns=at::"]
        )
        done = _told_all([*options, *driver], max(10.0, stage.left() / (2 if name == "memcheck" else 1) - 2))
        stage.save(**{name: done})
        last = [t for t in done["output"] if "ERROR SUMMARY" in t or "RACECHECK SUMMARY" in t] or done["output"][-1:]
        stage.say(f"{name}: {done['state']}; {' '.join(last)[:160]}")


def _told_all(command: list[str], seconds: float) -> dict[str, Any]:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired as error:
        told = (error.stdout or b"").decode(errors="replace") if isinstance(error.stdout, bytes) else error.stdout or ""
        return {"state": "cut", "output": told.splitlines()[-40:]}
    print(done.stdout, done.stderr)
    return {"state": f"code {done.returncode}", "output": (done.stdout + done.stderr).splitlines()[-40:]}
