"""The GPU backend: Triton kernels of `kernels/` and CUDA C++ of `csrc/cuda`, for float32 (docs/kernels.md).

This module decides what is covered. `conv_chain.py`, `tv.py`, `srm.py` and `vectors.py` launch kernels and are imported
at their first use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ...functional.tv import eps_of
from ...machine import NO_CUDA
from ..reference import Linearization, describe_energy
from .graphs import Signature
from .pixel_norm import DEFAULT, ChainOptions

if TYPE_CHECKING:
    from ...functional.conv_chain import ConvChainForm
    from .decisions import GpuDecisions
    from .srm import GpuSrm
    from .vectors import GpuVectors


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
        form, eps = _form(energy), eps_of(energy)
        if form is None and eps is None:
            return f"it has kernels for the conv chain (RED) and TV only, not for {describe_energy(energy)}."
        if (reason := self.serves(x)) is not None:
            return reason
        if eps is not None:
            from . import tv

            return tv.unsupported_reason(eps, x)
        from . import conv_chain

        assert form is not None
        return conv_chain.unsupported_reason(form, x)

    def value_and_grad(self, energy: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`r(x_b)` and `grad r(x_b)`."""
        if (eps := eps_of(energy)) is not None:
            from . import tv

            return tv.value_and_grad(eps, x)
        from . import conv_chain

        form = _form(energy)
        assert form is not None
        return conv_chain.value_and_grad(form, x.detach(), _OPTIONS.get())

    def linearize(self, energy: nn.Module, x: torch.Tensor) -> Linearization:
        """Save the activations that the Hessian at x needs."""
        if (eps := eps_of(energy)) is not None:
            from . import tv

            return tv.GpuTvLinearization(energy, eps, x)
        from . import conv_chain

        form = _form(energy)
        assert form is not None
        return conv_chain.GpuLinearization(energy, form, x, _OPTIONS.get())

    def signature(self, energy: nn.Module, x: torch.Tensor) -> Signature:
        """Everything that recorded gradients depend on besides their images."""
        if (eps := eps_of(energy)) is not None:
            from . import tv

            return tv.signature(energy, eps)
        from . import conv_chain

        form = _form(energy)
        assert form is not None
        return conv_chain.signature(energy, form, _OPTIONS.get())

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


def _form(energy: Any) -> ConvChainForm | None:
    return getattr(energy, "conv_chain_form", lambda: None)()


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
