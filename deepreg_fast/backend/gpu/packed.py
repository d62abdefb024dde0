"""A network's parameters in the kernels' layout, packed once per version of their values. A CUDA graph packs them at
every replay."""

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
    """Packed parameters and their origin. `memory` holds the parameters' memory, so no other tensor can lie there."""

    parameters: tuple[weakref.ref[Tensor], ...]
    memory: tuple[Tensor, ...]
    versions: tuple[int, ...]
    settings: tuple[Any, ...]
    packed: Packed

    def fits(self, parameters: Sequence[Tensor], settings: tuple[Any, ...]) -> bool:
        """Whether these are the same tensors with unchanged values."""
        return (
            len(parameters) == len(self.parameters)
            and settings == self.settings
            and all(
                ref() is p and p._version == version and p.data_ptr() == saved.data_ptr()
                for ref, p, version, saved in zip(self.parameters, parameters, self.versions, self.memory, strict=True)
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
    """The result of `pack()` for `net`'s `parameters`; the cached one if neither these nor `settings` have changed.

    Changes are detected by torch's version counters, which do not count changes through `.data`. Tensors created in
    inference mode have no counter, so their results are not cached. A result is cached per stream, and as long as the
    module lives. A graph that is being recorded packs for itself from the parameters' memory, so every replay uses the
    current values, even after in-place changes.
    """
    if (graph := recording_here()) is not None:
        return _in_graph(graph, net, parameters, settings, pack)
    key = (device, stream_of(device))
    with _LOCK:
        entry = _ENTRIES.get(net, {}).get(key)
    if entry is None or not entry.fits(parameters, settings):
        # Read the versions before packing, so that a concurrent change is detected.
        versions = None if any(p.is_inference() for p in parameters) else tuple(p._version for p in parameters)
        result = pack()
        # Within another program's recording, the result is valid only after its graph has run.
        if versions is None or recording_now(device):
            return result
        refs, memory = tuple(map(weakref.ref, parameters)), tuple(p.detach() for p in parameters)
        entry = _Entry(refs, memory, versions, settings, result)
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
    """Pack once per graph, before the first launch that reads it; the graph keeps the parameters' memory alive."""
    key = (id(net), *(p.data_ptr() for p in parameters), settings)
    if key not in graph.packed:
        for p in parameters:
            hold(p.detach())
        graph.packed[key] = pack()
    return graph.packed[key]
