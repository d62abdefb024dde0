"""Backend registry: the only module that maps backend names to implementations.

A backend is an object with the members of `Backend`. The table below lists them in the order in which `"auto"` tries
them. A backend that the user names runs or raises `BackendUnavailable`.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn
from torch.autograd import forward_ad

from ..errors import BackendUnavailable, InputError
from . import reference
from .active import active_images, active_mask
from .cpu import backend as cpu
from .gpu import backend as gpu
from .gpu.backend import gpu_options
from .gpu.graphs import release_graphs
from .protocols import Backend, Energy, SrmKernels
from .reference import Linearization
from .solver_kernels import DecisionKernels, VectorKernels

_TABLE: dict[str, Backend] = {
    "gpu": gpu.GpuBackend(),
    "cpu": cpu.CpuBackend(),
    "reference": reference.ReferenceBackend(),
}
_CHOICE: ContextVar[str] = ContextVar("deepreg_fast_backend", default="auto")


def register(backend: Backend) -> None:
    """Add a backend under `backend.name`; `"auto"` tries it before the existing ones."""
    if backend.name == "auto":
        raise InputError("A backend must have a name of its own, but came with 'auto'; choose another name.")
    items = dict(_TABLE)
    _TABLE.clear()
    _TABLE.update({backend.name: backend, **{k: v for k, v in items.items() if k != backend.name}})


def backends() -> dict[str, str | None]:
    """All backends by name.

    Returns
    -------
    dict
        None for a backend that can run on this machine, otherwise the reason why not.

    Examples
    --------
    >>> import deepreg_fast as dr
    >>> dr.backends()["reference"] is None
    True
    """
    return {name: b.unavailable() for name, b in _TABLE.items()}


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Select the backend inside a `with` block.

    Parameters
    ----------
    name : str
        "auto" (the first that supports the input) or a name of `backends()`.

    Returns
    -------
    context manager

    Raises
    ------
    InputError
        If there is no backend of that name.
    BackendUnavailable
        If it cannot run on this machine; inside the block, if it does not support an input.

    Examples
    --------
    >>> import torch, deepreg_fast as dr
    >>> x = torch.rand(1, 1, 8, 8)
    >>> with dr.use_backend("reference"):
    ...     value, grad = dr.TV().value_and_grad(x)
    """
    if name != "auto":
        if name not in _TABLE:
            raise InputError(f"The backend must be 'auto' or one of {sorted(_TABLE)}, but is {name!r}.")
        reason = _TABLE[name].unavailable()
        if reason is not None:
            raise BackendUnavailable(f"The backend {name!r} cannot run here: {reason}")
    token = _CHOICE.set(name)
    try:
        yield
    finally:
        _CHOICE.reset(token)


def choice() -> tuple[Hashable, ...]:
    """Everything that determines the backend: the selected name and the table."""
    return (_CHOICE.get(), *((name, id(backend)) for name, backend in _TABLE.items()))


def select(energy: nn.Module, x: torch.Tensor) -> Backend:
    """The backend for this energy and tensor under the current selection."""
    name = _CHOICE.get()
    if name != "auto":
        reason = _TABLE[name].unsupported_reason(energy, x)
        if reason is not None:
            raise BackendUnavailable(f"The backend {name!r} cannot take this: {reason}")
        return _TABLE[name]
    for backend in _TABLE.values():
        if backend.unavailable() is None and backend.unsupported_reason(energy, x) is None:
            return backend
    raise BackendUnavailable("No backend can take this tensor; move it to the CPU in float32 or float64.")


def srm_kernels(A: nn.Module, *tensors: torch.Tensor) -> SrmKernels | None:
    """Kernels for the SRM `A` and these tensors, or None if the PyTorch definition must be used.

    It must be used if `"reference"` is selected, or if autograd, `torch.func` or `torch.compile` tracks the tensors. A
    backend may have a method `srm(A, like)` that returns kernels or None.
    """
    return _kernels("srm", tensors, (A, tensors[0]))


def srm_kernels_for(A: nn.Module, like: torch.Tensor) -> SrmKernels | None:
    """The same kernels even if autograd tracks the tensors: for an operation that defines its own derivative."""
    return _find("srm", (A, like))


def vector_kernels(*tensors: torch.Tensor) -> object | None:
    """Kernels for the solvers' vector steps on these tensors, or None, as `srm_kernels`.

    A backend may have a method `vectors(like)` that returns an object with any methods of `VectorKernels`, or None.
    """
    first = tensors[0]
    if any(t.dtype != first.dtype or t.device != first.device for t in tensors[1:]):
        return None
    return _kernels("vectors", tensors, (first,))


def decision_kernels(like: torch.Tensor) -> object | None:
    """Kernels for the solvers' decisions on numbers `[B]` on the device of `like`, or None, as `srm_kernels`.

    A backend may have a method `decisions(like)` that returns an object with any methods of `DecisionKernels`, or None.
    """
    return _kernels("decisions", (like,), (like,))


def tomography_kernels(geometry: Any, like: torch.Tensor) -> Any:
    """The products of a `functional.tomography.Geometry`, or None; from a backend's method `tomography`."""
    return _find("tomography", (geometry, like))


def _kernels(method: str, tensors: tuple[torch.Tensor, ...], arguments: tuple[Any, ...]) -> Any:
    # In this order: torch.compile evaluates only the first condition.
    return None if any(map(needs_autograd, tensors)) else _find(method, arguments)


def _find(method: str, arguments: tuple[Any, ...]) -> Any:
    name = _CHOICE.get()
    if name == "reference":
        return None
    for backend in _TABLE.values() if name == "auto" else (_TABLE[name],):
        factory = getattr(backend, method, None)
        if factory is not None and backend.unavailable() is None and (kernels := factory(*arguments)) is not None:
            return kernels
    return None


# PyTorch's only query for the tensors of torch.func, in a private module since 2.0.
_wrapped = getattr(torch._C, "_functorch").is_functorch_wrapped_tensor  # noqa: B009


def needs_autograd(t: torch.Tensor) -> bool:
    """Whether autograd, `torch.func`, `torch.compile` or a tensor subclass tracks operations on `t`."""
    if torch.compiler.is_compiling() or type(t) not in (torch.Tensor, nn.Parameter):
        return True
    tracked = torch.is_grad_enabled() and t.requires_grad
    return tracked or _wrapped(t) or forward_ad.unpack_dual(t).tangent is not None


__all__ = [
    "Backend",
    "DecisionKernels",
    "Energy",
    "Linearization",
    "SrmKernels",
    "VectorKernels",
    "backends",
    "choice",
    "decision_kernels",
    "needs_autograd",
    "gpu_options",
    "active_images",
    "register",
    "release_graphs",
    "active_mask",
    "select",
    "srm_kernels",
    "srm_kernels_for",
    "tomography_kernels",
    "use_backend",
    "vector_kernels",
]
