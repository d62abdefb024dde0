"""Where the benchmark runs: its device, which backend is ours there, and what measures time, memory and bounds."""

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
    """The host, and what other devices differ in.

    Attributes
    ----------
    device, ours : the tensors' device; the name of the backend that is "ours" on it.
    clock : what measures a call.
    cache : bytes of the device's last cache, which the inputs that take turns must exceed; 0 where three do.
    memory : bytes that the float64 answers may take at a time; 0 for all images at once.
    """

    device: torch.device = torch.device("cpu")
    ours: str = "cpu"
    clock: Clock = HOST
    cache: int = 0
    memory: int = 0

    def bounds(self) -> machine.Bounds | ceilings.Ceilings:
        """The device's own rates, measured now."""
        return machine.bounds()

    def describe(self, learned_regularizers: Path | None = None) -> dict[str, object]:
        """The machine and the versions that a result belongs to."""
        return machine.describe(learned_regularizers)

    def fair(self) -> AbstractContextManager[object]:
        """torch's settings under which candidates are compared."""
        return nullcontext()

    def peak(self, f: Timed) -> int | None:
        """Bytes that `f(0)` held at most beyond what was held before; None where nobody counts."""
        return None


class CudaTarget(Target):
    """A CUDA device."""

    def bounds(self) -> ceilings.Ceilings:
        """Matrix products in three formats, copy, special functions."""
        return ceilings.measure(self.device, self.clock)

    def describe(self, learned_regularizers: Path | None = None) -> dict[str, object]:
        """The host's description and the device's."""
        return {**machine.describe(learned_regularizers), **ceilings.describe(self.device)}

    def fair(self) -> AbstractContextManager[object]:
        """Float32 proper: torch's convolutions are in TF32 unless told not to. cuDNN tries its kernels and takes the
        fastest."""
        return torch.backends.cudnn.flags(enabled=True, benchmark=True, deterministic=False, allow_tf32=False)

    def peak(self, f: Timed) -> int | None:
        """Of torch's allocator; a peer with one of its own (JAX) shows as 0."""
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        f(0)
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device) - before


CPU = Target()


def cpu() -> Target:
    """The host, if it has the C++ kernels.

    Raises
    ------
    BackendUnavailable
        If it has not.
    """
    reason = backends()["cpu"]
    if reason is not None:
        raise BackendUnavailable(f"The C++ kernels are what is timed: {reason}")
    return CPU


def cuda() -> Target:
    """The current CUDA device, if there is one and the kernels run on it.

    Raises
    ------
    BackendUnavailable
        If there is none or they do not.
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
    # Four times the cache, in float32.
    clock = EventClock(torch.empty(cache, dtype=torch.float32, device=device))
    free, _ = torch.cuda.mem_get_info(device)
    return CudaTarget(device, "gpu", clock, cache, free // 8)


TARGETS: dict[str, Callable[[], Target]] = {"cpu": cpu, "cuda": cuda}
"""The values of `--device`."""
