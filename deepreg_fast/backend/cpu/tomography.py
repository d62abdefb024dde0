"""Parallel-beam projections in C++, for float32 tensors on the CPU (`csrc/cpu/tomography.inc`)."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import torch

from .extension import extension, plain

if TYPE_CHECKING:
    from ...functional.tomography import Geometry


class CpuTomography:
    """The C++ products of one geometry. A plane's bits depend neither on its neighbors nor on the threads."""

    def __init__(self, geometry: Geometry, isa: str) -> None:
        module, _ = extension()
        assert module is not None
        g = self._geometry = geometry
        self._kernels = module.Tomography(g.height, g.width, g.detectors, [tuple(r) for r in g.rays()], isa)

    def project(self, x: torch.Tensor) -> torch.Tensor:
        """`A x`, `[B, C, H, W] -> [B, C, angles, detectors]`."""
        out = x.new_empty(*x.shape[:2], len(self._geometry.angles), self._geometry.detectors)
        self._kernels.forward(plain(x), out, x.shape[0] * x.shape[1], torch.get_num_threads())
        return out

    def back_project(self, y: torch.Tensor) -> torch.Tensor:
        """`A^T y`, `[B, C, angles, detectors] -> [B, C, H, W]`."""
        out = y.new_empty(*y.shape[:2], self._geometry.height, self._geometry.width)
        self._kernels.adjoint(plain(y), out, y.shape[0] * y.shape[1], torch.get_num_threads())
        return out


@lru_cache(maxsize=16)
def kernels(geometry: Geometry, isa: str) -> CpuTomography:
    """The products of a geometry; the last few are stored."""
    return CpuTomography(geometry, isa)
