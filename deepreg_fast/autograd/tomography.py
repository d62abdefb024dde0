"""Parallel-beam projections as a PyTorch custom operator: `A x` and `A^T y`.

Both derivatives of a product are products again, so every order is defined. The operator looks up the backend at run
time, even in compiled code.
"""

from __future__ import annotations

from operator import not_
from typing import Any

import torch

from .. import backend
from ..ambient import full_precision
from ..functional import tomography as definition
from ..functional.tomography import Geometry
from .library import define, differentiate_linear, fold_vmap_dim, unfold_vmap_dim


def project(x: torch.Tensor, geometry: Geometry) -> torch.Tensor:
    """`A x`, `[B, C, H, W] -> [B, C, angles, detectors]`."""
    return _product(x, False, *_numbers(geometry))


def back_project(y: torch.Tensor, geometry: Geometry) -> torch.Tensor:
    """`A^T y`, `[B, C, angles, detectors] -> [B, C, H, W]`."""
    return _product(y, True, *_numbers(geometry))


def _numbers(g: Geometry) -> tuple[list[int], list[float]]:
    return [g.height, g.width, g.detectors], list(g.angles)


def _geometry(sizes: list[int], angles: list[float]) -> Geometry:
    return Geometry(sizes[0], sizes[1], tuple(angles), sizes[2])


@full_precision
def _compute(t: torch.Tensor, adjoint: bool, sizes: list[int], angles: list[float]) -> torch.Tensor:
    geometry, t = _geometry(sizes, angles), t.detach()
    kernels = backend.tomography_kernels(geometry, t)
    if kernels is not None:
        return kernels.back_project(t) if adjoint else kernels.project(t)
    return (definition.back_project if adjoint else definition.project)(t, geometry).contiguous()


def _fake(t: torch.Tensor, adjoint: bool, sizes: list[int], angles: list[float]) -> torch.Tensor:
    return t.new_empty(*t.shape[:2], *(sizes[:2] if adjoint else (len(angles), sizes[2])))


def _vmap(info: Any, in_dims: tuple[Any, ...], t: torch.Tensor, *args: Any) -> tuple[torch.Tensor, int]:
    return unfold_vmap_dim(_product(fold_vmap_dim(t, in_dims[0], info.batch_size), *args), info.batch_size), 0


_product = define("tomography(Tensor t, bool adjoint, int[] sizes, float[] angles) -> Tensor", _compute, _fake, _vmap)
differentiate_linear(_product, not_)
