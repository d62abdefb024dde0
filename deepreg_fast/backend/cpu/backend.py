"""The C++ backend: the extension built from `csrc/cpu`, for float32 tensors on the CPU.

It implements the sweeps of the conv chain, the ridge energy and smoothed TV (value, gradient, Hessian-vector and
parameter product), the SRM's and tomography's products and the solvers' vector work; see docs/kernels.md.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import nn

from ...functional.conv_chain import ConvChainForm
from ...functional.forms import form_of, unchecked_form_of
from ...functional.ridge import RidgeForm
from ...functional.tomography import Geometry
from ...functional.tv import TvForm
from ..reference import Linearization, describe_energy
from . import conv_chain, ridge, tv
from . import srm as cpu_srm
from . import tomography as cpu_tomography
from .extension import extension as _extension
from .extension import instruction_set
from .vectors import CpuVectors


class FormKernels(Protocol):
    """A module with the kernels of one form."""

    def unsupported_reason(self, form: Any, x: torch.Tensor) -> str | None:
        """None if the kernels cover these float32 images, otherwise the reason."""
        ...

    def value_and_grad(self, form: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`r(x_b)` and `grad r(x_b)`."""
        ...

    def linearize(self, energy: nn.Module, form: Any, x: torch.Tensor) -> Linearization:
        """The Hessian and the mixed derivative at x."""
        ...


_KERNELS: dict[type, FormKernels] = {ConvChainForm: conv_chain, RidgeForm: ridge, TvForm: tv}
_VECTORS: dict[str, CpuVectors] = {}


class CpuBackend:
    """Value and derivatives of the conv chain, the ridge energy and TV in C++."""

    name = "cpu"
    batch_invariant = True

    def unavailable(self) -> str | None:
        """None if the extension is built, otherwise the reason."""
        extension, reason = _extension()
        return reason if extension is None else None

    def unsupported_reason(self, energy: nn.Module, x: torch.Tensor) -> str | None:
        """None for a conv chain, a ridge energy or smoothed TV in float32 on the CPU that the kernels cover."""
        form = form_of(energy)
        kernels = _KERNELS.get(type(form))
        if kernels is None:
            reason = getattr(energy, "no_kernels", None)
            name = describe_energy(energy) + (f" ({reason})" if isinstance(reason, str) else "")
            return f"it has kernels for the conv chain (RED), Ridge and TV only, not for {name}."
        if x.device.type != "cpu" or x.dtype != torch.float32:
            return f"it takes float32 tensors on the CPU, not {x.dtype} on {x.device}."
        return kernels.unsupported_reason(form, x)

    def value_and_grad(self, energy: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`r(x_b)` and `grad r(x_b)` in one sweep."""
        form = unchecked_form_of(energy)
        return _KERNELS[type(form)].value_and_grad(form, x)

    def linearize(self, energy: nn.Module, x: torch.Tensor) -> Linearization:
        """Save the activations that the Hessian at x needs."""
        form = unchecked_form_of(energy)
        return _KERNELS[type(form)].linearize(energy, form, x)

    def srm(self, A: Any, like: torch.Tensor) -> cpu_srm.CpuSrm | None:
        """The C++ products for float32 on the CPU."""
        return cpu_srm.find(A) if like.device.type == "cpu" and like.dtype == torch.float32 else None

    def tomography(self, geometry: Geometry, like: torch.Tensor) -> cpu_tomography.CpuTomography | None:
        """The C++ projections for float32 on the CPU."""
        if like.device.type != "cpu" or like.dtype != torch.float32:
            return None
        return cpu_tomography.kernels(geometry, instruction_set())

    def vectors(self, like: torch.Tensor) -> CpuVectors | None:
        """The solvers' vector work for float32 on the CPU."""
        if like.device.type != "cpu" or like.dtype != torch.float32:
            return None
        isa = instruction_set()
        if isa not in _VECTORS:
            extension, _ = _extension()
            assert extension is not None
            _VECTORS[isa] = CpuVectors(extension.Vectors(isa))
        return _VECTORS[isa]
