"""Large batches and images, memory, and reproducibility to the bit."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from gpu_stages.common import Stage, problem


def scale(stage: Stage) -> None:
    """Measure sizes, then determinism, then the behavior when memory is exhausted."""
    sizes = ((4096, 180), (4, 2048)) if stage.mode != "dry" else ((2, 24), (1, 32))
    for batch, side in sizes:
        _freed(stage)
        stage.item(f"{batch} of {side}", lambda b=batch, s=side: _sizes(stage, b, s), 12.0)
    if stage.mode == "stand-in":
        return
    stage.item("repeats", lambda: _repeats(stage), 10.0)
    stage.item("streams and threads", lambda: _side_by_side(stage), 8.0)
    if stage.on_gpu:
        _freed(stage)
        stage.item("memory", lambda: _out_of_memory(stage), 8.0)


def _freed(stage: Stage) -> None:
    if stage.on_gpu:
        torch.cuda.empty_cache()


def _work(stage: Stage, batch: int, side: int) -> dict[str, Callable[[], torch.Tensor]]:
    """Calls of the kernels on `batch` images, each returning one tensor."""
    from deepreg_fast.bench.workload import under

    p = problem(stage, batch, side)
    ours, reg, A = p.target.ours, p.regularizer(), p.operator()
    x = torch.rand(p.batch, 1, p.size, p.size, generator=torch.Generator().manual_seed(0)).to(stage.device)
    lin = under(ours, lambda: reg.linearize(x))
    theta = lambda: torch.cat([t.flatten() for t in lin.param_vjp(x).values()])  # noqa: E731
    return {
        "gradient": lambda: under(ours, lambda: reg.value_and_grad(x)[1]),
        "hvp": lambda: lin.hvp(x),
        "theta": theta,
        "normal": lambda: under(ours, lambda: A.normal(x)),
    }


def _sizes(stage: Stage, batch: int, side: int) -> None:
    p = problem(stage, batch, side)
    label = f"{p.batch} of {p.size}x{p.size}"
    for name, f in _work(stage, batch, side).items():
        f()
        seconds = p.target.clock.measure(lambda _, f=f: f(), 0, 3)
        peak = p.target.peak(lambda _, f=f: f())
        text = f"{1e3 * seconds:.3g} ms" + ("" if peak is None else f", peak {peak / 2**30:.2f} GiB")
        stage.record.setdefault("sizes", {})[f"{name}, {label}"] = {"seconds": seconds, "peak_bytes": peak}
        stage.say(f"{name}, {label}: {text}")


def _repeats(stage: Stage, times: int = 100) -> None:
    """Check for the same bits in every call, at the largest batch for which a hundred calls are quick."""
    for name, f in _work(stage, 1024, 180).items():
        first, changed, done = f().clone(), 0, 0
        while done < stage.rounds(times) and stage.left() > 8:
            changed += int(not torch.equal(f(), first))
            done += 1
        stage.record.setdefault("repeats", {})[name] = {"calls": done, "different": changed}
        stage.say(f"{name}: {changed} of {done} repeats differ in a bit")


def _side_by_side(stage: Stage) -> None:
    """Check that two threads (on a device each with a separate stream) get the same results as one."""
    jobs = [_work(stage, 64, 180), _work(stage, 48, 96)]
    alone = [{n: f().clone() for n, f in job.items()} for job in jobs]
    wrong: list[str] = []

    def run(i: int) -> None:
        stream = None if not stage.on_gpu else torch.cuda.Stream()
        for _ in range(5):
            for n, f in jobs[i].items():
                if stream is None:
                    got = f()
                else:
                    with torch.cuda.stream(stream):
                        got = f()
                    stream.synchronize()
                if not torch.equal(got, alone[i][n]):
                    wrong.append(n)

    if stage.on_gpu:
        torch.cuda.synchronize()
    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    stage.save(side_by_side={"different": sorted(set(wrong))})
    stage.say(f"two threads and streams: {sorted(set(wrong)) or 'every bit as alone'}")


def _out_of_memory(stage: Stage) -> None:
    """Try a linearization that does not fit; record the error and whether the device is usable afterwards."""
    # One plane of 16 channels exceeds the free memory, and two are saved.
    free, _ = torch.cuda.mem_get_info()
    p = problem(stage, 1, 180)
    batch, reg = int(free / (4 * 16 * 180**2)) + 1, p.regularizer()
    x = torch.rand(1, 1, 180, 180, device="cuda").expand(batch, -1, -1, -1)
    try:
        reg.linearize(x)
        message = "it did fit"
    except Exception as error:  # the raised error is the result
        message = f"{type(error).__name__}: {str(error)[:300]}"
    torch.cuda.empty_cache()
    small_x = replace(p, batch=2).images(1)[0]
    usable = bool(torch.isfinite(reg.value_and_grad(small_x)[1]).all())
    stage.save(out_of_memory={"told": message, "usable": usable})
    stage.say(f"{batch} images: {message} ({'usable' if usable else 'NOT usable'} afterwards)")


EPOCH = 1480
"""Images of an epoch, as in the paper's training."""


def training(stage: Stage) -> None:
    """Bi-level training on the device: an epoch in batches of 64, and in batches of 8, for which the host matters."""
    data = stage.data or ("" if stage.on_gpu else "embedded")
    if not data:
        stage.say("not run: no --data")
        return
    for images, share in ((64, 1.0), (8, 0.125)):
        steps = round(share * EPOCH / images) if stage.on_gpu else 1
        stage.item(f"batches of {images}", lambda b=images, n=steps: _train(stage, data, stage.batch(b), n), 25.0)


def _train(stage: Stage, data: str, images: int, steps: int) -> None:
    import tempfile

    import deepreg_fast as dr

    with tempfile.TemporaryDirectory() as out:
        settings: dict[str, Any] = {
            "out": out, "data": data, "norm": "pixel", "steps": steps, "batch": images, "validation": 4,
            "crop": 0 if stage.on_gpu else 24, "validate_every": 0, "device": stage.device.type,
        }  # fmt: skip
        if not stage.on_gpu:
            settings |= {"inner_iterations": 2, "adjoint_iterations": 2}
        config = dr.BilevelConfig(**settings)
        trainer = dr.BilevelTrainer(config, progress=False)
        began = time.monotonic()
        trainer.fit()
        seconds = time.monotonic() - began
        lines = (Path(out) / "metrics.jsonl").read_text().splitlines()
    rate = config.steps * config.batch / seconds
    entry = {"settings": settings, "seconds": seconds, "images_per_second": rate, "log": lines[-3:]}
    stage.record.setdefault("training", {})[str(config.batch)] = entry
    stage.say(f"{config.steps} steps of {config.batch} images: {rate:.1f} images/s, {seconds:.0f} s in all")


__all__ = ["scale", "training"]
