"""Performance bounds of a CUDA device, measured in the same run as the kernels."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .timing import Clock

# Number of TF32 tensor-core products per float32 multiply-add.
TF32_PRODUCTS = {"tf32x3": 3, "tf32": 1}


@dataclass(frozen=True)
class Ceilings:
    """Rates of torch's matrix products on random numbers, of a copy, and (`special`) of exponentials."""

    fp32: float
    """GFLOP/s in true float32."""
    tf32: float
    """GFLOP/s with factors rounded to TF32."""
    bf16: float
    """GFLOP/s in bfloat16."""
    copy: float
    """GB/s read plus GB/s written, of a copy on the device."""
    special: float | None = None
    """1e9 exponentials per second; None without Triton."""
    precision: str = "ieee"
    """Precision of our kernels' products: "ieee", "tf32x3" (three TF32 products for each) or "tf32"."""

    def __str__(self) -> str:
        special = "" if self.special is None else f", {self.special:.0f} e9 exponentials/s"
        return (
            f"Matrix product {self.fp32 / 1e3:.1f} TFLOP/s in float32, {self.tf32 / 1e3:.1f} in TF32, "
            f"{self.bf16 / 1e3:.1f} in bfloat16; copy {self.copy:.0f} GB/s{special}."
        )

    @property
    def rate(self) -> float:
        """GFLOP/s of float32 multiply-adds in the precision of our kernels."""
        products = TF32_PRODUCTS.get(self.precision)
        return self.fp32 if products is None else self.tf32 / products

    def share(self, flops: float, moved: float, milliseconds: float) -> str:
        """The fraction of the roofline that a kernel reaches, and whether arithmetic or bytes limit it, as text."""
        part = self.roofline(flops, moved, milliseconds)
        if part is None:
            return ""
        side = "arithmetic" if flops / self.rate > moved / self.copy else "bytes"
        return f"{part:.0%} of the roofline ({side})"

    def roofline(self, flops: float, moved: float, milliseconds: float) -> float | None:
        """`max(flops / rate, bytes / bandwidth) / time`; None if nothing was counted."""
        floor = 1e-6 * max(flops / self.rate, moved / self.copy)
        return floor / milliseconds or None


def measure(
    device: torch.device, clock: Clock, side: int = 8192, megabytes: int = 2048, rounds: int = 7, precision: str = ""
) -> Ceilings:
    """Measure the bounds on random numbers: the best of `rounds`."""

    def best(f: Callable[[], object]) -> float:
        f()
        return min(clock.measure(lambda _: f(), 0, 1) for _ in range(rounds))

    a, b = (torch.randn(side, side, dtype=torch.float32, device=device) for _ in range(2))
    flops, rates = 2 * side**3, {}
    for name, allow in (("fp32", False), ("tf32", True)):
        with tf32(allow):
            rates[name] = flops / best(lambda: a @ b) / 1e9
    a16, b16 = a.bfloat16(), b.bfloat16()
    rates["bf16"] = flops / best(lambda: a16 @ b16) / 1e9
    source = torch.rand(megabytes << 18, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / best(lambda: target.copy_(source)) / 1e9
    return Ceilings(**rates, copy=copy, special=_special(device, best), precision=precision or in_force())


def in_force() -> str:
    """The current precision of our kernels' products."""
    from ..backend.gpu.chain_options import DEFAULT

    return DEFAULT.precision


@contextmanager
def tf32(allow: bool) -> Iterator[None]:
    """Context in which torch's matrix products and convolutions may (or may not) round their factors to TF32."""
    previous = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allow
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = previous


def _special(device: torch.device, best: Callable[[Callable[[], object]], float]) -> float | None:
    if find_spec("triton") is None:
        return None
    from .special import exponentials

    out = torch.empty(1 << (22 if device.type == "cuda" else 10), dtype=torch.float32, device=device)
    steps = 512 if device.type == "cuda" else 4
    return out.numel() * steps / best(lambda: exponentials(out, steps)) / 1e9


def describe(device: torch.device) -> dict[str, object]:
    """Properties of the device and versions of its compilers."""
    p = torch.cuda.get_device_properties(device)
    return {
        "gpu": p.name,
        "capability": f"{p.major}.{p.minor}",
        "multiprocessors": p.multi_processor_count,
        "l2_bytes": p.L2_cache_size,
        "memory_bytes": p.total_memory,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "precision": in_force(),
    }
