"""The GPU backend: Triton kernels of `kernels/` and CUDA C++ of `csrc/cuda`, for float32 (docs/kernels.md).

This module decides what is covered. `conv_chain.py`, `tv.py`, `srm.py` and `vectors.py` launch kernels and are imported
at their first use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ...functional.conv_chain import ConvChainForm
from ...functional.forms import form_of
from ...functional.tv import TvForm
from ...machine import NO_CUDA
from ..reference import Linearization, describe_energy
from .chain_options import DEFAULT, ChainOptions
from .graphs import Signature

if TYPE_CHECKING:
    from .decisions import GpuDecisions
    from .srm import GpuSrm
    from .vectors import GpuVectors


_KERNELS: dict[type, str] = {ConvChainForm: ".conv_chain", TvForm: ".tv"}
"""Modules with `unsupported_reason`, `value_and_grad`, `linearize` and `signature` of a form."""

_OPTIONS: ContextVar[ChainOptions] = ContextVar("deepreg_fast_gpu_options", default=DEFAULT)


@contextmanager
def gpu_options(precision: str = "tf32x3", storage: str = "float32") -> Iterator[None]:
    """Select the precision of the network's GPU kernels inside a `with` block.

    By default they are as accurate as PyTorch in float32. With three digits, a tight solve ends as `STAGNATED`: a
    residual of 1e-2 is reached as with float32, 1e-3 is not (docs/kernels.md).

    Parameters
    ----------
    precision : "tf32x3", "ieee" or "tf32"
        Of the convolutions: float32 on tensor cores as three TF32 products, float32 without tensor cores, or one TF32
        product (three digits).
    storage : "float32" or "bfloat16"
        Of the tensors between kernels; bfloat16 halves the bytes and has three digits.

    Returns
    -------
    context manager

    Raises
    ------
    InputError
        If an option does not exist.

    Examples
    --------
    >>> import deepreg_fast as dr
    >>> with dr.gpu_options(precision="ieee"):
    ...     pass
    """
    token = _OPTIONS.set(ChainOptions(precision, storage=storage))
    try:
        yield
    finally:
        _OPTIONS.reset(token)


class GpuBackend:
    """The conv chain, TV and the vector work in Triton, the SRM in CUDA C++. Other energies are not supported."""

    name = "gpu"
    batch_invariant = True
    capturable = True

    def unavailable(self) -> str | None:
        """None if the backend can run, otherwise the first missing requirement and the remedy."""
        return _unavailable(torch.cuda.is_available, find_spec)

    def serves(self, like: torch.Tensor) -> str | None:
        """None for float32 on a CUDA device, otherwise the reason."""
        if like.device.type != "cuda" or like.dtype != torch.float32:
            return f"it takes float32 tensors on a CUDA device, not {like.dtype} on {like.device}."
        return _too_old(like.device)

    def unsupported_reason(self, energy: nn.Module, x: torch.Tensor) -> str | None:
        """None for a conv chain or smoothed TV and a tensor that the kernels cover, otherwise the reason."""
        form = form_of(energy)
        if type(form) not in _KERNELS:
            return f"it has kernels for the conv chain (RED) and TV only, not for {describe_energy(energy)}."
        if (reason := self.serves(x)) is not None:
            return reason
        return _kernels(form).unsupported_reason(form, x)

    def value_and_grad(self, energy: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`r(x_b)` and `grad r(x_b)`."""
        form = form_of(energy)
        return _kernels(form).value_and_grad(form, x.detach(), _OPTIONS.get())

    def linearize(self, energy: nn.Module, x: torch.Tensor) -> Linearization:
        """Save the activations that the Hessian at x needs."""
        form = form_of(energy)
        return _kernels(form).linearize(energy, form, x, _OPTIONS.get())

    def signature(self, energy: nn.Module, x: torch.Tensor) -> Signature:
        """Everything that recorded gradients depend on besides their images."""
        form = form_of(energy)
        return _kernels(form).signature(energy, form, _OPTIONS.get())

    def srm(self, A: nn.Module, like: torch.Tensor) -> GpuSrm | None:
        """The CUDA C++ products."""
        if self.serves(like) is not None:
            return None
        from . import srm as gpu_srm

        return gpu_srm.find(A, like)

    def vectors(self, like: torch.Tensor) -> GpuVectors | None:
        """The solvers' vector work."""
        if self.serves(like) is not None:
            return None
        from . import vectors as gpu_vectors

        return gpu_vectors.GpuVectors()

    def decisions(self, like: torch.Tensor) -> GpuDecisions | None:
        """The solvers' decisions, for images of any dtype."""
        if like.device.type != "cuda" or _too_old(like.device) is not None:
            return None
        from . import decisions as gpu_decisions

        return gpu_decisions.GpuDecisions()


def _kernels(form: object) -> Any:
    """The module with the kernels of a form."""
    return import_module(_KERNELS[type(form)], __package__)


@lru_cache(maxsize=4)
def _unavailable(cuda: Callable[[], bool], find: Callable[[str], object]) -> str | None:
    # Every product calls this, so the result is cached.
    if not cuda():
        return NO_CUDA
    for package, name in (("triton", "triton"), ("cupy", "cupy-cuda13x")):
        if find(package) is None:
            return f"the package {name} is missing; pip install 'deepreg-fast[gpu]'."
    return None


@lru_cache(maxsize=64)
def _too_old(device: torch.device) -> str | None:
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"its kernels need compute capability 8.0 or newer, and {device} has {major}.{minor}."
    return None
