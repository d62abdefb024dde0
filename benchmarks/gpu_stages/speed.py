"""What the kernels and the solvers cost, beside their peers and at other launch options."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch

from gpu_stages.common import PRECISIONS, Ours, Stage, problem

TILES = ((8, 8, 4), (8, 16, 4), (16, 16, 4), (16, 16, 8), (4, 32, 4), (8, 32, 4), (8, 32, 8), (32, 32, 8))
"""Rows and columns of a tile, and warps."""


def _cases(stage: Stage, p: Any, names: Iterable[str], rounds: int) -> None:
    """Measure cases one by one, each kept as soon as it is there."""
    from deepreg_fast.bench import runner
    from deepreg_fast.bench.cuda_cases import CUDA_CASES
    from deepreg_fast.errors import OutOfMemory

    bounds = _bounds(stage, p)
    for name in names:
        if stage.left() < 10:
            stage.say(f"{name}: no time left")
            continue

        def measured(p: Any, name: str = name) -> None:
            with p.target.fair():
                for case in CUDA_CASES[name](p):
                    result = runner.measure(case, p.target, rounds)
                    case.release()
                    _keep(stage, p, result, bounds)

        def halved(name: str = name) -> None:
            try:
                measured(p)
            except (torch.OutOfMemoryError, OutOfMemory) as error:
                print(error)
                again = True
            else:
                again = False
            if again:
                # The error's own frames would hold the memory.
                _freed(stage)
                stage.say(f"{name}: {p.batch} images need too much memory with all peers; half as many instead")
                measured(replace(p, batch=p.batch // 2))

        stage.attempt(name, halved)
        _freed(stage)


def _freed(stage: Stage) -> None:
    gc.collect()
    if not stage.dry:
        torch.cuda.empty_cache()


def _bounds(stage: Stage, p: Any) -> Any:
    from deepreg_fast.bench import ceilings

    if "ceilings" not in stage.found:
        small = {"side": 64, "megabytes": 1, "rounds": 1} if stage.dry else {"rounds": 3}
        stage.save(ceilings=vars(ceilings.measure(stage.device, p.target.clock, **small)))
    return ceilings.Ceilings(**stage.found["ceilings"])


def _keep(stage: Stage, p: Any, result: Any, bounds: Any) -> None:
    from deepreg_fast.bench import runner

    whole = runner.to_json([result], p, bounds, {})
    key = f"{result.case.name}, {p.batch} of {p.size}"
    cases: Any = whole["cases"]
    stage.found.setdefault("cases", {})[key] = cases[result.case.name]
    if result.wrong:
        stage.say(f"{result.case.name}: WRONG: {result.wrong}")
        return
    rows = {r.name: r for r in result.rows}
    ours = rows["ours"]
    share = bounds.share(result.case.flops, result.case.bytes, ours.milliseconds)
    peers = ", ".join(
        f"{n} {r.ratio.median:.2f}x" for n, r in rows.items() if n != "ours" and not n.startswith("ours +")
    )
    void = f"; VOID: {result.void}" if result.void else ""
    stage.say(f"{result.case.name} {p.batch}x{p.size}: {ours.milliseconds:.3g} ms, {share}; {peers}{void}")


def _uncompiled() -> None:
    """Leave torch.compile and JAX to a stage of their own: they take a minute, and memory of their own."""
    from deepreg_fast.bench import peers

    def later(*_: object, **__: object) -> Any:
        raise RuntimeError("measured in the stage 'compiled'")

    torch.compile = later  # type: ignore[assignment]
    peers.why_no_jax = lambda _: "measured in the stage 'compiled'"


def kernels(stage: Stage) -> None:
    """The conv chain at the size of the targets."""
    _uncompiled()
    _cases(stage, problem(stage), ("gradient", "hvp", "linearize", "theta"), stage.size(15, 3))
    if stage.left() > 25:
        _cases(stage, problem(stage, norm="none"), ("gradient", "hvp"), stage.size(9, 3))


def compiled(stage: Stage) -> None:
    """Gradient and product with torch.compile and JAX among the peers."""
    if stage.dry:
        _uncompiled()
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "8")
    _cases(stage, problem(stage), ("hvp", "gradient"), stage.size(9, 3))


def srm(stage: Stage) -> None:
    """Every product of every transform, at the size of the targets and at a power of two."""
    _cases(stage, problem(stage), ("dct", "hadamard", "walsh"), stage.size(11, 3))
    _cases(stage, problem(stage, 256, 256), ("walsh", "hadamard"), stage.size(9, 3))


def loops(stage: Stage) -> None:
    """Whole solves: with and without CUDA graphs, then beside their peers."""
    stage.attempt("graphs", lambda: _graphs(stage))
    _cases(stage, problem(stage), ("cg iteration",), stage.size(7, 3))
    _cases(stage, problem(stage, 32), ("cg", "step", "recover"), stage.size(5, 3))


def _solves(p: Any) -> dict[str, Callable[[], object]]:
    """A recovery, plain and accelerated, an adjoint system, and a gradient of the training, ready to be called."""
    import deepreg_fast as dr
    from deepreg_fast.bench.problem import under
    from deepreg_fast.bench.solver_cases import MU
    from deepreg_fast.implicit import solve_adjoint

    ours, xs, A = p.target.ours, p.images(5), p.operator()
    reg, x = under(ours, lambda: p.solvable(xs, 0.9)), xs[0]
    lin, y, mu = under(ours, lambda: reg.linearize(x)), A.A(x), x.new_full((p.batch,), MU)
    plain, anderson = dr.PGDOptions(300, 1e-3), dr.PGDOptions(300, 1e-4, "anderson")
    adjoint = dr.AdjointOptions("cg", 100, 1e-5)
    found = {
        "recovery, plain": lambda: dr.recover(y, A, reg, MU, options=plain),
        "recovery, Anderson": lambda: dr.recover(y, A, reg, MU, options=anderson),
        "adjoint by CG": lambda: solve_adjoint(lin, A, mu, torch.sin(9 * x), adjoint),
        "hypergradient": lambda: dr.hypergradient(x, y, A, reg, MU, options=anderson, adjoint=adjoint),
    }
    return {name: lambda f=f: under(ours, f) for name, f in found.items()}


def _graphs(stage: Stage) -> None:
    """The same solves as they come and without graphs, at a small batch, where launches show, and at a large one."""
    from deepreg_fast.linsolve import progress

    usual = progress.WARM_UP
    for batch in (8, 64):
        p = problem(stage, batch)
        for name, f in _solves(p).items():
            told = {}
            for label, warm_up in (("graphs", usual), ("no graphs", 10**9)):
                progress.WARM_UP = warm_up
                f()
                told[label] = 1e3 * sorted(p.target.clock.measure(lambda _, f=f: f(), 0, 1) for _ in range(3))[1]
            progress.WARM_UP = usual
            stage.found.setdefault("graphs", {})[f"{name}, {p.batch} of {p.size}"] = told
            stage.say(f"{name}, {p.batch} images: " + ", ".join(f"{t:.3g} ms with {n}" for n, t in told.items()))


def _configurations(stage: Stage) -> list[dict[str, Any]]:
    """Launch options, the default first; one is changed at a time, and the tile of the fastest precision."""
    found: list[dict[str, Any]] = [{"precision": name} for name in PRECISIONS]
    found += [{"tile": list(tile)} for tile in (TILES[2:3] if stage.dry else TILES)]
    found += [{"plane_bytes": n << 20} for n in ((1,) if stage.dry else (16, 64, 128, 2048))]
    return found


def _timed(stage: Stage, p: Any, options: dict[str, Any]) -> dict[str, Callable[[], object]]:
    """The main kernels, ready to be called."""
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
    kernels, reg, x, v = Ours(stage, **given), p.regularizer(), p.images(1)[0], p.images(2)[0]
    lin = kernels.linearize(reg, x)
    return {
        "gradient": lambda: kernels.gradient(reg, x),
        "linearize": lambda: kernels.linearize(reg, x),
        "hvp": lambda: lin.hvp(v),
        "theta": lambda: lin.param_vjp(v),
    }


def warm(stage: Stage) -> None:
    """Compile the kernels for one configuration, so that the sweep finds them in Triton's cache."""
    p = replace(problem(stage), batch=2)
    for f in _timed(stage, p, json.loads(stage.found["options"])).values():
        f()


def sweep(stage: Stage) -> None:
    """Time the main kernels at every configuration; the compilers run at once, before."""
    configurations = _configurations(stage)
    if not stage.dry:
        _warm_all(stage, configurations)
    p = replace(problem(stage), batch=1, size=12) if stage.dry else problem(stage)
    best: dict[str, tuple[float, str]] = {}
    for options in configurations:
        name = json.dumps(options)
        if stage.left() < 5:
            stage.say("no time left for the rest")
            break
        stage.attempt(name, lambda o=options, n=name: _time_one(stage, p, o, n, best))
    for n, (t, name) in best.items():
        stage.say(f"best {n}: {t:.3g} ms with {name}")


def _time_one(stage: Stage, p: Any, options: dict[str, Any], name: str, best: dict[str, tuple[float, str]]) -> None:
    found = {}
    for n, f in _timed(stage, p, options).items():
        f()
        # The median of five times three calls; one call in a dry run.
        few = (1, 1) if stage.dry else (3, 5)
        seconds = sorted(p.target.clock.measure(lambda _, f=f: f(), 0, few[0]) for _ in range(few[1]))
        found[n] = 1e3 * seconds[few[1] // 2]
        best[n] = min(best.get(n, (float("inf"), "")), (found[n], name))
    stage.found.setdefault("milliseconds", {})[name] = found
    stage.say(f"{name}: " + ", ".join(f"{n} {t:.3g} ms" for n, t in found.items()))


def _warm_all(stage: Stage, configurations: list[dict[str, Any]]) -> None:
    commands = [
        [sys.executable, "-P", "-m", "gpu_stages", "warm", "--json", str(stage.path.with_name(f"warm{i}.json")),
         "--options", json.dumps(options)]
        for i, options in enumerate(configurations)
    ]  # fmt: skip
    # Half of the stage at most; what is not compiled by then, the sweep compiles itself.
    until = stage.left() / 2
    running = [subprocess.Popen(c, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for c in commands]
    for child in running:
        try:
            child.wait(timeout=max(0.1, until - (stage.seconds - stage.left())))
        except subprocess.TimeoutExpired:
            child.kill()
