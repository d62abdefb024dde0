"""Recorded loops that outlive a solve: a bounded cache of CUDA graphs with the memory that they read and write.

A graph reads fixed memory. A later solve may replay it if all that the recorded work depends on is the same, or is
copied to that memory first. `Signature` says the former, `Loop` holds the latter.
"""

from __future__ import annotations

import atexit
import threading
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, Protocol, TypeVar, cast

import torch

from ...errors import OutOfMemory
from .memory import recording_here

F = TypeVar("F", bound=Callable[..., Any])

MOST = 8
"""Loops that are kept for each device."""

SHARE = 8
"""They have at most this part of the device's memory, an eighth."""

SEEN = 64
"""Keys that are remembered without a loop."""


class Graph(Protocol):
    """Recorded work: what `torch.cuda.CUDAGraph` offers."""

    def replay(self) -> None:
        """Queue the work again, on the same memory."""
        ...

    def reset(self) -> None:
        """Free it."""
        ...


@dataclass(frozen=True)
class Signature:
    """What recorded products depend on besides the tensors that are copied to the graph's memory.

    `key`: settings, and the places of memory that the graph reads where it lies; `owner`: the object whose products
    they are, without which no loop is kept; `memory`: the tensors at those places, which keep the loop from finding
    others there.
    """

    key: Hashable
    owner: object
    memory: tuple[torch.Tensor, ...] = ()


def places_of(tensors: Iterable[torch.Tensor]) -> tuple[Hashable, ...]:
    """Where tensors lie and how they are read there, for the key of a `Signature`."""
    return tuple((t.data_ptr(), t.dtype, tuple(t.shape), t.stride()) for t in tensors)


@dataclass
class Loop:
    """A recorded loop: the fixed memory of its state, by holder and name, and of its inputs, and what else it reads.

    `size`: the bytes that torch reserved for the graph's temporaries.
    """

    graph: Graph
    state: dict[tuple[int, str], torch.Tensor]
    inputs: list[torch.Tensor] = field(default_factory=list)
    held: list[object] = field(default_factory=list)
    size: int = 0

    def bytes(self) -> int:
        """Of device memory, with the state and the inputs."""
        tensors = {id(t): t for t in (*self.state.values(), *self.inputs)}
        return self.size + sum(t.nbytes for t in tensors.values())


@dataclass
class _Entry:
    key: Hashable
    device: torch.device
    owners: tuple[weakref.ref[object], ...]
    loop: Loop

    def alive(self) -> bool:
        return all(owner() is not None for owner in self.owners)


class Cache:
    """Loops by key, the least recently used first to go. One that is taken is in nobody else's hands until it is put
    back; a loop that is not put back is its taker's to free."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._entries: list[_Entry] = []
        self._seen: OrderedDict[Hashable, None] = OrderedDict()
        self._orphaned: deque[None] = deque()

    def __len__(self) -> int:
        return len(self._entries)

    def take(self, key: Hashable) -> tuple[Loop | None, bool]:
        """A loop of this key, if one is kept and free; and whether the key has been asked for before."""
        with self._lock:
            seen = key in self._seen
            self._seen[key] = None
            self._seen.move_to_end(key)
            if len(self._seen) > SEEN:
                self._seen.popitem(last=False)
            place = next((i for i in reversed(range(len(self._entries))) if self._entries[i].key == key), None)
            found = None if place is None else self._entries.pop(place).loop
        self._bury()
        return found, seen

    def put(self, key: Hashable, device: torch.device, owners: Sequence[object], loop: Loop) -> None:
        """Keep a loop for as long as its owners live and there is room for it."""
        entry = _Entry(key, device, tuple(weakref.ref(owner, self._died) for owner in owners), loop)
        with self._lock:
            self._entries.append(entry)
            gone = self._surplus(device)
        _free(gone)
        self._bury()

    def clear(self, device: torch.device | None = None) -> int:
        """Free the loops of a device, or all; how many there were. Loops in use stay."""
        with self._lock:
            gone = [e for e in self._entries if device is None or e.device == device]
            self._entries = [e for e in self._entries if not any(e is g for g in gone)]
            if device is None:
                self._seen.clear()
        _free(gone)
        return len(gone)

    def _surplus(self, device: torch.device) -> list[_Entry]:
        """Take out what is too much for a device: its oldest entries."""
        mine = [e for e in self._entries if e.device == device]
        room, count = _room(device), 0
        gone = mine[:-MOST]
        for entry in reversed(mine[-MOST:]):
            count += entry.loop.bytes()
            if count > room:
                gone.append(entry)
        self._entries = [e for e in self._entries if not any(e is g for g in gone)]
        return gone

    def _died(self, _: object) -> None:
        # Python calls this at any time: with the lock held, or while a graph is recorded. Then others bury.
        self._orphaned.append(None)
        if not recording_here():
            self._bury(wait=False)

    def _bury(self, wait: bool = True) -> None:
        """Free the loops of owners that have died."""
        while self._orphaned and self._lock.acquire(blocking=wait):
            try:
                self._orphaned.clear()
                gone = [e for e in self._entries if not e.alive()]
                self._entries = [e for e in self._entries if e.alive()]
            finally:
                self._lock.release()
            _free(gone)


def _room(device: torch.device) -> float:
    if device.type != "cuda":
        return float("inf")
    return torch.cuda.get_device_properties(device).total_memory / SHARE


KEPT = Cache()
# Graphs must go before the driver does.
atexit.register(KEPT.clear)


def release_graphs(device: torch.device | str | None = None) -> int:
    """Free the cached CUDA graphs of earlier solves, with their memory.

    At most 8 are cached per device, in an eighth of its memory, and none longer than its regularizer and its operator.
    A solve that runs out of memory frees them by itself. Graphs in use are not freed.

    Parameters
    ----------
    device : torch.device or str, optional
        Default: all devices.

    Returns
    -------
    int
        The number of graphs.

    Examples
    --------
    >>> import deepreg_fast as dr
    >>> dr.release_graphs()
    0
    """
    count = KEPT.clear(None if device is None else torch.device(device))
    if count and torch.cuda.is_available():
        torch.cuda.empty_cache()
    return count


def retry_after_freeing_graphs(function: F) -> F:
    """The function, called a second time if it runs out of memory while loops are kept that nobody uses."""

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except (torch.OutOfMemoryError, OutOfMemory):
            if recording_here() or not release_graphs():
                raise
        return function(*args, **kwargs)

    return cast(F, call)


def _free(entries: Sequence[_Entry]) -> None:
    for entry in entries:
        free(entry.loop, entry.device)


def free(loop: Loop, device: torch.device) -> None:
    """Give a loop's memory back: to torch's allocator, and to the device once it adds up to an eighth of all. Torch
    keeps a graph's memory, unused by anything else, until it is told to let go, and telling it costs the time of an
    allocation for all its blocks."""
    loop.graph.reset()
    loop.held.clear()
    if device.type != "cuda":
        return
    _FREED[device] = _FREED.get(device, 0) + loop.size
    if 8 * _FREED[device] > torch.cuda.get_device_properties(device).total_memory:
        _FREED[device] = 0
        torch.cuda.empty_cache()


_FREED: dict[torch.device, int] = {}
