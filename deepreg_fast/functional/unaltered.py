"""Whether a module still computes what its class says: what kernels that read its weights rely on.

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


# Asked before every product, so these look into the modules' dictionaries.


def alteration(m: object, kind: type[nn.Module], parameters: tuple[str, ...] = ()) -> str | None:
    """None if `m` is just a `kind` with these parameters, none of them missing; else what it is instead."""
    if type(m) is not kind:
        return f"{type(m).__name__} in the place of {kind.__name__}"
    attributes = m.__dict__
    if "forward" in attributes or "_conv_forward" in attributes or "numbers" in attributes:
        return f"a {kind.__name__} with a method replaced"
    held = attributes["_parameters"]
    if len(held) != len(parameters):
        return f"a {kind.__name__} whose parameters are not {', '.join(parameters) or 'none'}"
    for name in parameters:
        if name in attributes or type(held.get(name)) not in (nn.Parameter, torch.Tensor):
            return f"a {kind.__name__} whose {name} is no parameter of its own"
    return None


def hook_on(*modules: nn.Module) -> str | None:
    """None unless something is called before or after one of these modules, which may change what they compute."""
    for hooks in _GLOBAL:
        if hooks:
            return "hooks of all modules"
    for m in modules:
        d = m.__dict__
        if d["_forward_hooks"] or d["_forward_pre_hooks"] or d["_backward_hooks"] or d["_backward_pre_hooks"]:
            return f"hooks of {type(m).__name__}"
    return None


def plain_numbers(*values: Any) -> bool:
    """Whether all are plain numbers: not tensors, which autograd might follow."""
    return all(type(v) is float or (isinstance(v, Real) and not isinstance(v, bool)) for v in values)


def dtype_or_device_mismatch(x: torch.Tensor, *modules: nn.Module) -> str | None:
    """None if all parameters that these modules hold themselves have the dtype and device of `x`, and kernels can read
    the memory of `x`."""
    dtype, device = x.dtype, x.device
    for m in modules:
        for p in m.__dict__["_parameters"].values():
            if p.dtype != dtype or p.device != device:
                return f"the images are {dtype} on {device}, but a parameter is {p.dtype} on {p.device}."
    if x.layout != torch.strided:
        return "the images' memory does not hold their values as they are."
    return None
