"""Protocols of the operator and the regularizer of `pgd`, and the context for solves inside a solver."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol

import torch

from ..backend import Backend
from ..backend.gpu.graphs import Signature

_FAIL_PER_IMAGE: ContextVar[bool] = ContextVar("deepreg_fast_fail_per_image", default=False)


class DataTerm(Protocol):
    """The operator of `1/2 ||y - A x||^2`, with its proximal map."""

    @property
    def has_shifted_inverse(self) -> bool:
        """Whether the proximal map has a closed form, so that an initial guess is of no use."""
        ...

    def A(self, x: torch.Tensor) -> torch.Tensor:
        """`A x`."""
        ...

    def A_adjoint(self, y: torch.Tensor) -> torch.Tensor:
        """`A^T y`."""
        ...

    def prox_l2(
        self, z: torch.Tensor, y: torch.Tensor, gamma: float | torch.Tensor, x0: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`argmin_x 1/2||x - z||^2 + gamma/2 ||y - A x||^2`, from the initial guess x0."""
        ...

    def select(self, idx: torch.Tensor) -> DataTerm:
        """The operator of the images `idx` of the batch."""
        ...

    def capturable(self, like: torch.Tensor) -> bool:
        """Whether products and proximal map can be captured in a CUDA graph."""
        ...

    def signature(self, like: torch.Tensor) -> Signature | None:
        """Everything that a captured product depends on besides the images; None if unknown."""
        ...


class SmoothTerm(Protocol):
    """The regularizer r, the smooth term of the objective."""

    center: float

    def value_and_grad(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`r(x_b)` and `grad r(x_b)`."""
        ...

    def backend_for(self, x: torch.Tensor) -> Backend:
        """The backend that computes them."""
        ...

    def computed_by_backend(self) -> bool:
        """Whether `value_and_grad` is exactly what that backend computes."""
        ...


@contextmanager
def failing_per_image() -> Iterator[None]:
    """Within this context, a failed proximal map returns NaN for its image and does not raise. The surrounding solver
    gives each image its own status."""
    token = _FAIL_PER_IMAGE.set(True)
    try:
        yield
    finally:
        _FAIL_PER_IMAGE.reset(token)


def fails_per_image() -> bool:
    """Whether the caller is a solver with per-image status."""
    return _FAIL_PER_IMAGE.get()
