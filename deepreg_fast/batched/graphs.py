"""Rounds of a loop as a CUDA graph: recorded once they are known to be capturable, replayed afterwards, and where that
is known to be right also in later solves (`backend/gpu/graphs.py`)."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Protocol

import torch

from .. import backend
from ..backend.gpu.graphs import KEPT, Graph, Loop, Signature, free, release_graphs
from ..backend.gpu.memory import recording, stream_of

WARM_UP = 12
"""Rounds before a graph is made, which costs about as much: so a solve never takes twice as long as it could."""

AGAIN = 1
"""Rounds before a graph is made for a solve like one that there was before, so that more will come."""

ROUNDS = 4
"""Rounds in one graph; state that a round does not change in place is copied once in so many."""

_OFF: ContextVar[bool] = ContextVar("deepreg_fast_without_graphs", default=False)


@contextmanager
def without_graphs() -> Iterator[None]:
    """Run loops round by round."""
    token = _OFF.set(True)
    try:
        yield
    finally:
        _OFF.reset(token)


def records(t: torch.Tensor) -> bool:
    """Whether work on tensors like `t` can be recorded at all."""
    return t.is_cuda


def worthwhile(rounds: int, reuse: Reuse | None) -> bool:
    """Whether a loop of at most `rounds` rounds may come to replay a graph, now or in a later solve."""
    return rounds > ROUNDS if reuse is not None else rounds >= 2 * WARM_UP


class Inputs(Protocol):
    """What holds the tensors that a loop's rounds read and do not change."""

    def place(self, put: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Put `put(t)` in the place of each of these tensors t, always in the same order."""
        ...


@dataclass(frozen=True)
class Reuse:
    """What lets a loop's graph serve later solves. Rounds depend on `key`, on memory of `memory` where it lies, and on
    tensors: those of the loop's state, and `inputs`. Graphs end with their `owners`."""

    key: Hashable
    owners: tuple[object, ...]
    memory: tuple[torch.Tensor, ...]
    inputs: Inputs


def reuse_of(kind: Hashable, inputs: Inputs, *signatures: Signature | None) -> Reuse | None:
    """Of a loop of that kind whose products have these signatures; None if one of them is unknown."""
    found = [s for s in signatures if s is not None]
    if len(found) < len(signatures):
        return None
    owners, memory = tuple(s.owner for s in found), tuple(t for s in found for t in s.memory)
    key = (kind, *(s.key for s in found), *map(weakref.ref, owners))
    return Reuse(key, owners, memory, inputs)


def _kind(t: torch.Tensor) -> Hashable:
    return tuple(t.shape), t.dtype, t.device


def _surroundings(device: torch.device) -> Hashable:
    """What recorded work depends on beside the solve. It holds no product of matrices, so torch's TF32 does not
    matter; the precision of the package's kernels is part of their signatures."""
    deterministic = (torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory)  # type: ignore[attr-defined]
    modes = (torch.is_inference_mode_enabled(), torch.get_default_dtype())
    return (device, stream_of(device), backend.choice(), *deterministic, *modes)


class GraphedLoop:
    """Calls `body`, one round of a loop, and after a warm-up replays `ROUNDS` of them as a CUDA graph.

    The tensors among the attributes of `holders` are the loop's state: `body` may change them in place or put new ones
    in their places. In a graph they have fixed memory, to which what is new is copied at its end. They may also be
    replaced between two calls. If making the graph fails, the state is as before, the loop goes on without one, and so
    do later ones on this device: a failure means that something was wrongly said to be capturable.

    With `reuse` the graph outlives the loop: a later one of the same key copies its state and inputs to the graph's
    memory and replays from its first round. The warm-up is `WARM_UP` rounds, or `AGAIN` where a loop of this key was
    there before. What a solve returns must then be its `own`. The graph of a loop that ends by an exception is freed.

    A graph holds the temporaries of one round, however many rounds are replayed. Without `reuse`, `close` (or leaving
    the `with` block) frees it; the state's memory is the loop's.
    """

    def __init__(
        self,
        body: Callable[[], None],
        holders: Sequence[object],
        device: torch.device | None = None,
        record: Callable[[Callable[[], None], torch.device], Graph] | None = None,
        reuse: Reuse | None = None,
    ) -> None:
        """`device`: of the graph, None for none; `record` makes it."""
        self._body, self._holders, self._reuse = body, holders, reuse
        self._device = None if device in _NO_GRAPH or _OFF.get() else device
        self._record = record or _record
        self._calls, self._warm_up = 0, WARM_UP
        self._key: Hashable | None = None
        self._began: Hashable = None
        self._loop: Loop | None = None

    def __enter__(self) -> GraphedLoop:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self.close(kept=kind is None)

    def close(self, kept: bool = True) -> None:
        """End the loop. Its graph is kept for later ones if that is right; with `kept=False` it is freed at once, and
        the state's memory is the loop's."""
        loop, self._loop = self._loop, None
        if loop is None or self._device is None:
            return
        if kept and self._key is not None and self._reuse is not None:
            KEPT.put(self._key, self._device, self._reuse.owners, loop)
        else:
            free(loop, self._device)

    def own(self, t: torch.Tensor) -> torch.Tensor:
        """`t` in memory that no later loop will write: a copy, if it lies in that of a graph that may be kept."""
        if self._loop is None or self._key is None:
            return t
        places = {h.untyped_storage().data_ptr() for h in self._loop.state.values()}
        return t.clone() if t.untyped_storage().data_ptr() in places else t

    def __call__(self) -> None:
        """One round, or `ROUNDS` of them."""
        if self._device is not None and self._loop is None:
            if self._calls == 0 and self._reuse is not None:
                self._find(self._device, self._reuse)
            if self._loop is None and self._calls >= self._warm_up:
                self._make(self._device)
        if self._loop is None:
            self._calls += 1
            self._body()
        else:
            self._copy_to_static(self._loop.state)
            self._loop.graph.replay()

    def _state(self) -> Iterator[tuple[int, str, torch.Tensor]]:
        for i, holder in enumerate(self._holders):
            for name, value in vars(holder).items():
                if isinstance(value, torch.Tensor):
                    yield i, name, value

    def _copy_to_static(self, home: dict[tuple[int, str], torch.Tensor]) -> None:
        """Copy what has been replaced to its fixed memory."""
        away = [(i, name, t) for i, name, t in self._state() if t is not home[i, name]]
        homes = {id(t) for t in home.values()}
        # A tensor may have moved to where another is about to be copied to.
        away = [(i, name, t.clone() if id(t) in homes else t) for i, name, t in away]
        for i, name, t in away:
            setattr(self._holders[i], name, home[i, name].copy_(t))

    def _layout(self) -> Hashable:
        return tuple((i, name, _kind(t)) for i, name, t in sorted(self._state(), key=lambda s: s[:2]))

    def _find(self, device: torch.device, reuse: Reuse) -> None:
        """Take a graph that an earlier loop has left, and copy the inputs to its memory."""
        inputs: list[torch.Tensor] = []
        reuse.inputs.place(lambda t: inputs.append(t) or t)
        self._began = self._layout()
        self._key = (_surroundings(device), reuse.key, self._began, tuple(map(_kind, inputs)))
        self._loop, seen = KEPT.take(self._key)
        self._warm_up = min(AGAIN, WARM_UP) if seen else WARM_UP
        if self._loop is not None:
            homes = iter(self._loop.inputs)
            reuse.inputs.place(lambda t: next(homes).copy_(t))

    def _make(self, device: torch.device) -> None:
        home: dict[tuple[int, str], torch.Tensor] = {}

        def rounds() -> None:
            for _ in range(ROUNDS):
                self._body()
            self._copy_to_static(home)

        try:
            places: set[int] = set()
            for i, name, t in list(self._state()):
                home[i, name] = t.clone() if t.data_ptr() in places else t
                setattr(self._holders[i], name, home[i, name])
                places.add(t.data_ptr())
            inputs = self._inputs_of_its_own()
            before = _reserved(device)
            with recording(device) as made:
                graph = self._record(rounds, device)
            self._loop = Loop(graph, home, inputs, made.held, _reserved(device) - before)
        except Exception as error:
            # Nothing has run: the values are where they were.
            for (i, name), t in home.items():
                setattr(self._holders[i], name, t)
            self._device = None
            if isinstance(error, torch.OutOfMemoryError):
                release_graphs(device)
            else:
                _NO_GRAPH.add(device)
            reason = str(error).partition("\n")[0]
            warnings.warn(f"This solve goes on without a CUDA graph, which could not be made: {reason}", stacklevel=3)

    def _inputs_of_its_own(self) -> list[torch.Tensor]:
        """Copies of the inputs, in whose places they are now; none if the graph will end with this loop."""
        copies: list[torch.Tensor] = []
        if self._reuse is not None and self._key is not None:
            if self._began != self._layout():
                # A later loop begins with other tensors than this graph's.
                self._key = None
                return []
            self._reuse.inputs.place(lambda t: copies.append(t.clone()) or copies[-1])
        return copies


_NO_GRAPH: set[torch.device] = set()


def _record(body: Callable[[], None], device: torch.device) -> Graph:
    """A CUDA graph of what `body` queues, none of which runs.

    As `torch.cuda.graph` does it, but for emptying torch's cache of memory: that would cost every solve its blocks.
    The rounds before have warmed everything up, on the stream that the graph will be replayed on. Other threads may
    go on using the device ("thread_local").
    """
    graph, stream, pool = torch.cuda.CUDAGraph(), torch.cuda.Stream(device), torch.cuda.graph_pool_handle()
    stream.wait_stream(torch.cuda.current_stream(device))
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
    return graph


def _reserved(device: torch.device) -> int:
    return torch.cuda.memory_reserved(device) if device.type == "cuda" else 0


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
