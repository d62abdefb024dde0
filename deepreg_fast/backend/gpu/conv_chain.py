"""The conv chain on a GPU: value and gradient, and the linearization, with the sweeps of `pixel_norm.py`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from itertools import chain
from typing import cast

import torch
from torch import Tensor, nn

from ...ambient import full_precision
from ...functional.conv_chain import ConvChainForm, layers_of
from ...functional.unaltered import dtype_or_device_mismatch
from ..reference import Gradients, ParameterGuard, unsupported_norm_position
from . import fused_chain
from .chain_options import DEFAULT, ChainOptions, convs_of, norms_of
from .graphs import Signature, places_of, retry_after_freeing_graphs
from .pixel_norm import Sweeps

_MAX_CHANNELS = 64


def unsupported_reason(form: ConvChainForm, x: Tensor) -> str | None:
    """None if the kernels cover this network and these images, otherwise the reason."""
    net, convs = form.net, convs_of(form)
    if (reason := dtype_or_device_mismatch(x, *chain.from_iterable(layers_of(net)))) is not None:
        return reason
    if x.shape[1] != net.image_channels:
        return f"the images have {x.shape[1]} channels, but the network takes {net.image_channels}."
    if net.kernel_size != 3 or net.image_channels != 1 or convs[0].out_channels > _MAX_CHANNELS:
        return (
            f"it has 3 x 3 filters, one image channel and up to {_MAX_CHANNELS} channels; this is "
            f"{net.kernel_size} x {net.kernel_size}, {net.image_channels} and {convs[0].out_channels}."
        )
    if min(x.shape[-2:]) < 3:
        return "the images are smaller than a filter."
    if x.shape[-2] * x.shape[-1] * _MAX_CHANNELS >= 2**31:
        return f"its images have fewer than {2**31 // _MAX_CHANNELS} pixels; these are {x.shape[-2]} x {x.shape[-1]}."
    return unsupported_norm_position(form)


def signature(energy: nn.Module, form: ConvChainForm, options: ChainOptions = DEFAULT) -> Signature:
    """Everything that recorded products of this energy depend on: the launches' numbers and the parameters' addresses.

    The parameters' values do not matter: a gradient's graph packs them at every replay, and those of a linearization
    are copied to its graph.
    """
    net = form.net
    eps = tuple(float(m.eps) for m in norms_of(form))
    numbers = (form.head, float(form.alpha), float(form.center), net.norm, net.norm_place, float(net.gain), eps)
    memory = tuple(p.detach() for p in energy.parameters())
    return Signature((len(net.convs), *numbers, options, places_of(memory)), energy, memory)


@retry_after_freeing_graphs
@full_precision
def value_and_grad(form: ConvChainForm, x: Tensor, options: ChainOptions = DEFAULT) -> tuple[Tensor, Tensor]:
    """`r(x_b)` `[B]` and `grad r(x_b)` `[B, 1, H, W]`, float32."""
    with _on(x.device):
        fused = fused_chain.value_and_grad(form, x, options)
        return _sweeps(form, x, options).gradient() if fused is None else fused


def linearize(energy: nn.Module, form: ConvChainForm, x: Tensor, options: ChainOptions = DEFAULT) -> GpuLinearization:
    """Save the activations that the Hessian at x needs."""
    return GpuLinearization(energy, form, x, options)


class GpuLinearization:
    """The Hessian at a point.

    It saves the output of each hidden layer's convolution except the first, the cotangent of each SiLU's output except
    the last, and, for heads other than red, the cotangent of h. With a LayerNorm over the image it saves all of them.

    Memory: `8 CP (depth - 2) + 4` bytes per pixel, and 4 more for heads other than red: 4.3 MB for a 180 x 180 image of
    the 3-layer network with 16 channels, besides x and the gradient. With a LayerNorm over the image:
    `8 CP (depth - 1) + 8`.
    """

    capturable = True

    @retry_after_freeing_graphs
    @full_precision
    def __init__(self, energy: nn.Module, form: ConvChainForm, x: Tensor, options: ChainOptions = DEFAULT) -> None:
        self.x = x.detach().contiguous()
        tensors = [cast(Tensor, p) for m in (*convs_of(form), *norms_of(form)) for p in (m.weight, m.bias)]
        self._gradients = Gradients(energy, tensors)
        self._guard = ParameterGuard([p for p in energy.parameters() if p.requires_grad])
        self._signature = signature(energy, form, options)
        with _on(x.device):
            self._sweeps = _sweeps(form, x, options)
            self._kept = self._sweeps.allocate_saved()
            fused = fused_chain.value_and_grad(form, self.x, options, self._kept)
            self.value, self.grad = self._sweeps.gradient(self._kept) if fused is None else fused
            self._fused = fused_chain.hvp(form, self.x, options, self._kept)

    def signature(self) -> Signature:
        """Everything that a recorded `hvp` depends on besides the tensors that `moved` replaces."""
        return self._signature

    def moved(self, put: Callable[[Tensor], Tensor]) -> GpuLinearization:
        """A copy of the linearization whose `hvp` reads `put(t)` instead of each tensor t."""
        replaced: dict[int, Tensor] = {}

        def once(t: Tensor) -> Tensor:
            # The point may be one of the saved tensors.
            if id(t) not in replaced:
                replaced[id(t)] = put(t)
            return replaced[id(t)]

        moved = copy(self)
        moved._sweeps, moved._kept = self._sweeps.moved(once), self._kept.each(once)
        moved._fused = None if self._fused is None else self._fused.moved(once)
        return moved

    def _check(self, v: Tensor) -> Tensor:
        self._guard.check(v, self.x)
        return v.detach().contiguous()

    @retry_after_freeing_graphs
    @full_precision
    def hvp(self, v: Tensor) -> Tensor:
        """`hess r(x_b) v_b`."""
        v = self._check(v)
        with _on(v.device):
            return self._sweeps.product(self._kept, v) if self._fused is None else self._fused.product(v)

    @retry_after_freeing_graphs
    @full_precision
    def param_vjp(self, v: Tensor) -> dict[str, Tensor]:
        """`sum_b d/dtheta <grad r(x_b), v_b>`, by parameter name, summed in float64."""
        v = self._check(v)
        with _on(v.device):
            parts = self._sweeps.parameters(self._kept, v)
        return self._gradients.by_name(parts)


def _sweeps(form: ConvChainForm, x: Tensor, options: ChainOptions) -> Sweeps:
    from .image_norm import WholeSweeps

    return (WholeSweeps if form.net.norm == "image" else Sweeps)(form, x, options)


def _on(device: torch.device) -> AbstractContextManager[object]:
    """Make `device` current: Triton launches on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
