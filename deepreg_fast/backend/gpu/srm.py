"""The structurally random matrix's products on a GPU, with the kernels of `csrc/cuda/srm.cu` (docs/kernels.md)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import nn

from ..active import active_mask
from ..reference import srm_key
from . import nvrtc
from .memory import hold
from .srm_plan import ADJOINT, CORRECT, FORWARD, NORMAL, Plan, plan


class Launcher(Protocol):
    """Launches kernels of one compiled source."""

    def launch(self, kernel: str, blocks: int, threads: int, shared: int, arguments: Sequence[np.generic]) -> None:
        """Launch `blocks` blocks of `threads` threads, with `shared` bytes of shared memory per block."""
        ...


class GpuSrm:
    """The float32 products of one SRM, with tables computed from the operator's buffers."""

    capturable = True

    def __init__(self, A: Any, how: Plan, launcher: Launcher) -> None:
        self._shape, self._measurements = A.image_shape, A.measurements
        self._how, self._launcher = how, launcher
        device, d = A.rows.device, int(np.prod(A.image_shape))
        self._ints = torch.from_numpy(how.ints).to(device)
        self._floats = torch.from_numpy(how.floats).to(device)
        selected = torch.zeros(d, dtype=torch.bool, device=device)
        selected[A.rows] = True
        words = _words(selected)
        counts = torch.nn.functional.pad(selected, (0, -d % 32)).view(-1, 32).sum(1)
        self._kept = torch.stack([words, (counts.cumsum(0) - counts).to(torch.int32)], 1).contiguous()
        self._signs = None if A.signs is None else _words(A.signs < 0)
        self._perm = None if A.perm is None else A.perm.to(torch.int32)

    def _apply(
        self,
        product: int,
        x: torch.Tensor | None,
        y: torch.Tensor | None,
        weight: float | torch.Tensor = 0.0,
    ) -> torch.Tensor:
        hold(self)
        like = x if x is not None else y
        assert like is not None
        scalar, weights = (
            (0.0, weight.to(like.dtype).contiguous()) if isinstance(weight, torch.Tensor) else (weight, None)
        )
        x, y = (None if t is None else t.contiguous() for t in (x, y))
        active = active_mask(like)
        active = None if active is None else active.contiguous()
        out = like.new_empty((len(like), self._measurements) if product == FORWARD else (len(like), *self._shape))
        scratch = like.new_empty((len(like), *self._shape)) if self._how.scratch and len(like) else None
        tensors = (x, y, weights, out, scratch, active, self._perm, self._signs, self._kept, self._ints, self._floats)
        pointers = [np.uint64(0 if t is None else t.data_ptr()) for t in tensors]
        for launch in self._how.launches[product] if len(like) else ():
            numbers = (np.float32(scalar), np.int32(product), np.int32(launch.part))
            sizes = (launch.blocks * len(like), self._how.threads, launch.shared)
            self._launcher.launch(self._how.kernel, *sizes, (*pointers, *numbers))
        return out

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`A x`, `[B, C, H, W] -> [B, m]`."""
        return self._apply(FORWARD, x, None)

    def adjoint(self, y: torch.Tensor) -> torch.Tensor:
        """`A^T y`."""
        return self._apply(ADJOINT, None, y)

    def normal(self, x: torch.Tensor) -> torch.Tensor:
        """`A^T A x`."""
        return self._apply(NORMAL, x, None)

    def correct(self, x: torch.Tensor, y: torch.Tensor, weight: float | torch.Tensor) -> torch.Tensor:
        """`x_b + weight_b A^T (y_b - A x_b)`, `weight` `[B]` or a number."""
        return self._apply(CORRECT, x, y, weight)


def _words(flags: torch.Tensor) -> torch.Tensor:
    """Flags packed into int32 words of 32 bits, the first flag in the lowest bit."""
    padded = torch.nn.functional.pad(flags, (0, -len(flags) % 32)).view(-1, 32).to(torch.int64)
    words = (padded << torch.arange(32, dtype=torch.int64, device=flags.device)).sum(1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def build(A: Any, limit: int, compiled: Callable[[tuple[str, ...]], Launcher]) -> GpuSrm | None:
    """The kernels of `A` for `limit` bytes of shared memory, from `compiled(options)`; None if `A` is not covered."""
    how = plan(A, limit)
    return None if how is None else GpuSrm(A, how, compiled(how.options))


def find(A: nn.Module, like: torch.Tensor) -> GpuSrm | None:
    """The kernels of the SRM `A` for float32 on its GPU, or None if the PyTorch definition must be used.

    The first call for an operator, and the first after its buffers have changed, compiles (or loads from the cache),
    copies tables to the GPU and synchronizes. A CUDA graph can capture all calls except these.

    Raises
    ------
    BackendUnavailable
        If the source does not compile.
    """
    device = like.device
    if device.type != "cuda" or like.dtype != torch.float32:
        return None

    def make() -> GpuSrm | None:
        if not covers(A):
            return None
        with torch.cuda.device(device):
            built = build(A, nvrtc.shared_limit(device), lambda options: nvrtc.module("srm.cu", options, device))
            # After this, other streams may use the tables, too.
            torch.cuda.current_stream(device).synchronize()
        return built

    return kept(A, make)


_KEPT: WeakKeyDictionary[nn.Module, tuple[Any, GpuSrm | None]] = WeakKeyDictionary()


def covers(A: Any) -> bool:
    """Whether the buffers are valid: rows distinct and ascending, signs +-1, perm a permutation."""
    rows, signs, perm, d = A.rows, A.signs, A.perm, int(np.prod(A.image_shape))
    kinds = [(rows, torch.int64, A.measurements), (signs, torch.int8, d), (perm, torch.int64, d)]
    if any(t is not None and (t.dtype != dtype or t.shape != (n,)) for t, dtype, n in kinds) or rows is None:
        return False
    ascending = bool((rows[1:] > rows[:-1]).all()) and 0 <= int(rows[0]) and int(rows[-1]) < d
    unit_signs = signs is None or bool((signs.abs() == 1).all())
    indices = torch.arange(d, dtype=torch.int64, device=rows.device)
    return ascending and unit_signs and (perm is None or bool((perm.sort().values == indices).all()))


def kept(A: nn.Module, make: Callable[[], GpuSrm | None]) -> GpuSrm | None:
    """The cached result of `make`, computed again if the operator's buffers were replaced or changed."""
    key = srm_key(A)
    cached = _KEPT.get(A)
    if cached is None or cached[0] != key:
        cached = (key, make())
        _KEPT[A] = cached
    return cached[1]
