"""Performance bounds of the host, measured in the same run as the kernels."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from .._version import __version__
from ..backend import backends
from ..backend.cpu import backend as cpu
from .peers_learned import commit
from .timing import HOST, Timed


@dataclass(frozen=True)
class Bounds:
    """Float32 rates with the current number of threads: multiply-adds (2 flops each), matrix product, copy."""

    fma: float | None
    """GFLOP/s of independent multiply-adds in the registers; None without the C++ extension."""
    gemm: float
    """GFLOP/s of a 1024 x 1024 matrix product of torch."""
    copy: float
    """GB/s read plus GB/s written, of 128 MB."""

    def __str__(self) -> str:
        fma = f"{self.fma:.0f}" if self.fma else "?"
        return f"Multiply-adds {fma} GFLOP/s, matrix product {self.gemm:.0f} GFLOP/s, copy {self.copy:.0f} GB/s."

    @property
    def rate(self) -> float:
        """The upper bound of any kernel in GFLOP/s."""
        return self.fma or self.gemm

    def share(self, flops: float, moved: float, milliseconds: float) -> str:
        """The fraction of the relevant bound that a kernel reaches, as text."""
        if flops and self.fma:
            return f"{flops / milliseconds / 1e6 / self.fma:.0%} of multiply-adds"
        if moved and not flops:
            return f"{moved / milliseconds / 1e6 / self.copy:.0%} of the copy"
        return ""

    def roofline(self, flops: float, moved: float, milliseconds: float) -> float | None:
        """`max(flops / rate, bytes / bandwidth) / time`; None if nothing was counted."""
        floor = 1e-6 * max(flops / self.rate, moved / self.copy)
        return floor / milliseconds or None


def bounds(rounds: int = 15) -> Bounds:
    """Measure the bounds: the best of `rounds`."""
    extension, _ = cpu._extension()
    fma = None
    if extension is not None:
        multiply, isa, threads = extension.multiply_adds, cpu.instruction_set(), torch.get_num_threads()
        flops = multiply(isa, threads, 1)
        fma = flops / _best(lambda _: multiply(isa, threads, 1), rounds) / 1e9
    a, b = (torch.rand(1024, 1024, dtype=torch.float32, device="cpu") for _ in range(2))
    gemm = 2 * 1024**3 / _best(lambda _: a @ b, rounds) / 1e9
    source = torch.rand(32 << 20, dtype=torch.float32, device="cpu")
    target = torch.empty_like(source)
    copy = 2 * 4 * (32 << 20) / _best(lambda _: target.copy_(source), rounds) / 1e9
    return Bounds(fma, gemm, copy)


def _best(f: Timed, rounds: int) -> float:
    return min(HOST.measure(f, 0, 1) for _ in range(rounds))


def describe(learned_regularizers: Path | None = None) -> dict[str, object]:
    """The machine and the versions of a result, and the commit of a checkout."""
    peers: dict[str, object] = {name: _version(name) for name in ("jax", "scipy", "deepinv", "torchvision")}
    peers["LearnedRegularizers"] = learned_regularizers and commit(learned_regularizers)
    return {
        "date": date.today().isoformat(),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "deepreg_fast": __version__,
        "instruction_set": cpu.instruction_set() if backends()["cpu"] is None else None,
        "peers": peers,
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
