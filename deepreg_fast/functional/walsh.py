"""The Walsh-Hadamard transform in power-of-two blocks (docs/math.md, M3)."""

from __future__ import annotations

import torch

from ..checks import plain
from ..errors import InputError


def block_size(d: int, block: int | None = None) -> int:
    """`block` if it is a power of two that divides d; if None, the largest such number."""
    largest = d & -d
    if block is None:
        return largest
    size = plain(block)
    if isinstance(size, bool) or not isinstance(size, int) or size < 1 or size & (size - 1) or d % size:
        raise InputError(
            f"The Walsh-Hadamard block must be a power of two that divides d = {d} (<= {largest}), but is {block!r}."
        )
    return size


def walsh_blocks(v: torch.Tensor, block: int) -> torch.Tensor:
    """Orthonormal, symmetric Walsh-Hadamard transform of consecutive blocks of `v` `[B, d]`, with butterflies."""
    shape = v.shape
    h = 1
    while h < block:
        pairs = v.reshape(shape[0], shape[1] // (2 * h), 2, h)
        v = torch.stack((pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]), dim=2)
        h *= 2
    return v.reshape(shape) * block**-0.5
