"""A device's memory: what is asked for, said before it is asked, so that a lack of memory is a sentence with both
numbers; and what a CUDA graph reads, kept as long as the graph."""

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
    """Allocate inside; if the memory is not there, raise `OutOfMemory` with `count`, the bytes that `what` needs, and
    those that are free (torch's own unused blocks among them)."""
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
    """A CUDA graph that is being made: the stream on which it will run, what it reads and does not make, and what it
    has made of parameters."""

    stream: int
    held: list[object] = field(default_factory=list)
    packed: dict[Hashable, Any] = field(default_factory=dict)


_RECORDING: ContextVar[Recording | None] = ContextVar("deepreg_fast_recording", default=None)


@contextmanager
def recording(device: torch.device) -> Iterator[Recording]:
    """What is recorded inside reads memory that others own: `held` keeps it, and must live as long as the graph."""
    now = Recording(stream_of(device))
    token = _RECORDING.set(now)
    try:
        yield now
    finally:
        _RECORDING.reset(token)


def hold(thing: object) -> None:
    """Keep what a launch reads with the graph that is being recorded, if one is."""
    now = _RECORDING.get()
    if now is not None and not any(thing is other for other in now.held):
        now.held.append(thing)


def recording_here() -> Recording | None:
    """The graph that is being made in this thread by `recording`, if one is."""
    return _RECORDING.get()


def stream_of(device: torch.device) -> int:
    """The stream on which launches of now will run: of those being recorded, that of the graph."""
    now = _RECORDING.get()
    if now is not None:
        return now.stream
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def recording_now(device: torch.device) -> bool:
    """Whether launches are being recorded, by `recording` or by anyone else's graph, and do not run."""
    return _RECORDING.get() is not None or (device.type == "cuda" and torch.cuda.is_current_stream_capturing())
