"""What the stages share: sizes, the device, findings that are written as they come, options of the kernels."""

from __future__ import annotations

import importlib.util
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

PRECISIONS = ("tf32x3", "ieee", "tf32")


@dataclass
class Stage:
    """One stage at work.

    `found` is written to `path` by `save`; its entry `summary` holds the lines that are printed last.
    """

    path: Path
    seconds: float
    dry: bool = False
    data: str = ""
    found: dict[str, Any] = field(default_factory=lambda: {"summary": []})
    began: float = field(default_factory=time.monotonic)

    def save(self, **findings: Any) -> None:
        """Add findings and write all."""
        self.found.update(findings)
        scratch = self.path.with_suffix(".part")
        scratch.write_text(json.dumps(self.found, indent=1, default=str), encoding="utf-8")
        scratch.replace(self.path)

    def say(self, line: str) -> None:
        """A line of the summary, also printed."""
        print(line, flush=True)
        self.found["summary"].append(line)
        self.save()

    def attempt(self, name: str, f: Callable[[], object]) -> object:
        """`f()`; an error becomes a finding and a line, and the stage goes on."""
        try:
            return f()
        except Exception as error:  # whatever fails here, the rest of the session is worth having
            import traceback

            traceback.print_exc()
            told = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"
            self.found.setdefault("errors", {})[name] = told
            self.say(f"{name}: {told}")
            return None

    def left(self) -> float:
        """Seconds."""
        return self.seconds - (time.monotonic() - self.began)

    @property
    def device(self) -> torch.device:
        """The current CUDA device; the host in a dry run."""
        return torch.device("cpu") if self.dry else torch.device("cuda", torch.cuda.current_device())

    def size(self, whole: int, dry: int) -> int:
        """A size, or the dry run's."""
        return dry if self.dry else whole


def target(stage: Stage) -> Any:
    """The benchmark's target: the CUDA device, whose clock is set once, or the host."""
    return _target(stage.dry)


@cache
def _target(dry: bool) -> Any:
    from deepreg_fast import backends
    from deepreg_fast.bench.target import Target, cuda

    if not dry:
        return cuda()
    return Target(ours="cpu" if backends()["cpu"] is None else "reference")


class Ours:
    """The conv chain's kernels with launch options: fields of `ChainOptions`, such as `precision` and `tile`.

    Without options what the package's backend does; in a dry run of a machine without Triton the host's kernels.
    """

    def __init__(self, stage: Stage, **options: Any) -> None:
        # One program of Triton's interpreter per image is what a dry run has time for.
        few = {"tile": (16, 16, 4)} if stage.dry else {}
        self.backend, self.options = target(stage).ours, {**few, **options}
        self.direct = bool(options) and importlib.util.find_spec("triton") is not None

    def _chain(self, reg: Any) -> tuple[Any, Any, Any]:
        from deepreg_fast.backend import gpu_chain
        from deepreg_fast.backend.gpu_sweeps import DEFAULT

        return gpu_chain, reg.conv_chain_form(), replace(DEFAULT, **self.options)

    def gradient(self, reg: Any, x: torch.Tensor) -> torch.Tensor:
        """`grad r(x)`."""
        if not self.direct:
            return self._under(lambda: reg.value_and_grad(x)[1])
        chain, form, options = self._chain(reg)
        return chain.value_and_grad(form, x, options)[1]

    def linearize(self, reg: Any, x: torch.Tensor) -> Any:
        """The linearization at x."""
        if not self.direct:
            return self._under(lambda: reg.linearize(x))
        chain, form, options = self._chain(reg)
        return chain.GpuLinearization(reg, form, x, options)

    def _under(self, f: Callable[[], Any]) -> Any:
        from deepreg_fast.bench.problem import under

        return under(self.backend, f)


def relative(a: torch.Tensor, exact: torch.Tensor) -> float:
    """`||a - exact|| / ||exact||` in float64; infinite where a is not finite."""
    e = float((a.double() - exact).norm() / exact.norm())
    return e if e == e else float("inf")


def problem(stage: Stage, batch: int = 256, size: int = 180, norm: str = "pixel") -> Any:
    """The benchmark's problem on the stage's device."""
    from deepreg_fast.bench import Problem

    return Problem(stage.size(batch, 2), stage.size(size, 24), 16, 3, norm, target=target(stage))
