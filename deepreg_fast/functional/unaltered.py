"""Checks that a module still computes its class's definition, on which kernels that read its weights rely.

Hooks, parametrizations (`weight_norm`, `spectral_norm`, pruning), replaced layers and changed settings make a module
compute something else with the same weights, or the same with other parameters.
"""

from __future__ import annotations

from numbers import Real
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as _module

_GLOBAL = [getattr(_module, f"_global_{kind}_hooks") for kind in ("forward", "forward_pre", "backward", "backward_pre")]


# These run before every product, so they read the modules' dictionaries directly.


def alteration(m: object, kind: type[nn.Module], parameters: tuple[str, ...] = ()) -> str | None:
    """None if `m` is exactly a `kind` with exactly these parameters, otherwise the difference."""
    if type(m) is not kind:
        return f"{type(m).__name__} in the place of {kind.__name__}"
    attributes = m.__dict__
    if "forward" in attributes or "_conv_forward" in attributes or "numbers" in attributes:
        return f"a {kind.__name__} with a method replaced"
    stored = attributes["_parameters"]
    if len(stored) != len(parameters):
        return f"a {kind.__name__} whose parameters are not {', '.join(parameters) or 'none'}"
    for name in parameters:
        if name in attributes or type(stored.get(name)) not in (nn.Parameter, torch.Tensor):
            return f"a {kind.__name__} whose {name} is no parameter of its own"
    return None


def hook_on(*modules: nn.Module) -> str | None:
    """None if these modules have no hooks, which may change their results; otherwise the reason."""
    for hooks in _GLOBAL:
        if hooks:
            return "hooks of all modules"
    for m in modules:
        attributes = m.__dict__
        if (
            attributes["_forward_hooks"]
            or attributes["_forward_pre_hooks"]
            or attributes["_backward_hooks"]
            or attributes["_backward_pre_hooks"]
        ):
            return f"hooks of {type(m).__name__}"
    return None


def plain_numbers(*values: Any) -> bool:
    """Whether all are plain numbers, not tensors that autograd might track."""
    return all(type(v) is float or (isinstance(v, Real) and not isinstance(v, bool)) for v in values)


def dtype_or_device_mismatch(x: torch.Tensor, *modules: nn.Module) -> str | None:
    """None if all direct parameters of these modules have the dtype and device of `x`, and kernels can read `x`'s
    memory; otherwise the reason."""
    dtype, device = x.dtype, x.device
    for m in modules:
        for p in m.__dict__["_parameters"].values():
            if p.dtype != dtype or p.device != device:
                return f"the images are {dtype} on {device}, but a parameter is {p.dtype} on {p.device}."
    if x.layout != torch.strided:
        return "the images' memory does not hold their values as they are."
    return None
