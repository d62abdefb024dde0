"""Smoothed total variation in C++, for float32 tensors on the CPU (`csrc/cpu/tv.inc`)."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch

from ...functional.unaltered import dtype_or_device_mismatch
from ..reference import ParameterGuard
from .extension import acquire_scratch, extension, instruction_set, plain, release_scratch

if TYPE_CHECKING:
    from ..._cpu import Tv


def eps_of(energy: Any) -> float | None:
    """The smoothing of smoothed TV; None for any other energy."""
    return getattr(energy, "tv_eps", lambda: None)()


@lru_cache(maxsize=16)
def _kernels(channels: int, eps: float, isa: str) -> Tv:
    module, _ = extension()
    assert module is not None
    return module.Tv(channels, eps, isa)


def _size(x: torch.Tensor) -> tuple[int, int, int, int]:
    """Images, height, width, threads."""
    return x.shape[0], x.shape[2], x.shape[3], torch.get_num_threads()


def unsupported_reason(x: torch.Tensor) -> str | None:
    """None for images that the kernels cover."""
    if (reason := dtype_or_device_mismatch(x)) is not None:
        return reason
    return "the images have no pixels." if min(x.shape[1:]) < 1 else None


def _gradient(kernels: Tv, x: torch.Tensor, memory: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    value, grad = x.new_empty(len(x), dtype=torch.float64), torch.empty_like(x)
    kernels.gradient(x, value, grad, memory, *_size(x))
    return value.to(x.dtype), grad


def value_and_grad(eps: float, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`r(x_b)` and `grad r(x_b)` in one sweep."""
    return _gradient(_kernels(x.shape[1], eps, instruction_set()), plain(x))


class CpuTvLinearization:
    """The Hessian at a point: the planes of `D x / s` and `1 / s`, `s = sqrt(|D x|^2 + eps^2)`, in float32.

    Memory: 0.4 MB for a 180 x 180 image.
    """

    def __init__(self, eps: float, x: torch.Tensor) -> None:
        self.x = plain(x)
        self._guard = ParameterGuard([])
        self._kernels = _kernels(x.shape[1], eps, instruction_set())
        self._memory = acquire_scratch(len(x) * self._kernels.kept(*x.shape[2:]))
        self.value, self.grad = _gradient(self._kernels, self.x, self._memory)

    def __del__(self) -> None:
        memory = getattr(self, "_memory", None)
        if memory is not None:
            release_scratch(memory)

    def hvp(self, v: torch.Tensor) -> torch.Tensor:
        """`hess r(x_b) v_b`."""
        self._guard.check(v, self.x)
        v = plain(v)
        out = torch.empty_like(v)
        self._kernels.hvp(v, self._memory, out, *_size(v))
        return out

    def param_vjp(self, v: torch.Tensor) -> dict[str, torch.Tensor]:
        """Empty: smoothed TV has no parameters."""
        self._guard.check(v, self.x)
        return {}
