"""Parameters and buffers of a deepinv physics."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn


def tensors(physics: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers of the forward operator by name; those of its noise are left out."""
    named = [*physics.named_parameters(), *physics.named_buffers()]
    skip = ("noise_model.", "sensor_model.")
    return {n: t for n, t in named if not any(s in f"{n}." for s in skip) and not n.endswith("_device_holder")}


def dtype_of(physics: nn.Module) -> torch.dtype | None:
    """The real dtype in which a physics computes; None if it has no parameters in a float dtype."""
    for t in tensors(physics).values():
        if t.is_complex():
            return torch.float64 if t.dtype == torch.complex128 else torch.float32
        if t.dtype in (torch.float32, torch.float64):
            return t.dtype
    return None


def select_images(module: nn.Module, idx: torch.Tensor, batch: int) -> nn.Module:
    """A copy of a physics with the parameters of the images `idx`: those tensors whose first dimension is `batch`."""
    part = copy.copy(module)
    part.__dict__ = dict(module.__dict__)
    part._buffers = {
        n: b[idx] if b is not None and b.ndim > 2 and len(b) == batch else b for n, b in module._buffers.items()
    }
    part._modules = {n: None if m is None else select_images(m, idx, batch) for n, m in module._modules.items()}
    return part


def batch_sizes(physics: Any) -> set[int]:
    """The numbers of images for which a physics may have parameters of their own."""
    return {len(t) for t in tensors(physics).values() if t.ndim > 2 and len(t) > 1}
