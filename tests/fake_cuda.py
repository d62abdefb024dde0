"""A CUDA device that is not there: tensors without numbers that know their device (torch's FakeTensorMode).

An operation on two devices raises as it would there. What the host reads is recorded and gets a made-up answer.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from deepreg_fast import checks
from deepreg_fast.functional.dct import dct_matrix
from deepreg_fast.training import placement

CUDA = torch.device("cuda", 0)
_ANSWERS: dict[str, Callable[[torch.Tensor], Any]] = {
    "__bool__": lambda t: True,
    "__float__": lambda t: 1.0,
    "__int__": lambda t: 1,
    "__index__": lambda t: 1,
    "item": lambda t: 1,
    "tolist": lambda t: [1.0] * t.numel(),
}


class Read(NamedTuple):
    """One wait of the host: the function, how many numbers it took, and the package's module that asked."""

    function: str
    count: int
    module: str


def _index(t: torch.Tensor, key: Any) -> torch.Tensor:
    """`t[key]` for integers, slices without step, None and index tensors."""
    indices: list[torch.Tensor | None] = []
    for k in key if isinstance(key, tuple) else (key,):
        if isinstance(k, int):
            t = t.select(len(indices), k)
            continue
        if k is None:
            t = t.unsqueeze(len(indices))
        elif isinstance(k, slice):
            t = torch.ops.aten.slice(t, len(indices), k.start, k.stop)
        indices.append(k if isinstance(k, torch.Tensor) else None)
    return torch.ops.aten.index(t, indices) if any(i is not None for i in indices) else t


class _Recorder(TorchFunctionMode):
    def __init__(self, reads: list[Read]) -> None:
        super().__init__()
        self.reads = reads

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        t = args[0] if args and isinstance(args[0], torch.Tensor) else None
        if t is None:
            return func(*args, **(kwargs or {}))
        if name in _ANSWERS:
            self._note(t, name)
            return _ANSWERS[name](t)
        if name == "__getitem__" and isinstance(args[1], torch.Tensor) and args[1].dtype == torch.bool:
            self._note(t, "mask")
            return t
        # These methods of Python's ask for a driver; the operators under them do not.
        if name == "__invert__":
            return torch.ops.aten.bitwise_not(t)
        if name == "copy_":
            if args[1].device.type == "cuda" and t.device.type == "cpu" and not (kwargs or {}).get("non_blocking"):
                self._note(args[1], name)
            return torch.ops.aten.copy_(*args, **(kwargs or {}))
        if name == "__getitem__":
            return _index(t, args[1])
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.device.type == "cpu":
            self._note(t, name)
        return out

    def _note(self, t: torch.Tensor, name: str) -> None:
        if t.device.type == "cuda":
            frame: Any = sys._getframe(2)
            while not frame.f_globals.get("__name__", "").startswith("deepreg_fast."):
                frame = frame.f_back
            self.reads.append(Read(name, t.numel(), frame.f_globals["__name__"]))


def _moved(module: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """`module.to(device)`, which fake parameters do not have."""
    for m in module.modules():
        for k, p in list(m._parameters.items()):
            if p is not None:
                m._parameters[k] = torch.nn.Parameter(p.detach().to(device), requires_grad=p.requires_grad)
        for k, b in list(m._buffers.items()):
            if b is not None:
                m._buffers[k] = b.to(device)
    return module


@contextmanager
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[FakeTensorMode, list[Read]]]:
    """Inside, the settings' device is fake; gives the mode and the list of the host's reads."""
    reads: list[Read] = []
    mode = FakeTensorMode()
    with monkeypatch.context() as patch:
        patch.setattr(checks, "device", lambda *_: CUDA)
        patch.setattr(placement, "upload", lambda t, device: t.to(device))
        patch.setattr(placement.PinnedSamples, "_rows", staticmethod(lambda shape, _: torch.zeros(shape)))
        patch.setattr(torch.nn.Module, "to", _moved)
        # Its weights come from the meta device, from which a fake module cannot be moved.
        patch.setattr(torch.nn.utils, "skip_init", lambda kind, *args, **options: kind(*args, **options))
        try:
            # Without graphs: those of CUDA tensors ask for a stream.
            with mode, _Recorder(reads), torch.no_grad():
                yield mode, reads
        finally:
            dct_matrix.cache_clear()
