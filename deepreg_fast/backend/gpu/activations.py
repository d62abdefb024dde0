"""The tensors between the kernels of the conv chain's sweeps on a GPU, and arguments of their launches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

Planes = dict[int, Tensor]
"""`[B, H, W, CP]` by the layer's number."""


@dataclass(frozen=True)
class SavedActivations:
    """Tensors of the gradient's sweep that the products need: `z[l]`, l = 2..K, `g[l]`, l = 1..K - 1, and the image c
    `[B, H, W]`, which is u for the head red (the kernels halve it)."""

    z: Planes
    g: Planes
    c: Tensor

    def each(self, f: Callable[[Tensor], Tensor]) -> SavedActivations:
        """A copy with each tensor t replaced by `f(t)`."""
        z, g = ({layer: f(t) for layer, t in planes.items()} for planes in (self.z, self.g))
        return SavedActivations(z, g, f(self.c))

    def of(self, part: slice) -> SavedActivations:
        """The activations of a part of the batch."""
        return self.each(lambda t: t[part])


@dataclass(frozen=True)
class Chunk:
    """A part of the batch, and memory for its sweep.

    `pair`: planes that alternate between layers, `pair[l % 2]` for layer l; `own`: planes of one layer each.
    """

    where: slice
    rows: Tensor | None
    u: Tensor
    kept: SavedActivations
    pair: list[Tensor]
    own: list[Tensor]
    h_taps: Tensor
    g_taps: Tensor
    image: Tensor


def aligned(t: Tensor) -> Tensor:
    """A tensor aligned to 16 bytes: for other tensors Triton compiles kernels with different loads."""
    return t.clone() if t.data_ptr() % 16 else t


def over_rows(t: Tensor, rows: Tensor | None) -> Tensor:
    """`t` with zeros for inactive images, whose values are undefined."""
    return t if rows is None else torch.where(rows.view(-1, *[1] * (t.dim() - 1)), t, 0.0)


@lru_cache(maxsize=64)
def absent_arguments(kernel: Any) -> dict[str, None]:
    """The non-constant arguments of a kernel, all None."""
    return dict.fromkeys(n for n in kernel.arg_names if not n.isupper())
