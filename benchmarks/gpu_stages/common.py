"""Shared code of the stages: the incremental record, items with time limits, sizes, the device, the kernels."""

from __future__ import annotations

import importlib.util
import json
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from gpu_stages.compile_log import CompileLog

EPS = 2.0**-23
PRECISIONS = ("tf32x3", "ieee", "tf32")
STICKY = 70
"""Exit status of a worker whose CUDA context is lost; the parent starts another for the remaining items."""


class DeviceLost(Exception):
    """The CUDA context returns an error for every call."""


@dataclass
class Stage:
    """One stage. `record` is written to `path` at every change, so that a killed process loses nothing.

    `mode` is `"gpu"`; `"dry"`, Triton's interpreter on small CPU tensors, with correct results; or `"stand-in"`, the
    launches of the real sizes without a device, whose outputs are never written (`stand_in.py`).
    `skip` contains items that an earlier process of this stage started.
    """

    name: str
    path: Path
    seconds: float
    mode: str = "gpu"
    data: str = ""
    skip: frozenset[str] = frozenset()
    record: dict[str, Any] = field(default_factory=lambda: {"summary": [], "items": {}})
    began: float = field(default_factory=time.monotonic)
    log: CompileLog | None = None

    @property
    def on_gpu(self) -> bool:
        """Whether times are meaningful."""
        return self.mode == "gpu"

    def save(self, **entries: Any) -> None:
        """Add entries to the record and write it."""
        self.record.update(entries)
        scratch = self.path.with_suffix(".part")
        scratch.write_text(json.dumps(self.record, indent=1, default=str), encoding="utf-8")
        scratch.replace(self.path)

    def say(self, line: str) -> None:
        """Add a line to the summary."""
        print(line, flush=True)
        self.record["summary"].append(line)
        self.save()

    def item(self, name: str, f: Callable[[], object], seconds: float = 10.0) -> None:
        """Run `f` for at most `seconds`. After that the parent kills the process, and another continues with the next
        item.

        An exception becomes one line of the summary. If it has lost the CUDA context, the process ends.
        """
        if name in self.skip:
            return
        if self.left() < 1.0:
            self.record["items"][name] = "no time left"
            self.say(f"{name}: no time left")
            return
        self.record["items"][name] = "running"
        self.save(running={"item": name, "seconds": seconds, "since": time.time()})
        began, state = time.perf_counter(), "done"
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                f()
                self.synchronize()
            except Exception as error:
                # A failure must not stop the rest of the session.
                traceback.print_exc()
                state = one_line(error)
                self.say(f"{name}: FAILED: {state}")
        for line in dict.fromkeys(f"{w.category.__name__}: {w.message}"[:200] for w in caught):
            self.record.setdefault("warnings", []).append(f"{name}: {line}")
        self.record["items"][name] = state
        self.record.setdefault("seconds_of_items", {})[name] = round(time.perf_counter() - began, 2)
        self.note_compiled()
        self.save(running=None)
        if state != "done":
            self.check_context()

    def note_compiled(self) -> None:
        """Add the compilations since the last call to the record."""
        if self.log is None:
            return
        previous = self.record.get("compile", {"cached": 0, "compiled": {}, "seconds": 0.0})
        latest = self.log.take()
        self.record["compile"] = {
            "cached": previous["cached"] + latest["cached"],
            "compiled": {**previous["compiled"], **latest["compiled"]},
            "seconds": round(previous["seconds"] + latest["seconds"], 2),
        }

    def synchronize(self) -> None:
        """Wait for the device, so that a kernel's error is attributed to the item that launched it."""
        if self.on_gpu:
            torch.cuda.synchronize()

    def check_context(self) -> None:
        """Raise DeviceLost if the device no longer works."""
        if self.on_gpu:
            try:
                torch.zeros(1, device="cuda").add_(1).item()
            except Exception as error:
                raise DeviceLost(one_line(error)) from error

    def left(self) -> float:
        """Seconds until the end of the stage."""
        return self.seconds - (time.monotonic() - self.began)

    @property
    def device(self) -> torch.device:
        """The CUDA device, or the CPU without one."""
        return torch.device("cuda", torch.cuda.current_device()) if self.on_gpu else torch.device("cpu")

    def batch(self, images: int) -> int:
        """Images of a batch. At most two if nothing is measured, as no compiled kernel depends on their number."""
        return images if self.on_gpu else min(images, 2)

    def side(self, pixels: int) -> int:
        """Pixels per side; few for the interpreter."""
        return min(pixels, 24) if self.mode == "dry" else pixels

    def rounds(self, count: int) -> int:
        """Number of repetitions of a measurement."""
        return count if self.on_gpu else min(count, 3)


def one_line(error: BaseException) -> str:
    """An exception in one line."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"


def target(stage: Stage) -> Any:
    """The benchmark's target: the CUDA device, with a clock that is calibrated once, or the host."""
    return _target(stage.mode)


@cache
def _target(mode: str) -> Any:
    from deepreg_fast import backends
    from deepreg_fast.bench.target import Target, cuda

    if mode == "gpu":
        return cuda()
    if mode == "stand-in":
        return Target(ours="gpu")
    return Target(ours="cpu" if backends()["cpu"] is None else "reference")


def problem(stage: Stage, batch: int = 256, side: int = 180, norm: str = "pixel") -> Any:
    """The benchmark's problem on the stage's device."""
    from deepreg_fast.bench import Workload

    return Workload(stage.batch(batch), stage.side(side), 16, 3, norm, target=target(stage))


class Kernels:
    """The conv chain's kernels with launch options, which are fields of `ChainOptions` such as `precision` and `tile`.

    Without options the package's backend chooses. A dry run uses the interpreter with one program per image.
    """

    def __init__(self, stage: Stage, **options: Any) -> None:
        dry_options = {"tile": (16, 16, 4)} if stage.mode == "dry" else {}
        self.backend, self.options = target(stage).ours, {**dry_options, **options}
        self.direct = bool(self.options) and importlib.util.find_spec("triton") is not None

    def _chain(self, reg: Any) -> tuple[Any, Any, Any]:
        from deepreg_fast.backend.gpu import conv_chain
        from deepreg_fast.backend.gpu.chain_options import DEFAULT

        return conv_chain, reg.kernel_form(), replace(DEFAULT, **self.options)

    def value_and_grad(self, reg: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`r(x)` and `grad r(x)`."""
        if not self.direct:
            return self._under(lambda: reg.value_and_grad(x))
        chain, form, options = self._chain(reg)
        return chain.value_and_grad(form, x, options)

    def linearize(self, reg: Any, x: torch.Tensor) -> Any:
        """The linearization at x."""
        if not self.direct:
            return self._under(lambda: reg.linearize(x))
        chain, form, options = self._chain(reg)
        return chain.GpuLinearization(reg, form, x, options)

    def of_tv(self, reg: Any) -> Any:
        """Smoothed TV by its kernels: `value_and_grad(x)` and `linearize(x)`."""
        if not self.direct:
            under = self._under
            return SimpleNamespace(
                value_and_grad=lambda x: under(lambda: reg.value_and_grad(x)),
                linearize=lambda x: under(lambda: reg.linearize(x)),
            )
        from deepreg_fast.backend.gpu import tv

        return SimpleNamespace(
            value_and_grad=lambda x: tv.value_and_grad(reg.kernel_form(), x),
            linearize=lambda x: tv.GpuTvLinearization(reg, reg.kernel_form(), x),
        )

    def _under(self, f: Callable[[], Any]) -> Any:
        from deepreg_fast.bench.workload import under

        return under(self.backend, f)


def chain_products(lin: Any, v: torch.Tensor) -> dict[str, torch.Tensor]:
    """The gradient of a linearization and both of its products."""
    theta = torch.cat([t.flatten() for t in lin.param_vjp(v).values()])
    return {"linearize": lin.grad, "hvp": lin.hvp(v), "theta": theta}


def poison(stage: Stage, pixels: int, channels: int = 16) -> None:
    """Fill the memory of the next outputs with NaN, so that values that a kernel fails to write are detected."""
    blocks = [torch.full((n,), torch.nan, device=stage.device) for n in (pixels, channels * pixels) for _ in range(8)]
    blocks += [torch.full((n,), torch.nan, device=stage.device) for n in (64, 1024, 16384) for _ in range(16)]
    stage.synchronize()
    del blocks


def relative(a: torch.Tensor, exact: torch.Tensor) -> float:
    """`||a - exact|| / ||exact||` in float64; infinite if it is NaN."""
    exact = exact.double()
    e = float((a.double() - exact).norm() / exact.norm().clamp_min(1e-300))
    return e if e == e else float("inf")


Answers = Mapping[str, torch.Tensor]


def compare(
    stage: Stage, name: str, ours: Answers, torchs: Callable[[], Answers], exact: Callable[[], Answers]
) -> None:
    """Report each result's error against float64 next to torch's, in one line.

    The verdict is "ok" up to twice torch's error (or 4 eps), "loose" up to four times (or 8 eps), because hardware
    approximations of exp and division may cost a few bits, WRONG beyond that, and "not written" if NaN remains. Without
    a device only the launches are reported.
    """
    if stage.mode == "stand-in":
        stage.say(f"{name}: launched")
        return
    lines, verdicts = [], []
    reference, answers = torchs(), exact()
    for key, e in answers.items():
        error, bound = relative(ours[key], e), relative(reference[key], e)
        stage.record.setdefault("errors", {}).setdefault(name, {})[key] = {"ours": error, "torch": bound}
        if not bool(torch.isfinite(ours[key]).all()):
            verdicts.append("not written")
        elif error <= max(2 * bound, 4 * EPS):
            verdicts.append("ok")
        else:
            verdicts.append("loose" if error <= max(4 * bound, 8 * EPS) else "WRONG")
        lines.append(f"{key} {error:.1e} ({error / max(bound, EPS):.1f}x)")
    worst = max(verdicts, key=("ok", "loose", "WRONG", "not written").index)
    stage.record.setdefault("verdicts", {})[name] = worst
    stage.say(f"{name}: {worst}: " + ", ".join(lines))


def verdict(stage: Stage, name: str, good: bool, text: str) -> None:
    """Report a check that is either right or wrong, in one line."""
    if stage.mode == "stand-in":
        stage.say(f"{name}: launched")
        return
    stage.record.setdefault("verdicts", {})[name] = "ok" if good else "WRONG"
    stage.say(f"{name}: {'ok' if good else 'WRONG'}: {text}")
