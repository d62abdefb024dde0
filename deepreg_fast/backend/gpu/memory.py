"""Out-of-memory errors that report both the bytes required and the bytes free; and the memory that a CUDA graph reads,
which is kept alive as long as the graph."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch

from ...errors import OutOfMemory


@contextmanager
def memory_guard(count: int, device: torch.device, what: str) -> Iterator[None]:
    """Context for allocations. If memory runs out, raise `OutOfMemory` with `count`, the bytes that `what` needs, and
    the free bytes (including torch's unused blocks)."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise OutOfMemory(
            f"{what} needs {count / 2**20:.0f} MiB on {device}, but {_free(device) / 2**20:.0f} MiB are free; "
            "use a smaller batch."
        ) from error


def _free(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


@dataclass
class Recording:
    """A CUDA graph that is being recorded: its stream, the external objects that it reads (`held`), and the parameters
    that it packs (`packed`)."""

    stream: int
    held: list[object] = field(default_factory=list)
    packed: dict[Hashable, Any] = field(default_factory=dict)


_RECORDING: ContextVar[Recording | None] = ContextVar("deepreg_fast_recording", default=None)


@contextmanager
def recording(device: torch.device) -> Iterator[Recording]:
    """Record a graph within this context. `held` owns the memory that it reads and must live as long as the graph."""
    graph = Recording(stream_of(device))
    token = _RECORDING.set(graph)
    try:
        yield graph
    finally:
        _RECORDING.reset(token)


def hold(thing: object) -> None:
    """Add an object that a launch reads to the graph that is being recorded, if any."""
    graph = _RECORDING.get()
    if graph is not None and not any(thing is other for other in graph.held):
        graph.held.append(thing)


def recording_here() -> Recording | None:
    """The graph that `recording` is recording in this thread, if any."""
    return _RECORDING.get()


def stream_of(device: torch.device) -> int:
    """The stream on which current launches will run; during recording, the graph's stream."""
    graph = _RECORDING.get()
    if graph is not None:
        return graph.stream
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def recording_now(device: torch.device) -> bool:
    """Whether launches are being recorded, by `recording` or by another program's graph, and do not run."""
    return _RECORDING.get() is not None or (device.type == "cuda" and torch.cuda.is_current_stream_capturing())
