"""The conv chain in C++, for float32 tensors on the CPU (`csrc/cpu/conv_chain.h`)."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import nn

from ...functional.conv_chain import HEADS, ChannelNorm, ConvChainForm, layers_of
from ...functional.unaltered import dtype_or_device_mismatch
from ..reference import Gradients, unsupported_norm_position
from .extension import extension, instruction_set, plain
from .linearization import CpuLinearization, gradient, sizes

if TYPE_CHECKING:
    from ..._cpu import ConvChain

_MAX_DEPTH = 16


def unsupported_reason(form: ConvChainForm, x: torch.Tensor) -> str | None:
    """None for images and networks that the kernels cover."""
    net = form.net
    if (reason := dtype_or_device_mismatch(x, *chain.from_iterable(layers_of(net)))) is not None:
        return reason
    if x.shape[1] != net.image_channels:
        return f"the images have {x.shape[1]} channels, but the network takes {net.image_channels}."
    if net.kernel_size != 3 or net.image_channels != 1 or len(net.convs) > _MAX_DEPTH:
        return (
            f"it has 3 x 3 filters, one image channel and depth up to {_MAX_DEPTH}; this is "
            f"{net.kernel_size} x {net.kernel_size}, {net.image_channels} and {len(net.convs)}."
        )
    if min(x.shape[-2:]) < 3:
        return "the images are smaller than a filter."
    return unsupported_norm_position(form)


def value_and_grad(form: ConvChainForm, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`r(x_b)` and `grad r(x_b)` in one sweep."""
    return gradient(_chain(form), plain(x))


def linearize(energy: nn.Module, form: ConvChainForm, x: torch.Tensor) -> ConvChainLinearization:
    """Save the activations that the Hessian at x needs."""
    return ConvChainLinearization(energy, form, x)


class ConvChainLinearization(CpuLinearization):
    """The Hessian at a point: SiLU's inputs and the cotangents of its outputs at the hidden pixels, in float32, except
    those that a one-channel convolution recomputes (docs/kernels.md).

    Memory: 5.1 MB for a 180 x 180 image of the 3-layer network with 16 channels and LayerNorm.
    """

    def __init__(self, energy: nn.Module, form: ConvChainForm, x: torch.Tensor) -> None:
        self._tensors = [p for m in (*_convs(form), *_norms(form)) for p in (m.weight, cast(torch.Tensor, m.bias))]
        self._last, self._gain = 2 * len(_convs(form)) - 2, float(form.net.gain)
        self._centered = form.net.norm == "pixel"
        self._gradients = Gradients(energy, self._tensors)
        kernels = _chain(form)
        params = [p for p in energy.parameters() if p.requires_grad]
        super().__init__(x, kernels, kernels.saved_floats(*sizes(x)[:3]), params)

    def _product(self, v: torch.Tensor, out: torch.Tensor) -> None:
        self._kernels.hvp(self.x, v, self._memory, out, *sizes(v))

    def param_vjp(self, v: torch.Tensor) -> dict[str, torch.Tensor]:
        """`sum_b d/dtheta <grad r(x_b), v_b>`, by parameter name."""
        v = self._check(v)
        lengths = [p.numel() for p in self._tensors]
        flat = v.new_empty(sum(lengths), dtype=torch.float64)
        self._kernels.param_vjp(self.x, v, self._memory, flat, *sizes(v))
        parts = [t.view(p.shape) for p, t in zip(self._tensors, flat.split(lengths), strict=True)]
        # The gain is folded into the outer filters: h(u) = net(gain u) / gain.
        parts[0] *= self._gain
        parts[self._last] /= self._gain
        parts[self._last + 1] /= self._gain
        if self._centered:
            # The kernels' filters are centered over their outputs (csrc/cpu/conv.h); this is the chain rule through it.
            for part in parts[: self._last]:
                part -= part.mean(0, keepdim=True)
        return self._gradients.by_name(parts)


def _convs(form: ConvChainForm) -> list[nn.Conv2d]:
    return cast("list[nn.Conv2d]", list(form.net.convs))


def _norms(form: ConvChainForm) -> list[ChannelNorm]:
    return cast("list[ChannelNorm]", list(form.net.norms)) if form.net.norm != "none" else []


_PACKED: WeakKeyDictionary[nn.Module, tuple[Any, ConvChain]] = WeakKeyDictionary()


def _chain(form: ConvChainForm) -> ConvChain:
    """The chain with packed filters. They are packed again only if a comparison shows that a value has changed."""
    module, _ = extension()
    assert module is not None
    convs, norms = _convs(form), _norms(form)
    tensors = [
        [plain(cast(torch.Tensor, p)) for p in parameters]
        for parameters in (
            [c.weight for c in convs],
            [c.bias for c in convs],
            [n.weight for n in norms],
            [n.bias for n in norms],
        )
    ]
    settings = (
        convs[0].out_channels,
        HEADS.index(form.head),
        float(form.alpha),
        float(form.center),
        float(form.net.gain),
        float(norms[0].eps) if norms else 0.0,
        form.net.norm == "image",
        instruction_set(),
    )
    cached = _PACKED.get(form.net)
    if cached is None or cached[0] != (len(convs), settings) or not cached[1].current(*tensors):
        cached = ((len(convs), settings), module.ConvChain(*tensors, *settings))
        _PACKED[form.net] = cached
    return cached[1]
