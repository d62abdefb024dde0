"""Rounds of a loop as a CUDA graph: capturable rounds are recorded once and replayed.

Later solves replay them too if they are known to be the same (`backend/gpu/graphs.py`).
"""

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
"""Rounds before a graph is captured. Capture costs about as much, so a solve is at most 2x slower than optimal."""

AGAIN = 1
"""Rounds before a graph is captured if a solve of the same key ran before, so more are likely to follow."""

ROUNDS = 4
"""Rounds in one graph. State that a round does not change in place is copied once per graph."""

_OFF: ContextVar[bool] = ContextVar("deepreg_fast_without_graphs", default=False)


@contextmanager
def without_graphs() -> Iterator[None]:
    """Run loops without CUDA graphs within this context."""
    token = _OFF.set(True)
    try:
        yield
    finally:
        _OFF.reset(token)


def records(t: torch.Tensor) -> bool:
    """Whether work on tensors like `t` can be captured in a CUDA graph."""
    return t.is_cuda


def worthwhile(rounds: int, reuse: Reuse | None) -> bool:
    """Whether a loop of at most `rounds` rounds may replay a graph, now or in a later solve."""
    return rounds > ROUNDS if reuse is not None else rounds >= 2 * WARM_UP


class Inputs(Protocol):
    """The holder of the tensors that a loop's rounds read and do not change."""

    def place(self, put: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Replace each of these tensors t by `put(t)`, always in the same order."""
        ...


@dataclass(frozen=True)
class Reuse:
    """The conditions under which later solves reuse a loop's graph.

    Rounds depend on `key`, on the tensors `memory` at fixed addresses, on the loop's state and on `inputs`. A graph is
    freed with its `owners`.
    """

    key: Hashable
    owners: tuple[object, ...]
    memory: tuple[torch.Tensor, ...]
    inputs: Inputs


def reuse_of(kind: Hashable, inputs: Inputs, *signatures: Signature | None) -> Reuse | None:
    """The `Reuse` of a loop of that kind whose products have these signatures; None if one of them is unknown."""
    known = [s for s in signatures if s is not None]
    if len(known) < len(signatures):
        return None
    owners, memory = tuple(s.owner for s in known), tuple(t for s in known for t in s.memory)
    key = (kind, *(s.key for s in known), *map(weakref.ref, owners))
    return Reuse(key, owners, memory, inputs)


def _kind(t: torch.Tensor) -> Hashable:
    return tuple(t.shape), t.dtype, t.device


def _surroundings(device: torch.device) -> Hashable:
    """Global state that recorded work depends on. It contains no matrix products, so torch's TF32 setting does not
    matter; the precision of the package's kernels is part of their signatures."""
    deterministic = (torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory)  # type: ignore[attr-defined]
    modes = (torch.is_inference_mode_enabled(), torch.get_default_dtype())
    return (device, stream_of(device), backend.choice(), *deterministic, *modes)


class GraphedLoop:
    """Calls `body`, one round of a loop, and after a warm-up replays `ROUNDS` of them as a CUDA graph.

    The tensors among the attributes of `holders` are the loop's state. `body` may change them in place or replace them;
    they may also be replaced between two calls. In a graph they have fixed memory, to which replaced tensors are copied
    at the end of the graph. If capture fails, the state is unchanged and the loop continues without a graph. Unless
    memory ran out, later loops on this device use none either: something was wrongly declared capturable.

    With `reuse` the graph outlives the loop. A later loop of the same key copies its state and inputs to the graph's
    memory and replays from its first round. The warm-up is `WARM_UP` rounds, or `AGAIN` if a loop of this key ran
    before. The results of a solve must then go through `own`. If a loop ends with an exception, its graph is freed.

    A graph holds the temporaries of one round, however many rounds are replayed. Without `reuse`, `close` (or leaving
    the `with` block) frees it; the state's memory belongs to the loop.
    """

    def __init__(
        self,
        body: Callable[[], None],
        holders: Sequence[object],
        device: torch.device | None = None,
        record: Callable[[Callable[[], None], torch.device], Graph] | None = None,
        reuse: Reuse | None = None,
    ) -> None:
        """`device` is the graph's, None for no graph; `record` captures it."""
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
        """End the loop. Its graph is cached for later loops if `reuse` permits it. With `kept=False` it is freed at
        once, and the state's memory belongs to the loop."""
        loop, self._loop = self._loop, None
        if loop is None or self._device is None:
            return
        if kept and self._key is not None and self._reuse is not None:
            KEPT.put(self._key, self._device, self._reuse.owners, loop)
        else:
            free(loop, self._device)

    def own(self, t: torch.Tensor) -> torch.Tensor:
        """`t` in memory that no later loop writes to: a copy if `t` lies in memory of a graph that may be cached."""
        if self._loop is None or self._key is None:
            return t
        addresses = {t_static.untyped_storage().data_ptr() for t_static in self._loop.state.values()}
        return t.clone() if t.untyped_storage().data_ptr() in addresses else t

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
        """Copy replaced tensors to their fixed memory."""
        moved = [(i, name, t) for i, name, t in self._state() if t is not home[i, name]]
        static_ids = {id(t) for t in home.values()}
        # A replaced tensor may lie in fixed memory that another copy is about to overwrite.
        moved = [(i, name, t.clone() if id(t) in static_ids else t) for i, name, t in moved]
        for i, name, t in moved:
            setattr(self._holders[i], name, home[i, name].copy_(t))

    def _layout(self) -> Hashable:
        return tuple((i, name, _kind(t)) for i, name, t in sorted(self._state(), key=lambda s: s[:2]))

    def _find(self, device: torch.device, reuse: Reuse) -> None:
        """Look up the graph of an earlier loop, and copy the inputs to its memory."""
        inputs: list[torch.Tensor] = []
        reuse.inputs.place(lambda t: inputs.append(t) or t)
        self._began = self._layout()
        self._key = (_surroundings(device), reuse.key, self._began, tuple(map(_kind, inputs)))
        self._loop, seen = KEPT.take(self._key)
        self._warm_up = min(AGAIN, WARM_UP) if seen else WARM_UP
        if self._loop is not None:
            static = iter(self._loop.inputs)
            reuse.inputs.place(lambda t: next(static).copy_(t))

    def _make(self, device: torch.device) -> None:
        static: dict[tuple[int, str], torch.Tensor] = {}

        def rounds() -> None:
            for _ in range(ROUNDS):
                self._body()
            self._copy_to_static(static)

        try:
            addresses: set[int] = set()
            for i, name, t in list(self._state()):
                static[i, name] = t.clone() if t.data_ptr() in addresses else t
                setattr(self._holders[i], name, static[i, name])
                addresses.add(t.data_ptr())
            inputs = self._inputs_of_its_own()
            before = _reserved(device)
            with recording(device) as recorded:
                graph = self._record(rounds, device)
            self._loop = Loop(graph, static, inputs, recorded.held, _reserved(device) - before)
        except Exception as error:
            # Nothing has run, so the values are unchanged.
            for (i, name), t in static.items():
                setattr(self._holders[i], name, t)
            self._device = None
            if isinstance(error, torch.OutOfMemoryError):
                release_graphs(device)
            else:
                _NO_GRAPH.add(device)
            reason = str(error).partition("\n")[0]
            warnings.warn(f"This solve goes on without a CUDA graph, which could not be made: {reason}", stacklevel=3)

    def _inputs_of_its_own(self) -> list[torch.Tensor]:
        """Replace the inputs by copies and return these; none if the graph ends with this loop."""
        copies: list[torch.Tensor] = []
        if self._reuse is not None and self._key is not None:
            if self._began != self._layout():
                # A later loop would start with tensors of another layout than this graph's.
                self._key = None
                return []
            self._reuse.inputs.place(lambda t: copies.append(t.clone()) or copies[-1])
        return copies


_NO_GRAPH: set[torch.device] = set()


def _record(body: Callable[[], None], device: torch.device) -> Graph:
    """Capture a CUDA graph of `body`'s kernels without running them.

    This is `torch.cuda.graph` without emptying torch's memory cache, which would cost every solve its cached blocks.
    The rounds before have warmed everything up, on the stream on which the graph is replayed. Other threads may use
    the device meanwhile ("thread_local").
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
            # After a failed capture torch's allocator stays in capture mode and cannot free memory.
            with suppress(Exception):
                getattr(torch._C, "_cuda_endAllocateToPool")(device.index, pool)  # noqa: B009
            # In older versions so does its random generator; a copy of its state is not in capture mode.
            with suppress(Exception):
                generator = torch.cuda.default_generators[device.index]
                generator.graphsafe_set_state(generator.clone_state())
            raise
    return graph


def _reserved(device: torch.device) -> int:
    return torch.cuda.memory_reserved(device) if device.type == "cuda" else 0


@contextmanager
def _no_collection() -> Iterator[None]:
    """No garbage collection within this context: freeing another graph would invalidate the capture."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()
