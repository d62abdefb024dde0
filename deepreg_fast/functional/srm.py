"""The products of the structurally random matrix `A = D F R` in plain torch (docs/math.md, M3)."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from torch import nn

from . import dct, hadamard, walsh


class SrmLike(Protocol):
    """The attributes of an operator that the products need."""

    image_shape: tuple[int, int, int]
    transform: str
    block: int | None
    rows: torch.Tensor
    signs: torch.Tensor | None
    perm: torch.Tensor | None


class SrmForm(nn.Module):
    """An SRM reduced to its buffers and its description, as kernels need it."""

    def __init__(
        self,
        buffers: tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None],
        image_shape: tuple[int, int, int],
        transform: str,
        block: int | None,
    ) -> None:
        super().__init__()
        self.image_shape, self.transform, self.block = image_shape, transform, block
        self.measurements = len(buffers[0])
        for name, buffer in zip(("rows", "signs", "perm"), buffers, strict=True):
            self.register_buffer(name, buffer)
        self.rows: torch.Tensor
        self.signs: torch.Tensor | None
        self.perm: torch.Tensor | None


def transform(A: SrmLike, v: torch.Tensor) -> torch.Tensor:
    """`F v`, `[B, d] -> [B, d]`."""
    if A.transform == "walsh":
        assert A.block is not None
        return walsh.walsh_blocks(v, A.block)
    x = v.reshape(-1, *A.image_shape)
    return (dct.dct2(x) if A.transform == "dct" else hadamard.hadamard2(x)).flatten(1)


def inverse(A: SrmLike, v: torch.Tensor) -> torch.Tensor:
    """`F^T v`; the Walsh-Hadamard blocks are symmetric."""
    if A.transform == "walsh":
        return transform(A, v)
    x = v.reshape(-1, *A.image_shape)
    return (dct.idct2(x) if A.transform == "dct" else hadamard.ihadamard2(x)).flatten(1)


def forward(A: SrmLike, x: torch.Tensor) -> torch.Tensor:
    """`A x`, `[B, C, H, W] -> [B, m]`."""
    v = x.flatten(1)
    if A.perm is not None:
        v = v[:, A.perm]
    if A.signs is not None:
        v = v * A.signs.to(v.dtype)
    return transform(A, v)[:, A.rows]


def adjoint(A: SrmLike, y: torch.Tensor) -> torch.Tensor:
    """`A^T y`."""
    full = y.new_zeros(len(y), int(np.prod(A.image_shape))).index_copy(1, A.rows, y)
    v = inverse(A, full)
    if A.signs is not None:
        v = v * A.signs.to(v.dtype)
    if A.perm is not None:
        v = torch.zeros_like(v).index_copy(1, A.perm, v)
    return v.reshape(-1, *A.image_shape)
