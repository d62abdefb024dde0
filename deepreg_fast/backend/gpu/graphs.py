"""Recorded loops that outlive a solve: a bounded cache of CUDA graphs with the memory that they read and write.

A graph reads fixed memory. A later solve may replay it if everything that the recorded work depends on is either the
same (`Signature`) or copied to that memory first (`Loop`).
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
"""Maximum number of cached loops per device."""

SHARE = 8
"""Cached loops use at most 1 / SHARE of the device's memory."""

SEEN = 64
"""Number of recent keys that are stored without a loop."""


class Graph(Protocol):
    """Recorded work: the methods of `torch.cuda.CUDAGraph`."""

    def replay(self) -> None:
        """Queue the work again, on the same memory."""
        ...

    def reset(self) -> None:
        """Free the graph."""
        ...


@dataclass(frozen=True)
class Signature:
    """Everything that recorded products depend on besides the tensors that are copied to the graph's memory.

    `key`: settings, and the addresses of tensors that the graph reads in place; `owner`: the object that the products
    belong to, with which the loop is freed; `memory`: the tensors at those addresses. Holding them prevents other
    tensors from being allocated there.
    """

    key: Hashable
    owner: object
    memory: tuple[torch.Tensor, ...] = ()


def places_of(tensors: Iterable[torch.Tensor]) -> tuple[Hashable, ...]:
    """Addresses, dtypes, shapes and strides of tensors, for the key of a `Signature`."""
    return tuple((t.data_ptr(), t.dtype, tuple(t.shape), t.stride()) for t in tensors)


@dataclass
class Loop:
    """A recorded loop: the fixed memory of its state (by holder and name) and of its inputs, and other objects.

    `size`: the bytes that torch reserved for the graph's temporaries.
    """

    graph: Graph
    state: dict[tuple[int, str], torch.Tensor]
    inputs: list[torch.Tensor] = field(default_factory=list)
    held: list[object] = field(default_factory=list)
    size: int = 0

    def bytes(self) -> int:
        """Bytes of device memory, including the state and the inputs."""
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
    """Loops by key; the least recently used is evicted first.

    A loop that is taken leaves the cache until it is put back. If it is not put back, the caller frees it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._entries: list[_Entry] = []
        self._seen: OrderedDict[Hashable, None] = OrderedDict()
        self._orphaned: deque[None] = deque()

    def __len__(self) -> int:
        return len(self._entries)

    def take(self, key: Hashable) -> tuple[Loop | None, bool]:
        """Remove and return a loop of this key, if one is cached; and whether the key was requested before."""
        with self._lock:
            seen_before = key in self._seen
            self._seen[key] = None
            self._seen.move_to_end(key)
            if len(self._seen) > SEEN:
                self._seen.popitem(last=False)
            index = next((i for i in reversed(range(len(self._entries))) if self._entries[i].key == key), None)
            loop = None if index is None else self._entries.pop(index).loop
        self._bury()
        return loop, seen_before

    def put(self, key: Hashable, device: torch.device, owners: Sequence[object], loop: Loop) -> None:
        """Cache a loop as long as its owners live and there is room for it."""
        entry = _Entry(key, device, tuple(weakref.ref(owner, self._died) for owner in owners), loop)
        with self._lock:
            self._entries.append(entry)
            surplus = self._surplus(device)
        _free(surplus)
        self._bury()

    def clear(self, device: torch.device | None = None) -> int:
        """Free the cached loops of a device, or all; return their number. Loops in use stay."""
        with self._lock:
            cleared = [e for e in self._entries if device is None or e.device == device]
            self._entries = [e for e in self._entries if not any(e is g for g in cleared)]
            if device is None:
                self._seen.clear()
        _free(cleared)
        return len(cleared)

    def _surplus(self, device: torch.device) -> list[_Entry]:
        """Remove and return the oldest entries of a device that exceed the limits."""
        cached = [e for e in self._entries if e.device == device]
        limit, total = _room(device), 0
        surplus = cached[:-MOST]
        for entry in reversed(cached[-MOST:]):
            total += entry.loop.bytes()
            if total > limit:
                surplus.append(entry)
        self._entries = [e for e in self._entries if not any(e is g for g in surplus)]
        return surplus

    def _died(self, _: object) -> None:
        # Python may call this while the lock is held or a graph is recorded. Then a later call frees the loops.
        self._orphaned.append(None)
        if not recording_here():
            self._bury(wait=False)

    def _bury(self, wait: bool = True) -> None:
        """Free the loops whose owners were deleted."""
        while self._orphaned and self._lock.acquire(blocking=wait):
            try:
                self._orphaned.clear()
                dead = [e for e in self._entries if not e.alive()]
                self._entries = [e for e in self._entries if e.alive()]
            finally:
                self._lock.release()
            _free(dead)


def _room(device: torch.device) -> float:
    if device.type != "cuda":
        return float("inf")
    return torch.cuda.get_device_properties(device).total_memory / SHARE


KEPT = Cache()
# Graphs must be freed before the driver shuts down.
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
    """Decorator: on running out of memory, free the cached loops and call the function once more."""

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
    """Return a loop's memory to torch's allocator, and to the device once freed loops add up to an eighth of it.

    Torch reserves a graph's memory, and nothing else uses it, until `empty_cache`, which costs a new allocation of
    every cached block.
    """
    loop.graph.reset()
    loop.held.clear()
    if device.type != "cuda":
        return
    _FREED[device] = _FREED.get(device, 0) + loop.size
    if _FREED[device] > _room(device):
        _FREED[device] = 0
        torch.cuda.empty_cache()


_FREED: dict[torch.device, int] = {}
