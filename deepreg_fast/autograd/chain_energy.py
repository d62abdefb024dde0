"""The conv chain's energy for given parameters: the module for the backends, and its derivatives in the parameters."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .. import backend
from ..ambient import full_precision, outside_inference
from ..functional.conv_chain import ConvChain, ConvChainForm, ConvChainSpec

Tensors = Sequence[torch.Tensor]

_ENERGIES: OrderedDict[Any, ChainEnergy] = OrderedDict()
_MAX_CACHED = 8


def _names(net: ConvChain) -> list[str]:
    kinds = ("convs",) if net.norm == "none" else ("convs", "norms")
    return [f"{k}.{i}.{n}" for k in kinds for i in range(len(getattr(net, k))) for n in ("weight", "bias")]


class ChainEnergy(nn.Module):
    """The energy defined by an operator's arguments, for the backends."""

    def __init__(self, spec: ConvChainSpec, params: Tensors) -> None:
        super().__init__()
        depth = len(params) // 2 if spec.norm == "none" else (len(params) + 2) // 4
        channels, image_channels, size = params[0].shape[:3]
        self.net = ConvChain(channels, depth, spec.norm, size, spec.gain, spec.eps, image_channels)
        self._form = ConvChainForm(self.net, spec.head, spec.alpha, spec.center)
        self.names = [f"net.{n}" for n in _names(self.net)]
        for name, p in zip(_names(self.net), params, strict=True):
            kind, i, leaf = name.split(".")
            setattr(getattr(self.net, kind)[int(i)], leaf, nn.Parameter(p.detach()))

    def energy(self, x: torch.Tensor) -> torch.Tensor:
        """`r(x_b)`, `[B]`."""
        return self._form.energy(x)

    def kernel_form(self) -> ConvChainForm:
        """The form that kernels need."""
        return self._form


@outside_inference
def energy_of(spec: ConvChainSpec, params: Tensors) -> ChainEnergy:
    """The energy of these arguments. The last few are cached with their parameters, so addresses are not reused."""
    key = (spec, *((p.data_ptr(), p.shape, p.stride(), p.dtype, p.device) for p in params))
    energy = _ENERGIES.pop(key, None)
    if energy is None:
        energy = ChainEnergy(spec, params)
    _ENERGIES[key] = energy
    while len(_ENERGIES) > _MAX_CACHED:
        _ENERGIES.popitem(last=False)
    return energy


@outside_inference
@full_precision
def linearize(spec: ConvChainSpec, x: torch.Tensor, params: Tensors) -> tuple[backend.Linearization, list[str]]:
    """The linearization at x, and the parameters' names in the operators' order."""
    energy = energy_of(spec, params)
    return backend.select(energy, x).linearize(energy, x.detach()), energy.names


def pull_back(lin: Any, names: list[str], v: torch.Tensor, in_x: bool, in_params: bool) -> list[torch.Tensor]:
    """`H v` with `in_x`, then `d/dtheta <g, v>` of each parameter with `in_params`."""
    by_name = lin.param_vjp(v) if in_params else {}
    return ([lin.hvp(v)] if in_x else []) + [by_name[n] for n in names if in_params]


@full_precision
def value_in_params(spec: ConvChainSpec, x: torch.Tensor, w: torch.Tensor, params: Tensors, of: list[int]) -> list[Any]:
    """`sum_b w_b dr_b/dtheta` for the parameters `of`, None for the others, from the PyTorch definition."""

    def total(*selected: torch.Tensor) -> torch.Tensor:
        all_params = list(params)
        for i, p in zip(of, selected, strict=True):
            all_params[i] = p
        return (w * spec.energy(x, all_params)).sum()

    by_param: list[Any] = [None] * len(params)
    grads = torch.func.grad(total, argnums=tuple(range(len(of))))(*(params[i] for i in of))
    for i, g in zip(of, grads, strict=True):
        by_param[i] = g
    return by_param


def tangent_in_params(
    spec: ConvChainSpec, x: torch.Tensor, params: Tensors, tangents: Tensors
) -> tuple[torch.Tensor, torch.Tensor]:
    """`dr_b/dtheta t` and `dg/dtheta t` from the PyTorch definition: the derivatives in w and x of
    `sum_i <d/dtheta_i sum_b w_b r_b(x), t_i>` at w = 1."""

    def along(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        parts = value_in_params(spec, x, w, params, list(range(len(params))))
        return torch.stack([(p * t).sum() for p, t in zip(parts, tangents, strict=True)]).sum()

    of_x, of_w = torch.func.grad(along, argnums=(0, 1))(x, x.new_ones(x.shape[0]))
    return of_w, of_x
