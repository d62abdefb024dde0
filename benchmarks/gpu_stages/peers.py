"""Times of the kernels and the solvers compared with their peers. Results are checked at 16 images, timed at more."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterable, Iterator
from dataclasses import fields
from typing import Any

import torch

from gpu_stages.common import Stage, problem

CHECKED = 16
"""Number of images for which the results are compared with float64."""


def peers(stage: Stage) -> None:
    """The conv chain and an iteration of CG at the sizes of the performance targets."""
    with _without_compilers():
        _cases(stage, ("hvp", "gradient", "cg iteration", "theta"), 256, 5, 14.0)
        _cases(stage, ("hvp", "gradient"), 256, 5, 14.0, norm="none")
        _cases(stage, ("dct",), 256, 5, 14.0)


def loops(stage: Stage) -> None:
    """Complete solves: an adjoint system, a training step, a recovery."""
    with _without_compilers():
        _cases(stage, ("cg", "step", "recover"), 32, 5, 15.0)


def compiled(stage: Stage) -> None:
    """Hessian-vector product and gradient with torch.compile and JAX among the peers."""
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "8")
    # Inductor compiles for the current device; a rehearsal without one has nothing to compile.
    with contextlib.nullcontext() if stage.on_gpu else _without_compilers():
        _cases(stage, ("hvp", "gradient"), 256, 5, 30.0)


def compile_ahead(stage: Stage) -> None:
    """Compile the candidates of `compiled` into the shared cache on disk, with one call of each on the device."""
    from deepreg_fast.bench import peers as known
    from deepreg_fast.bench import peers_cuda

    p = problem(stage, 256)
    reg, x, v = p.regularizer(), p.images(1)[0], p.images(2)[0]
    known.compiled_grad(reg)(x)
    peers_cuda.fastest(peers_cuda.compiled_products(reg, x), v, lambda f: 0.0)
    stage.say("torch.compile has compiled its peers")


def _cases(stage: Stage, names: Iterable[str], batch: int, rounds: int, seconds: float, norm: str = "pixel") -> None:
    """Run each case: check it with few images, time it with `batch` images, and save its rows immediately."""
    for name in names:
        label = f"{name}, {norm}" if norm != "pixel" else name
        stage.item(label, lambda n=name: _case(stage, n, batch, rounds, norm), seconds)
        gc.collect()
        if stage.on_gpu:
            torch.cuda.empty_cache()


def _case(stage: Stage, name: str, batch: int, rounds: int, norm: str) -> None:
    from deepreg_fast.bench import runner
    from deepreg_fast.bench.cuda_cases import CUDA_CASES

    if stage.mode == "stand-in":
        _launch_ours(stage, name, norm)
        return
    # Triton's interpreter is slow.
    side = 8 if stage.mode == "dry" else 180
    small_problem, large_problem = (problem(stage, n, side, norm) for n in (min(CHECKED, batch), batch))
    with large_problem.target.fair():
        errors: dict[str, dict[str, float]] = {}
        for case in CUDA_CASES[name](small_problem):
            result, errors[case.name] = runner.check(case)
            case.release()
            if result.wrong:
                stage.record.setdefault("verdicts", {})[case.name] = "WRONG"
                stage.say(f"{case.name}: WRONG: {result.wrong}")
                errors.pop(case.name)
        for case in CUDA_CASES[name](_unchecked(large_problem)):
            if case.name in errors:
                runner._drop_broken(case)
                result = runner.Result(case)
                runner.time_candidates(result, large_problem.target, stage.rounds(rounds), errors[case.name])
                _keep(stage, large_problem, result)
            case.release()


def _launch_ours(stage: Stage, name: str, norm: str) -> None:
    """Launch our kernels of the case; its peers use none of them."""
    p = problem(stage, 2, norm=norm)
    reg, x, v, A = p.regularizer(), p.images(1)[0], p.images(2)[0], p.operator()
    reg.value_and_grad(x)
    lin = reg.linearize(x)
    lin.hvp(v)
    lin.param_vjp(v)
    A.prox_l2(x, A.A(x), 2.0)
    A.normal(x)
    if name in ("cg", "cg iteration", "step", "recover"):
        import deepreg_fast as dr

        options, adjoint = dr.PGDOptions(2, 1e-3), dr.ImplicitAdjoint(dr.CGOptions(2, 1e-4))
        for acceleration in ("none", "anderson"):
            options = dr.PGDOptions(2, 1e-3, acceleration)
            dr.hypergradient(x, A.A(x), A, reg, 0.1, options=options, adjoint=adjoint)
        dr.beta_hat(reg, x, 0.05 * v).power_step(x.new_ones(len(x)))
    stage.say(f"{name}: launched")


def _unchecked(p: Any) -> Any:
    """The problem without its float64 results."""
    from deepreg_fast.bench import Workload

    class Unchecked(Workload):
        """A problem that computes no float64 results."""

        def exactly(self, f: Any, *tensors: torch.Tensor) -> torch.Tensor:
            """An empty tensor."""
            return torch.empty(0)

    return Unchecked(**{f.name: getattr(p, f.name) for f in fields(p)})


def _keep(stage: Stage, p: Any, result: Any) -> None:
    from deepreg_fast.bench import runner

    bounds = _bounds(stage, p)
    table: Any = runner.to_json([result], p, bounds, {})["cases"]
    key = f"{result.case.name}, {p.batch} of {p.size}, {p.norm}"
    stage.record.setdefault("cases", {})[key] = table[result.case.name]
    rows = {r.name: r for r in result.rows}
    ours = rows["ours"]
    share = bounds.share(result.case.flops, result.case.bytes, ours.milliseconds)
    ratios = ", ".join(
        f"{n} {r.ratio.median:.2f}x" for n, r in rows.items() if n != "ours" and not n.startswith("ours +")
    )
    void = f"; VOID: {result.void}" if result.void else ""
    missing = f"; not run: {', '.join(result.case.missing)}" if result.case.missing else ""
    stage.say(f"{key}: {ours.milliseconds:.3g} ms, {share}; {ratios}{void}{missing}")


def _bounds(stage: Stage, p: Any) -> Any:
    from deepreg_fast.bench import ceilings

    if "ceilings" not in stage.record:
        sizes = {"rounds": 3} if stage.on_gpu else {"side": 64, "megabytes": 1, "rounds": 1}
        stage.save(ceilings=vars(ceilings.measure(stage.device, p.target.clock, **sizes)))
    return ceilings.Ceilings(**stage.record["ceilings"])


@contextlib.contextmanager
def _without_compilers() -> Iterator[None]:
    """Disable torch.compile and JAX, which take a minute and separate memory; the stage `compiled` measures them."""
    from deepreg_fast.bench import peers as known

    def later(*_: object, **__: object) -> Any:
        raise RuntimeError("measured in the stage 'compiled'")

    module: Any = known
    originals = module.torch.compile, module.why_no_jax
    module.torch.compile, module.why_no_jax = later, lambda _: "measured in the stage 'compiled'"
    try:
        yield
    finally:
        module.torch.compile, module.why_no_jax = originals
