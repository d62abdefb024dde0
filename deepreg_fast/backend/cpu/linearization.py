"""Base class of the C++ linearizations: a gradient fills the saved planes, and Hessian-vector products read them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..reference import ParameterGuard
from .extension import acquire_scratch, plain, release_scratch


def sizes(x: torch.Tensor) -> tuple[int, int, int, int]:
    """Images, height, width, threads."""
    return x.shape[0], x.shape[2], x.shape[3], torch.get_num_threads()


def gradient(kernels: Any, x: torch.Tensor, memory: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """`r(x_b)` and `grad r(x_b)` in one sweep, which saves the planes of the Hessian in `memory`."""
    value, grad = x.new_empty(len(x), dtype=torch.float64), torch.empty_like(x)
    kernels.gradient(x, value, grad, memory, *sizes(x))
    return value.to(x.dtype), grad


class CpuLinearization:
    """The Hessian at a point, from planes in scratch memory that the next linearization reuses.

    `count` is the number of saved floats; `params` are the parameters that must not change.
    """

    def __init__(self, x: torch.Tensor, kernels: Any, count: int, params: list[nn.Parameter]) -> None:
        self.x = plain(x)
        self._kernels, self._guard = kernels, ParameterGuard(params)
        self._memory = acquire_scratch(count)
        self.value, self.grad = gradient(kernels, self.x, self._memory)

    def __del__(self) -> None:
        memory = getattr(self, "_memory", None)
        if memory is not None:
            release_scratch(memory)

    def _check(self, v: torch.Tensor) -> torch.Tensor:
        self._guard.check(v, self.x)
        return plain(v)

    def _product(self, v: torch.Tensor, out: torch.Tensor) -> None:
        self._kernels.hvp(v, self._memory, out, *sizes(v))

    def hvp(self, v: torch.Tensor) -> torch.Tensor:
        """`hess r(x_b) v_b`."""
        v = self._check(v)
        out = torch.empty_like(v)
        self._product(v, out)
        return out
