"""A network's parameters as the kernels read them, packed once for each version of their values; a CUDA graph packs
them once each time it runs."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .memory import Recording, hold, recording_here, recording_now, stream_of

Packed = list[tuple[Tensor, Tensor]]
"""Filters and vectors of each convolution."""


@dataclass(frozen=True)
class _Entry:
    """What was packed, from which parameters. `memory` shares theirs, so that no other tensor can lie there."""

    parameters: tuple[weakref.ref[Tensor], ...]
    memory: tuple[Tensor, ...]
    versions: tuple[int, ...]
    settings: tuple[Any, ...]
    packed: Packed

    def fits(self, parameters: Sequence[Tensor], settings: tuple[Any, ...]) -> bool:
        """Whether these are the same tensors, unchanged."""
        return (
            len(parameters) == len(self.parameters)
            and settings == self.settings
            and all(
                ref() is p and p._version == version and p.data_ptr() == there.data_ptr()
                for ref, p, version, there in zip(self.parameters, parameters, self.versions, self.memory, strict=True)
            )
        )


_ENTRIES: weakref.WeakKeyDictionary[nn.Module, dict[tuple[torch.device, int], _Entry]] = weakref.WeakKeyDictionary()
_LOCK = threading.Lock()


def packed(
    net: nn.Module,
    parameters: Sequence[Tensor],
    settings: tuple[Any, ...],
    device: torch.device,
    pack: Callable[[], Packed],
) -> Packed:
    """What `pack()` makes of `net`'s `parameters`: the last answer, if nothing of these and of `settings` has changed.

    Changes are those that torch counts, which it does not do through `.data`. Tensors made in inference mode are not
    counted at all, so that their answers are not kept. An answer belongs to the stream on which it was made, and to the
    module as long as that lives. A graph that is being recorded packs for itself, from the parameters' own memory: each
    time it runs it has their values of then, whatever changed them in place.
    """
    if (graph := recording_here()) is not None:
        return _in_graph(graph, net, parameters, settings, pack)
    key = (device, stream_of(device))
    with _LOCK:
        entry = _ENTRIES.get(net, {}).get(key)
    if entry is None or not entry.fits(parameters, settings):
        # Before packing: a change meanwhile must show.
        versions = None if any(p.is_inference() for p in parameters) else tuple(p._version for p in parameters)
        answer = pack()
        # What a recording by someone else packs is there only when its graph has run.
        if versions is None or recording_now(device):
            return answer
        refs, memory = tuple(map(weakref.ref, parameters)), tuple(p.detach() for p in parameters)
        entry = _Entry(refs, memory, versions, settings, answer)
        with _LOCK:
            _ENTRIES.setdefault(net, {})[key] = entry
    return entry.packed


def _in_graph(
    graph: Recording,
    net: nn.Module,
    parameters: Sequence[Tensor],
    settings: tuple[Any, ...],
    pack: Callable[[], Packed],
) -> Packed:
    """Packed once in a graph, before the first launch that reads it; the graph keeps the parameters' memory."""
    key = (id(net), *(p.data_ptr() for p in parameters), settings)
    if key not in graph.packed:
        for p in parameters:
            hold(p.detach())
        graph.packed[key] = pack()
    return graph.packed[key]
