"""Smoothed total variation on a GPU, by the launches of `kernels/tv.py`. The options of the network do not matter."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn

from ...functional.tv import TvForm
from ...functional.unaltered import dtype_or_device_mismatch
from ...kernels import tv as kernels  # pyright: ignore[reportMissingImports]
from ...kernels.conv_chain.pixel_norm import BLOCK, total  # pyright: ignore[reportMissingImports]
from ..active import active_mask, mask_bytes
from ..reference import ParameterGuard
from .chain_options import DEFAULT, ChainOptions
from .decisions import on
from .graphs import Signature, retry_after_freeing_graphs
from .memory import memory_guard

_EPS = (2.0**-63, 2.0**63)
"""Between these eps^2 is a normal number of float32."""


def unsupported_reason(form: TvForm, x: Tensor) -> str | None:
    """None if the kernels cover this smoothing and these images, else the reason."""
    if (reason := dtype_or_device_mismatch(x)) is not None:
        return reason
    if min(x.shape[1:]) < 1:
        return "the images have no pixels."
    if x.shape[1] not in kernels.TILES:
        return f"it has up to {max(kernels.TILES)} channels, not {x.shape[1]}."
    if not _EPS[0] <= form.eps <= _EPS[1]:
        return f"it has smoothings from {_EPS[0]:.1e} to {_EPS[1]:.1e}; this is {form.eps:.1e}."
    if x.shape[-2] * x.shape[-1] >= 2**31:
        return f"its images have fewer than {2**31} pixels; these are {x.shape[-2]} x {x.shape[-1]}."
    return None


def signature(energy: nn.Module, form: TvForm, options: ChainOptions = DEFAULT) -> Signature:
    """Everything that recorded products of this energy depend on besides their images."""
    return Signature(("tv", form.eps), energy)


def _tiles(x: Tensor) -> int:
    """Programs of an image."""
    th, tw, _ = kernels.TILES[x.shape[1]]
    return -(-x.shape[2] // th) * -(-x.shape[3] // tw)


def _launch(kernel: Any, eps: float, x: Tensor, given: dict[str, Tensor]) -> None:
    """One program for each tile of each image."""
    count, channels, height, width = x.shape
    th, tw, warps = kernels.TILES[channels]
    size = {"height": height, "width": width, "CHANNELS": channels, "TH": th, "TW": tw}
    options = {"num_warps": warps, "num_stages": 1, "enable_fp_fusion": True}
    if count:
        rows = mask_bytes(active_mask(x))
        # eps^2 in float64, which the launch rounds.
        kernel[count * _tiles(x),](x=x, **given, rows=rows, eps=eps, square=eps * eps, **size, **options)


def _add_up(partial: Tensor, value: Tensor) -> None:
    """Sum the tiles' energies of each image in an order that depends only on its size."""
    count, tiles = partial.shape
    if count:
        total[count,](partial, mask_bytes(active_mask(value)), value, tiles, BLOCK=BLOCK, BLOCKS=-(-tiles // BLOCK))


def _gradient(eps: float, x: Tensor) -> tuple[Tensor, Tensor]:
    with memory_guard(x.nbytes + 8 * len(x) * _tiles(x), x.device, f"The gradient of TV of {len(x)} images"):
        value, grad = x.new_empty(len(x)), torch.empty_like(x)
        partial = x.new_empty(len(x), _tiles(x), dtype=torch.float64)
    with on(x):
        _launch(kernels.tv_gradient, eps, x, {"value": partial, "grad": grad})
        _add_up(partial, value)
    return value, grad


@retry_after_freeing_graphs
def value_and_grad(form: TvForm, x: Tensor, options: ChainOptions = DEFAULT) -> tuple[Tensor, Tensor]:
    """`r(x_b)` `[B]` and `grad r(x_b)`, float32, in one sweep."""
    return _gradient(form.eps, x.detach().contiguous())


def linearize(energy: nn.Module, form: TvForm, x: Tensor, options: ChainOptions = DEFAULT) -> GpuTvLinearization:
    """Save what the Hessian at x needs."""
    return GpuTvLinearization(energy, form, x)


class GpuTvLinearization:
    """The Hessian at a point. Only x is saved: a product recomputes `D x / s` and `1 / s`, `s = sqrt(|D x|^2 + eps^2)`,
    whose planes have three times the bytes of x."""

    capturable = True

    @retry_after_freeing_graphs
    def __init__(self, energy: nn.Module, form: TvForm, x: Tensor) -> None:
        self.x = x.detach().contiguous()
        self._eps, self._guard = form.eps, ParameterGuard([])
        self._signature = signature(energy, form)
        self.value, self.grad = _gradient(form.eps, self.x)

    def signature(self) -> Signature:
        """Everything that a recorded `hvp` depends on besides the tensors that `moved` moves."""
        return self._signature

    def moved(self, put: Callable[[Tensor], Tensor]) -> GpuTvLinearization:
        """The same linearization with `put(x)` instead of x."""
        there = copy(self)
        there.x = put(self.x)
        return there

    @retry_after_freeing_graphs
    def hvp(self, v: Tensor) -> Tensor:
        """`hess r(x_b) v_b`."""
        self._guard.check(v, self.x)
        v = v.detach().contiguous()
        with memory_guard(v.nbytes, v.device, f"A product with the Hessian of TV at {len(v)} images"):
            out = torch.empty_like(v)
        with on(v):
            _launch(kernels.tv_hvp, self._eps, self.x, {"v": v, "out": out})
        return out

    def param_vjp(self, v: Tensor) -> dict[str, Tensor]:
        """Empty: smoothed TV has no parameters."""
        self._guard.check(v, self.x)
        return {}
