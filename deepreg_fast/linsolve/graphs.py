"""Rounds of a loop as a CUDA graph: recorded once they are known to be capturable, replayed afterwards."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Protocol

import torch

from ..backend.gpu_memory import recording

WARM_UP = 12
"""Rounds before a graph is made, which costs about as much: so a solve never takes twice as long as it could."""

ROUNDS = 4
"""Rounds in one graph; state that a round does not change in place is copied once in so many."""


class Graph(Protocol):
    """Recorded work: what `torch.cuda.CUDAGraph` offers."""

    def replay(self) -> None:
        """Queue the work again, on the same memory."""
        ...

    def reset(self) -> None:
        """Free it."""
        ...


class Replay:
    """Calls `body`, one round of a loop, and after `WARM_UP` calls replays `ROUNDS` of them as a CUDA graph.

    The tensors among the attributes of `holders` are the loop's state: `body` may change them in place or put new ones
    in their places. In a graph they have fixed memory, to which what is new is copied at its end. They may also be
    replaced between two calls. If making the graph fails, the state is as before, the loop goes on without one, and so
    do later ones on this device: a failure means that something was wrongly said to be capturable.

    A graph holds the temporaries of one round, however many rounds are replayed; `close` (or leaving the `with` block)
    gives them to torch's allocator, and to the device once they add up (`_release`). The state's memory is the loop's.
    """

    def __init__(
        self,
        body: Callable[[], None],
        holders: Sequence[object],
        device: torch.device | None = None,
        record: Callable[[Callable[[], None], torch.device], Graph] | None = None,
    ) -> None:
        """`device`: of the graph, None for none; `record` makes it."""
        self._body, self._holders = body, holders
        self._device = None if device in _WITHOUT else device
        self._record = record or _record
        self._calls = 0
        self._graph: Graph | None = None
        self._home: dict[tuple[int, str], torch.Tensor] = {}
        self._held: list[object] = []

    def __enter__(self) -> Replay:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the graph."""
        if self._graph is not None:
            self._graph.reset()
            self._graph = None
            self._held = []
            _release(self._device)

    def __call__(self) -> None:
        """One round, or `ROUNDS` of them."""
        if self._graph is None and self._device is not None and self._calls >= WARM_UP:
            self._make(self._device)
        if self._graph is None:
            self._calls += 1
            self._body()
        else:
            self._go_home()
            self._graph.replay()

    def _state(self) -> Iterator[tuple[int, str, torch.Tensor]]:
        for i, holder in enumerate(self._holders):
            for name, value in vars(holder).items():
                if isinstance(value, torch.Tensor):
                    yield i, name, value

    def _go_home(self) -> None:
        """Copy what has been replaced to its fixed memory."""
        away = [(i, name, t) for i, name, t in self._state() if t is not self._home[i, name]]
        homes = {id(t) for t in self._home.values()}
        # A tensor may have moved to where another is about to be copied to.
        away = [(i, name, t.clone() if id(t) in homes else t) for i, name, t in away]
        for i, name, t in away:
            setattr(self._holders[i], name, self._home[i, name].copy_(t))

    def _make(self, device: torch.device) -> None:
        def rounds() -> None:
            for _ in range(ROUNDS):
                self._body()
            self._go_home()

        try:
            places: set[int] = set()
            for i, name, t in list(self._state()):
                self._home[i, name] = t.clone() if t.data_ptr() in places else t
                setattr(self._holders[i], name, self._home[i, name])
                places.add(t.data_ptr())
            with recording(device) as made:
                self._graph = self._record(rounds, device)
            self._held = made.held
        except Exception as error:
            # Nothing has run: the values are where they were.
            for (i, name), t in self._home.items():
                setattr(self._holders[i], name, t)
            self._device = None
            if not isinstance(error, torch.OutOfMemoryError):
                _WITHOUT.add(device)
            reason = str(error).partition("\n")[0]
            warnings.warn(f"This solve goes on without a CUDA graph, which could not be made: {reason}", stacklevel=3)


_WITHOUT: set[torch.device] = set()


def _record(body: Callable[[], None], device: torch.device) -> Graph:
    """A CUDA graph of what `body` queues, none of which runs.

    As `torch.cuda.graph` does it, but for emptying torch's cache of memory: that would cost every solve its blocks.
    The rounds before have warmed everything up, on the stream that the graph will be replayed on. Other threads may
    go on using the device ("thread_local").
    """
    graph, stream, pool = torch.cuda.CUDAGraph(), torch.cuda.Stream(device), torch.cuda.graph_pool_handle()
    stream.wait_stream(torch.cuda.current_stream(device))
    before = torch.cuda.memory_reserved(device)
    with torch.cuda.device(device), torch.cuda.stream(stream), _no_collection():
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        try:
            try:
                body()
            finally:
                graph.capture_end()
        except Exception:
            # Where a recording ends badly torch's allocator goes on as if it were recording, and could free nothing.
            with suppress(Exception):
                getattr(torch._C, "_cuda_endAllocateToPool")(device.index, pool)  # noqa: B009
            # In older versions so does its random generator; a copy of its state has nothing of the recording.
            with suppress(Exception):
                generator = torch.cuda.default_generators[device.index]
                generator.graphsafe_set_state(generator.clone_state())
            raise
    _RESERVED[device] = _RESERVED.get(device, 0) + torch.cuda.memory_reserved(device) - before
    return graph


@contextmanager
def _no_collection() -> Iterator[None]:
    """Another graph that the garbage collector ended inside would end this recording, too."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


_RESERVED: dict[torch.device, int] = {}


def _release(device: torch.device | None) -> None:
    """Give the device the memory of graphs that are gone once it adds up to an eighth of all: torch keeps it, unused
    by anything else, until it is told to, and telling it costs the time of an allocation for all its blocks."""
    if device is None or device.type != "cuda":
        return
    if 8 * _RESERVED.get(device, 0) > torch.cuda.get_device_properties(device).total_memory:
        _RESERVED[device] = 0
        torch.cuda.empty_cache()
