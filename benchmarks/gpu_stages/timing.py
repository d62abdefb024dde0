"""Times of our kernels alone, without peers and float64, so that the numbers are saved before anything can fail."""

from __future__ import annotations

import contextlib
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from gpu_stages.common import Kernels, Stage, problem

MAXNREG = ((None, None), (168, 168), (128, 128))
"""Register limits of `primal` and `tangent`; the kernels' defaults are measured first."""


def timing(stage: Stage) -> None:
    """Time captured kernels, loops with and without graphs, the host's cost, and single kernels."""
    with clocks(stage):
        for norm in ("pixel", "none"):
            stage.item(f"chain {norm}", lambda n=norm: _chain(stage, n, {}), 12.0)
        for norm in ("pixel", "none"):
            stage.item(f"fused {norm}", lambda n=norm: _chain(stage, n, {"fused": True}), 12.0)
        for limits in MAXNREG:
            stage.item(f"maxnreg {limits[0]}", lambda m=limits: _chain(stage, "pixel", {"maxnreg": m}), 12.0)
        for transform in ("dct", "hadamard", "walsh"):
            stage.item(f"SRM {transform}", lambda t=transform: _operator(stage, t), 10.0)
        for images in (256, 64, 8):
            stage.item(f"loops {images}", lambda b=images: _loops(stage, b), 15.0)
        stage.item("host", lambda: _host(stage), 8.0)
    stage.item("kernel table", lambda: _table(stage), 15.0)


@contextlib.contextmanager
def clocks(stage: Stage) -> Iterator[None]:
    """Context that records the multiprocessors' clock and the power, and reports them in one line at the end."""
    if not stage.on_gpu:
        yield
        return
    query = ["nvidia-smi", "--query-gpu=clocks.sm,power.draw,temperature.gpu", "--format=csv,noheader,nounits"]
    try:
        child = subprocess.Popen([*query, "-lms", "250"], stdout=subprocess.PIPE, text=True)
    except OSError as error:
        stage.say(f"clock not read: {error}")
        yield
        return
    rows: list[list[float]] = []

    def read() -> None:
        assert child.stdout is not None
        for line in child.stdout:
            with contextlib.suppress(ValueError):
                rows.append([float(v) for v in line.split(",")])

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        yield
    finally:
        child.kill()
        reader.join(timeout=2.0)
        if rows:
            columns = [sorted(c) for c in zip(*rows, strict=True)]
            low, mid, high = (columns[0][int(q * (len(rows) - 1))] for q in (0.0, 0.5, 1.0))
            stage.say(f"SM clock {low:.0f} / {mid:.0f} / {high:.0f} MHz (least, median, most), {columns[1][-1]:.0f} W")
            stage.save(clocks=rows)


def _seconds(stage: Stage, f: Callable[[int], object], rounds: int = 5) -> float:
    """The median of `rounds` measurements of about 20 ms each."""
    clock = problem(stage).target.clock
    if stage.mode == "stand-in":
        f(0)
        return 1.0
    f(0)
    once = max(clock.measure(f, 0, 1), 1e-6)
    repeats = max(1, min(200, round(0.02 / once))) if stage.on_gpu else 1
    return sorted(clock.measure(f, 0, repeats) for _ in range(stage.rounds(rounds)))[stage.rounds(rounds) // 2]


def _captured(stage: Stage, f: Callable[[int], object]) -> Callable[[int], object]:
    """`f(0)` as a CUDA graph, so that the time does not include the host."""
    if not stage.on_gpu:
        return f
    from deepreg_fast.bench.peers_cuda import replayed

    return replayed(f, 1)


def _chain(stage: Stage, norm: str, options: dict[str, Any]) -> None:
    """Time gradient, linearization and both products; bytes per second use the counts of docs/device_loops.md."""
    from deepreg_fast.backend.gpu.chain_options import ChainOptions
    from deepreg_fast.bench import counts

    unknown = [k for k in options if k not in ChainOptions.__dataclass_fields__]
    if unknown:
        stage.say(f"{unknown[0]} is no option of the kernels here")
        return
    p = problem(stage, 256, norm=norm)
    kernels, reg, x, v = Kernels(stage, **options), p.regularizer(), p.images(1)[0], p.images(2)[0]
    lin = kernels.linearize(reg, x)
    calls = {
        "gradient": (lambda _: kernels.value_and_grad(reg, x), counts.gradient(p)),
        "linearize": (lambda _: kernels.linearize(reg, x), counts.linearize(p)),
        "hvp": (lambda _: lin.hvp(v), counts.hvp(p)),
        "theta": (lambda _: lin.param_vjp(v), counts.theta(p)),
    }
    row = []
    for name, (f, count) in calls.items():
        try:
            seconds = _seconds(stage, _captured(stage, f))
        except Exception as error:
            stage.say(f"{name}: no graph ({type(error).__name__}: {str(error)[:120]}), timed eagerly")
            seconds = _seconds(stage, f)
        key = f"{name}, {norm}" + "".join(f", {k} {o}" for k, o in options.items())
        stage.record.setdefault("milliseconds", {})[key] = 1e3 * seconds
        rate = f" ({count.moved / seconds / 1e12:.2f} TB/s)" if stage.on_gpu else ""
        row.append(f"{name} {1e3 * seconds:.3g} ms{rate}")
    label = norm + "".join(f", {k} {o}" for k, o in options.items())
    stage.say(f"{p.batch} x {p.size}^2, {label}: " + ", ".join(row))


def _operator(stage: Stage, transform: str) -> None:
    """Time each product of the SRM and a copy of the same images."""
    p = problem(stage, 256)
    A, x = p.operator(transform), p.images(3)[0]
    y, out = A.A(x), torch.empty_like(x)
    calls: dict[str, Callable[[int], object]] = {
        "copy": lambda _: out.copy_(x),
        "A": lambda _: A.A(x),
        "adjoint": lambda _: A.A_adjoint(y),
        "normal": lambda _: A.normal(x),
        "prox": lambda _: A.prox_l2(x, y, 2.0),
    }
    microseconds = {n: 1e6 * _seconds(stage, _captured(stage, f)) for n, f in calls.items()}
    stage.record.setdefault("operator_microseconds", {})[transform] = microseconds
    stage.say(f"SRM {transform}, {p.batch} images: " + ", ".join(f"{n} {t:.3g} us" for n, t in microseconds.items()))


def _loops(stage: Stage, images: int) -> None:
    """Time one iteration of CG and one round of PGD, as the difference of two lengths, with and without graphs."""
    import deepreg_fast as dr
    from deepreg_fast.batched import graphs
    from deepreg_fast.bench.workload import under
    from deepreg_fast.inverse.adjoint import adjoint_named, solve_adjoint

    p = problem(stage, images)
    reg, x, A = p.regularizer(), p.images(5)[0], p.operator()
    with torch.no_grad():
        for parameter in reg.net.convs[-1].parameters():
            parameter.mul_(0.1)
    lin, y, mu, b = under(p.target.ours, lambda: reg.linearize(x)), A.A(x), x.new_full((len(x),), 0.1), torch.sin(9 * x)

    def cg(steps: int) -> object:
        return under(p.target.ours, lambda: solve_adjoint(lin, A, mu, b, adjoint_named("cg", steps, 0.0)))

    def pgd(rounds: int) -> object:
        options = dr.PGDOptions(rounds, 0.0, "anderson")
        return under(p.target.ours, lambda: dr.recover(y, A, reg, 0.1, options=options))

    lengths = (1, 2) if stage.mode == "dry" else (40, 80)
    for name, f in (("CG iteration", cg), ("PGD round", pgd)):
        row = []
        for label, switched in (("graphs", contextlib.nullcontext()), ("no graphs", graphs.without_graphs())):
            with switched:
                # The second solve captures; the third replays from its first round.
                for n in lengths if stage.mode != "dry" else ():
                    f(n), f(n)
                short, long = (_seconds(stage, lambda _, f=f, n=n: f(n), 3) for n in lengths)
            microseconds = 1e6 * (long - short) / (lengths[1] - lengths[0])
            stage.record.setdefault("loop_microseconds", {})[f"{name}, {images}, {label}"] = microseconds
            row.append(f"{microseconds:.4g} us with {label}")
        stage.say(f"{name}, {images} images: " + ", ".join(row))


def _host(stage: Stage) -> None:
    """Measure the host's microseconds to queue a call without waiting for it, with 8 images."""
    p = problem(stage, 8)
    kernels, reg, x, v = Kernels(stage), p.regularizer(), p.images(1)[0], p.images(2)[0]
    lin = kernels.linearize(reg, x)
    A = p.operator()
    calls: dict[str, Callable[[], object]] = {
        "gradient": lambda: kernels.value_and_grad(reg, x),
        "linearize": lambda: kernels.linearize(reg, x),
        "hvp": lambda: lin.hvp(v),
        "theta": lambda: lin.param_vjp(v),
        "A^T A": lambda: A.normal(x),
    }
    row = []
    for name, f in calls.items():
        f()
        stage.synchronize()
        count = 20 if stage.on_gpu else 2
        seconds = []
        for _ in range(5):
            began = time.perf_counter()
            for _ in range(count):
                f()
            seconds.append((time.perf_counter() - began) / count)
            stage.synchronize()
        stage.record.setdefault("host_microseconds", {})[name] = 1e6 * sorted(seconds)[2]
        row.append(f"{name} {1e6 * sorted(seconds)[2]:.0f}")
    stage.say("host microseconds a call, 8 images: " + ", ".join(row))


def _table(stage: Stage) -> None:
    """Time the single kernels of each product with torch's profiler."""
    if not stage.on_gpu:
        stage.say("no kernel table without a device")
        return
    from torch.profiler import ProfilerActivity, profile

    for norm in ("pixel", "none"):
        p = problem(stage, 256, norm=norm)
        reg, x, v, A = p.regularizer(), p.images(1)[0], p.images(2)[0], p.operator()
        lin = reg.linearize(x)
        y = A.A(x)
        calls: dict[str, Callable[[], Any]] = {
            "gradient": lambda reg=reg, x=x: reg.value_and_grad(x),
            "hvp": lambda lin=lin, v=v: lin.hvp(v),
            "theta": lambda lin=lin, v=v: lin.param_vjp(v),
            "prox": lambda A=A, x=x, y=y: A.prox_l2(x, y, 2.0),
        }
        for name, f in calls.items():
            f()
            with profile(activities=[ProfilerActivity.CUDA]) as record:
                f()
                torch.cuda.synchronize()
            rows = [(e.key, e.count, e.device_time_total) for e in record.key_averages() if e.device_time_total > 0]
            rows.sort(key=lambda r: -r[2])
            stage.record.setdefault("kernels", {})[f"{name}, {norm}"] = rows
            shown = ", ".join(f"{key[:28]} {total:.0f} us in {n}" for key, n, total in rows[:6])
            stage.say(f"{name}, {norm}: {sum(r[2] for r in rows):.0f} us in all: {shown}")
