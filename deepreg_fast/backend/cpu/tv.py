"""Smoothed total variation in C++, for float32 tensors on the CPU (`csrc/cpu/tv.inc`)."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import nn

from ...functional.tv import TvForm
from ...functional.unaltered import dtype_or_device_mismatch
from .extension import extension, instruction_set, plain
from .linearization import CpuLinearization, gradient

if TYPE_CHECKING:
    from ..._cpu import Tv


_MAX_CHANNELS = 4


@lru_cache(maxsize=16)
def _kernels(channels: int, eps: float, isa: str) -> Tv:
    module, _ = extension()
    assert module is not None
    return module.Tv(channels, eps, isa)


def unsupported_reason(form: TvForm, x: torch.Tensor) -> str | None:
    """None for images that the kernels cover."""
    if (reason := dtype_or_device_mismatch(x)) is not None:
        return reason
    if min(x.shape[1:]) < 1:
        return "the images have no pixels."
    return None if x.shape[1] <= _MAX_CHANNELS else f"it has up to {_MAX_CHANNELS} channels, not {x.shape[1]}."


def value_and_grad(form: TvForm, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`r(x_b)` and `grad r(x_b)` in one sweep."""
    return gradient(_kernels(x.shape[1], form.eps, instruction_set()), plain(x))


def linearize(energy: nn.Module, form: TvForm, x: torch.Tensor) -> CpuTvLinearization:
    """Save what the Hessian at x needs."""
    return CpuTvLinearization(form, x)


class CpuTvLinearization(CpuLinearization):
    """The Hessian at a point: the planes of `D x / s` and `1 / s`, `s = sqrt(|D x|^2 + eps^2)`, in float32.

    Memory: 0.4 MB for a gray 180 x 180 image, 0.9 MB for a color one.
    """

    def __init__(self, form: TvForm, x: torch.Tensor) -> None:
        kernels = _kernels(x.shape[1], form.eps, instruction_set())
        super().__init__(x, kernels, len(x) * kernels.saved_floats(*x.shape[2:]), [])

    def param_vjp(self, v: torch.Tensor) -> dict[str, torch.Tensor]:
        """Empty: smoothed TV has no parameters."""
        self._check(v)
        return {}
