"""The ridge energy in C++, for float32 tensors on the CPU (`csrc/cpu/ridge.inc`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from ...ambient import outside_inference
from ...functional.ridge import RidgeForm, RidgeNet
from ...functional.unaltered import dtype_or_device_mismatch
from .extension import extension, instruction_set, plain
from .linearization import CpuLinearization, gradient, sizes

if TYPE_CHECKING:
    from ..._cpu import Ridge

_MAX_SIDE = 15


def unsupported_reason(form: RidgeForm, x: torch.Tensor) -> str | None:
    """None for images and filters that the kernels cover."""
    if (reason := dtype_or_device_mismatch(x, form.net)) is not None:
        return reason
    if min(x.shape[-2:]) < 1:
        return "the images have no pixels."
    side = form.net.filters.shape[-1]
    if side > _MAX_SIDE:
        return f"it has filters up to {_MAX_SIDE} x {_MAX_SIDE}; these are {side} x {side}."
    if x.shape[1] != form.net.filters.shape[1]:
        return f"the images have {x.shape[1]} channels, but the filters take {form.net.filters.shape[1]}."
    return None


_MADE: WeakKeyDictionary[nn.Module, tuple[Any, list[torch.Tensor], Ridge]] = WeakKeyDictionary()


def _kernels(form: RidgeForm) -> Ridge:
    """The kernels with copies of the filters and coefficients, rebuilt only if a parameter's value has changed."""
    net = form.net
    key = (float(form.center), instruction_set(), net.convex, net.zero_mean, tuple(net.scales))
    cached = _MADE.get(net)
    if cached is None or cached[0] != key or not all(map(torch.equal, cached[1], net.parameters())):
        values = [p.detach().clone() for p in net.parameters()]
        cached = (key, values, _make(net, *key[:2]))
        _MADE[net] = cached
    return cached[2]


def _make(net: RidgeNet, center: float, isa: str) -> Ridge:
    module, _ = extension()
    assert module is not None
    with torch.no_grad():
        w, c = (plain(t) for t in net.numbers())
    s = w.new_tensor(net.scales)
    return module.Ridge(*w.shape[:3], len(s), center, w, c, s, isa)


def value_and_grad(form: RidgeForm, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`r(x_b)` and `grad r(x_b)` in one sweep."""
    return gradient(_kernels(form), plain(x))


def linearize(energy: nn.Module, form: RidgeForm, x: torch.Tensor) -> CpuRidgeLinearization:
    """Save what the Hessian at x needs."""
    return CpuRidgeLinearization(energy, form, x)


class CpuRidgeLinearization(CpuLinearization):
    """The Hessian at a point, `W^T diag(psi'') W`: the planes psi''(W_i * u), in float32.

    Memory: 4.2 MB for a 180 x 180 image and 32 filters.
    """

    def __init__(self, energy: nn.Module, form: RidgeForm, x: torch.Tensor) -> None:
        self._net = form.net
        self._names = {id(p): n for n, p in energy.named_parameters() if p.requires_grad}
        self._params = [p for p in energy.parameters() if p.requires_grad]
        kernels = _kernels(form)
        super().__init__(x, kernels, len(x) * kernels.saved_floats(*x.shape[2:]), self._params)

    @outside_inference
    def param_vjp(self, v: torch.Tensor) -> dict[str, torch.Tensor]:
        """`sum_b d/dtheta <grad r(x_b), v_b>`, by parameter name.

        The kernels differentiate by filters and coefficients, and autograd from these to the parameters.
        """
        v = self._check(v)
        if not self._params:
            return {}
        with torch.enable_grad():
            w, c = self._net.numbers()
        dw, dc = (v.new_empty(t.shape, dtype=torch.float64) for t in (w, c))
        self._kernels.param_vjp(self.x, v, dw, dc, *sizes(v))
        pairs = [(t, d.to(t.dtype)) for t, d in ((w, dw), (c, dc)) if t.requires_grad]
        grads = torch.autograd.grad([t for t, _ in pairs], self._params, [d for _, d in pairs], allow_unused=True)
        return {
            self._names[id(p)]: torch.zeros_like(p) if g is None else g
            for p, g in zip(self._params, grads, strict=True)
        }
