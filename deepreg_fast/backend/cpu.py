"""The C++ backend: the extension built from `csrc/cpu`, for float32 tensors on the CPU.

It has the conv chain's sweeps (value, gradient, Hessian-vector and parameter product); docs/kernels.md says how.
"""

from __future__ import annotations

import os
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from ..definitions.conv_chain import HEADS, ConvChainForm
from ..errors import BackendUnavailable, InputError
from .reference import Linearization

if TYPE_CHECKING:
    from .._cpu import ConvChain

_MAX_DEPTH = 16


def _extension() -> tuple[ModuleType | None, str]:
    """The compiled module, or None and the reason why it is not here."""
    try:
        from .. import _cpu
    except ImportError as error:
        return None, (
            f"the C++ extension is not here ({error}); install a C++17 compiler (g++ or clang++) and run "
            "'pip install --force-reinstall --no-deps deepreg-fast', or use the backend 'reference', which computes "
            "the same values with torch."
        )
    return _cpu, ""


def instruction_set() -> str:
    """The instruction set in force: that of `DEEPREG_FAST_ISA` if set, else the best of this machine."""
    extension, reason = _extension()
    if extension is None:
        raise BackendUnavailable(reason)
    found = extension.instruction_sets()
    wanted = os.environ.get("DEEPREG_FAST_ISA") or found[0]
    if wanted not in found:
        raise BackendUnavailable(
            f"DEEPREG_FAST_ISA must be one of {found}, what this machine has, but is {wanted!r}; unset or change it."
        )
    return wanted


class CpuLinearization:
    """The Hessian at a point: `SiLU'` and the cotangent times `SiLU''` of every hidden pixel, kept in float32.

    Memory: `8 (depth - 1) C` bytes per pixel, `C` rounded up to a multiple of 16; 8.3 MB for a 180 x 180 image of
    the 3-layer network with 16 channels.
    """

    def __init__(self, energy: nn.Module, form: ConvChainForm, x: torch.Tensor) -> None:
        self.x = x.detach().contiguous()
        self._form = form
        self._params = [p for p in energy.parameters() if p.requires_grad]
        self._versions = [p._version for p in self._params]
        self._names = {id(p): n for n, p in energy.named_parameters()}
        self._chain = _chain(form)
        net = form.net
        padded = -(-_convs(form)[0].out_channels // 16) * 16
        b, _, h, w = x.shape
        self._planes = x.new_empty(b, 2 * (len(net.convs) - 1), h, w, padded)
        self.value, self.grad = _gradient(self._chain, self.x, self._planes)

    def _check(self, v: torch.Tensor) -> torch.Tensor:
        if [p._version for p in self._params] != self._versions:
            raise InputError(
                "The regularizer's parameters must stay as they were at linearize(x), but have changed since; "
                "call linearize(x) again."
            )
        if v.shape != self.x.shape or v.dtype != self.x.dtype or v.device != self.x.device:
            raise InputError(
                f"v must have the shape {list(self.x.shape)} and dtype of x ({self.x.dtype}), "
                f"but has {list(v.shape)} and {v.dtype} on {v.device}."
            )
        return v.detach().contiguous()

    def hvp(self, v: torch.Tensor) -> torch.Tensor:
        """`hess r(x_b) v_b`."""
        v = self._check(v)
        out = torch.empty_like(v)
        self._chain.hvp(v.data_ptr(), self._planes.data_ptr(), out.data_ptr(), *_size(v))
        return out

    def param_vjp(self, v: torch.Tensor) -> dict[str, torch.Tensor]:
        """`sum_b d/dtheta <grad r(x_b), v_b>`, by parameter name."""
        v = self._check(v)
        net = self._form.net
        tensors = [cast(torch.Tensor, p) for conv in _convs(self._form) for p in (conv.weight, conv.bias)]
        flat = torch.zeros(sum(p.numel() for p in tensors), dtype=torch.float64)
        self._chain.param_vjp(self.x.data_ptr(), v.data_ptr(), flat.data_ptr(), *_size(v))
        # The gain is folded into the outer filters: h(u) = net(gain u) / gain.
        scale = [1.0] * len(tensors)
        scale[0] = net.gain
        scale[-2] = scale[-1] = 1.0 / net.gain
        found: dict[str, torch.Tensor] = {}
        parts = torch.split(flat, [p.numel() for p in tensors])
        for p, s, part in zip(tensors, scale, parts, strict=True):
            if p.requires_grad:
                found[self._names[id(p)]] = (s * part).reshape(p.shape).to(p.dtype)
        return found


def _form(energy: Any) -> ConvChainForm:
    """The form of an energy that `why_not` let pass."""
    return energy.conv_chain_form()


def _size(x: torch.Tensor) -> tuple[int, int, int, int]:
    """Images, height, width, threads."""
    return x.shape[0], x.shape[2], x.shape[3], torch.get_num_threads()


def _convs(form: ConvChainForm) -> list[nn.Conv2d]:
    return cast("list[nn.Conv2d]", list(form.net.convs))


def _chain(form: ConvChainForm) -> ConvChain:
    """The chain with its filters packed: microseconds beside a sweep, so nothing can be out of date."""
    extension, _ = _extension()
    assert extension is not None
    weights = [c.weight.detach().contiguous() for c in _convs(form)]
    biases = [cast(torch.Tensor, c.bias).detach().contiguous() for c in _convs(form)]
    return extension.ConvChain(
        [w.data_ptr() for w in weights],
        [b.data_ptr() for b in biases],
        weights[0].shape[0],
        HEADS.index(form.head),
        form.alpha,
        form.center,
        form.net.gain,
        instruction_set(),
    )


def _gradient(chain: ConvChain, x: torch.Tensor, planes: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    value = torch.empty(x.shape[0], dtype=torch.float64)
    grad = torch.empty_like(x)
    address = 0 if planes is None else planes.data_ptr()
    chain.gradient(x.data_ptr(), value.data_ptr(), grad.data_ptr(), address, *_size(x))
    return value.to(x.dtype), grad


class CpuBackend:
    """Value and derivatives of the conv chain by the C++ sweeps; everything else goes to the reference."""

    name = "cpu"
    batch_invariant = True

    def unavailable(self) -> str | None:
        """None if the extension is built, else the reason."""
        extension, reason = _extension()
        return reason if extension is None else None

    def why_not(self, energy: nn.Module, x: torch.Tensor) -> str | None:
        """None for a conv chain in float32 on the CPU that the kernels cover."""
        form: ConvChainForm | None = getattr(energy, "conv_chain_form", lambda: None)()
        if form is None:
            return f"it has kernels for the conv chain (RED) only, not for {type(energy).__name__}."
        if x.device.type != "cpu" or x.dtype != torch.float32:
            return f"it takes float32 tensors on the CPU, not {x.dtype} on {x.device}."
        net = form.net
        if net.norm != "none" or net.kernel_size != 3 or net.image_channels != 1 or len(net.convs) > _MAX_DEPTH:
            return (
                f"it has 3 x 3 filters, one image channel, no LayerNorm and depth up to {_MAX_DEPTH}, but the network "
                f"has {net.kernel_size} x {net.kernel_size}, {net.image_channels}, {net.norm!r} and {len(net.convs)}."
            )
        if min(x.shape[-2:]) < 3:
            return "the images are smaller than a filter."
        return None

    def value_and_grad(self, energy: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`r(x_b)` and `grad r(x_b)` in one sweep."""
        return _gradient(_chain(_form(energy)), x.detach().contiguous(), None)

    def linearize(self, energy: nn.Module, x: torch.Tensor) -> Linearization:
        """Keeps what the Hessian at x needs."""
        return CpuLinearization(energy, _form(energy), x)
