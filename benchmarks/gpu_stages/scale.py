"""Large batches and images, memory, and whether the same bits come back."""

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
    """Sizes, then determinism, then the end of the memory."""
    for batch, side in ((4096, 180), (4, 2048)):
        if not stage.dry:
            torch.cuda.empty_cache()
        stage.attempt(f"{batch} of {side}", lambda b=batch, s=side: _sizes(stage, b, s))
    stage.attempt("repeats", lambda: _repeats(stage))
    stage.attempt("streams and threads", lambda: _side_by_side(stage))
    if not stage.dry:
        torch.cuda.empty_cache()
        stage.attempt("memory", lambda: _out_of_memory(stage))


def _work(stage: Stage, batch: int, side: int) -> dict[str, Callable[[], torch.Tensor]]:
    """The kernels on `batch` images, each giving one tensor."""
    from deepreg_fast.bench.problem import under

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
    what = f"{p.batch} of {p.size}x{p.size}"
    for name, f in _work(stage, batch, side).items():
        f()
        seconds = p.target.clock.measure(lambda _, f=f: f(), 0, 3)
        peak = p.target.peak(lambda _, f=f: f())
        told = f"{1e3 * seconds:.3g} ms" + ("" if peak is None else f", peak {peak / 2**30:.2f} GiB")
        stage.found.setdefault("sizes", {})[f"{name}, {what}"] = {"seconds": seconds, "peak_bytes": peak}
        stage.say(f"{name}, {what}: {told}")


def _repeats(stage: Stage, times: int = 100) -> None:
    """The same bits every time, at the largest batch for which a hundred calls are quick."""
    for name, f in _work(stage, 1024, 180).items():
        first, changed, done = f().clone(), 0, 0
        while done < times and stage.left() > 20:
            changed += int(not torch.equal(f(), first))
            done += 1
        stage.found.setdefault("repeats", {})[name] = {"calls": done, "different": changed}
        stage.say(f"{name}: {changed} of {done} repeats differ in a bit")


def _side_by_side(stage: Stage) -> None:
    """Two threads, on a device each with a stream of its own: every answer as alone."""
    jobs = [_work(stage, 64, 180), _work(stage, 48, 96)]
    alone = [{n: f().clone() for n, f in job.items()} for job in jobs]
    wrong: list[str] = []

    def run(i: int) -> None:
        stream = None if stage.dry else torch.cuda.Stream()
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

    if not stage.dry:
        torch.cuda.synchronize()
    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    stage.save(side_by_side={"different": sorted(set(wrong))})
    stage.say(f"two threads and streams: {sorted(set(wrong)) or 'every bit as alone'}")


def _out_of_memory(stage: Stage) -> None:
    """A linearization that cannot fit: what is told, and whether the device is usable after it."""
    # A plane of 16 channels alone is larger than what is free, and two are kept.
    free, _ = torch.cuda.mem_get_info()
    p = problem(stage, 1, 180)
    batch, reg = int(free / (4 * 16 * 180**2)) + 1, p.regularizer()
    x = torch.rand(1, 1, 180, 180, device="cuda").expand(batch, -1, -1, -1)
    try:
        reg.linearize(x)
        told = "it did fit"
    except Exception as error:  # what is raised is the finding
        told = f"{type(error).__name__}: {str(error)[:300]}"
    torch.cuda.empty_cache()
    again = replace(p, batch=2).images(1)[0]
    usable = bool(torch.isfinite(reg.value_and_grad(again)[1]).all())
    stage.save(out_of_memory={"told": told, "usable": usable})
    stage.say(f"{batch} images: {told} ({'usable' if usable else 'NOT usable'} afterwards)")


def training(stage: Stage) -> None:
    """A short bi-level training on the device: images per second."""
    import tempfile

    import deepreg_fast as dr

    data = stage.data or ("embedded" if stage.dry else "")
    if not data:
        stage.say("not run: no --data")
        return
    with tempfile.TemporaryDirectory() as out:
        settings: dict[str, Any] = {
            "out": out, "data": data, "norm": "pixel", "steps": stage.size(60, 2), "batch": stage.size(64, 2),
            "crop": stage.size(0, 24), "validation": 4, "validate_every": 0,
        }  # fmt: skip
        if "device" in dr.BilevelConfig.__dataclass_fields__:
            settings["device"] = stage.device.type
        config = dr.BilevelConfig(**settings)
        trainer = dr.BilevelTrainer(config, progress=False)
        began = time.monotonic()
        trainer.fit()
        seconds = time.monotonic() - began
        lines = (Path(out) / "metrics.jsonl").read_text().splitlines()
    rate = config.steps * config.batch / seconds
    stage.save(training={"settings": settings, "seconds": seconds, "images_per_second": rate, "log": lines[-3:]})
    stage.say(f"{config.steps} steps of {config.batch} images: {rate:.1f} images/s, {seconds:.0f} s in all")


__all__ = ["scale", "training"]
