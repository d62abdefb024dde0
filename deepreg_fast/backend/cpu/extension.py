"""The C++ extension of `csrc/cpu`, its instruction set, and scratch memory for its sweeps."""

from __future__ import annotations

import torch

from ...machine import extension, instruction_set

__all__ = ["acquire_scratch", "extension", "release_scratch", "instruction_set"]

# The memory of the last deleted linearization: fresh pages cost as much as the sweep that fills them.
_SPARE: list[torch.Tensor] = []


def acquire_scratch(count: int) -> torch.Tensor:
    """Uninitialized floats: the spare memory if it is large enough and at most 4 times too large, else new memory."""
    try:
        spare = _SPARE.pop()
    except IndexError:
        return _fresh(count)
    return spare if count <= spare.numel() <= 4 * count else _fresh(count)


def _fresh(count: int) -> torch.Tensor:
    return torch.empty(count, dtype=torch.float32, device="cpu")


def plain(t: torch.Tensor) -> torch.Tensor:
    """The same values, detached, contiguous and without lazy negation, for a kernel to read."""
    return t.detach().resolve_neg().contiguous()


def release_scratch(memory: torch.Tensor) -> None:
    """Return this memory to the next `acquire_scratch`."""
    _SPARE[:] = [memory]
