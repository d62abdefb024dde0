"""Benchmark targets: the device, our backend on it, and its measurement of time, memory and bounds."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from ..backend import backends
from ..errors import BackendUnavailable
from . import ceilings, machine
from .events import EventClock
from .timing import HOST, Clock, Timed


@dataclass(frozen=True)
class Target:
    """The host; subclasses describe other devices.

    Attributes
    ----------
    device, ours : the tensors' device; the name of our backend on it.
    clock : measures a call.
    cache : bytes of the device's last cache, which the alternating inputs must exceed; 0 if three inputs suffice.
    memory : bytes that the float64 results may take at a time; 0 for all images at once.
    """

    device: torch.device = torch.device("cpu")
    ours: str = "cpu"
    clock: Clock = HOST
    cache: int = 0
    memory: int = 0

    def bounds(self) -> machine.Bounds | ceilings.Ceilings:
        """Measure the device's performance bounds."""
        return machine.bounds()

    def describe(self, learned_regularizers: Path | None = None) -> dict[str, object]:
        """The machine and the versions of a result."""
        return machine.describe(learned_regularizers)

    def fair(self) -> AbstractContextManager[object]:
        """Context with torch's settings for a fair comparison."""
        return nullcontext()

    def peak(self, f: Timed) -> int | None:
        """Peak bytes that `f(0)` allocates in addition to those before; None if the allocator does not report them."""
        return None


class CudaTarget(Target):
    """A CUDA device."""

    def bounds(self) -> ceilings.Ceilings:
        """Measure matrix products in three formats, a copy and special functions."""
        return ceilings.measure(self.device, self.clock)

    def describe(self, learned_regularizers: Path | None = None) -> dict[str, object]:
        """Description of the host and the device."""
        return {**machine.describe(learned_regularizers), **ceilings.describe(self.device)}

    def fair(self) -> AbstractContextManager[object]:
        """True float32 instead of TF32, the default of torch's convolutions. cuDNN selects its fastest kernels by
        trial."""
        return torch.backends.cudnn.flags(enabled=True, benchmark=True, deterministic=False, allow_tf32=False)

    def peak(self, f: Timed) -> int | None:
        """Peak bytes of torch's allocator; 0 for a peer with another allocator (JAX)."""
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        f(0)
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device) - before


CPU = Target()


def cpu() -> Target:
    """The host.

    Raises
    ------
    BackendUnavailable
        If the C++ kernels are unavailable.
    """
    reason = backends()["cpu"]
    if reason is not None:
        raise BackendUnavailable(f"The C++ kernels are what is timed: {reason}")
    return CPU


def cuda() -> Target:
    """The current CUDA device.

    Raises
    ------
    BackendUnavailable
        If there is none or the kernels do not run on it.
    """
    if not torch.cuda.is_available():
        raise BackendUnavailable(
            "--device cuda needs an NVIDIA GPU and a CUDA build of torch, but torch sees no CUDA device; "
            "use --device cpu."
        )
    reason = backends()["gpu"]
    if reason is not None:
        raise BackendUnavailable(f"The GPU kernels are what is timed: {reason}")
    device = torch.device("cuda", torch.cuda.current_device())
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    # As many float32 numbers as the cache has bytes: four times the cache.
    clock = EventClock(torch.empty(cache, dtype=torch.float32, device=device))
    free, _ = torch.cuda.mem_get_info(device)
    return CudaTarget(device, "gpu", clock, cache, free // 8)


TARGETS: dict[str, Callable[[], Target]] = {"cpu": cpu, "cuda": cuda}
"""The values of `--device`."""
