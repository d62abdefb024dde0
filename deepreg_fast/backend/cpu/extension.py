"""The C++ extension of `csrc/cpu`, the instruction set that it runs with, and memory lent to its sweeps."""

from __future__ import annotations

import torch

from ...machine import extension, instruction_set

__all__ = ["acquire_scratch", "extension", "release_scratch", "instruction_set"]

# The memory of the linearization that died last: fresh pages cost as much as the sweep that fills them.
_SPARE: list[torch.Tensor] = []


def acquire_scratch(count: int) -> torch.Tensor:
    """Uninitialized floats: the spare ones if they are enough and not far too many, else new ones."""
    try:
        spare = _SPARE.pop()
    except IndexError:
        return _fresh(count)
    return spare if count <= spare.numel() <= 4 * count else _fresh(count)


def _fresh(count: int) -> torch.Tensor:
    return torch.empty(count, dtype=torch.float32, device="cpu")


def plain(t: torch.Tensor) -> torch.Tensor:
    """The same numbers in memory of their own order, for a kernel to read."""
    return t.detach().resolve_neg().contiguous()


def release_scratch(memory: torch.Tensor) -> None:
    """The next `acquire_scratch` may have this memory."""
    _SPARE[:] = [memory]
