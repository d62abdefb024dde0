"""Protocols of a backend and of an operator's kernels."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import nn

from .reference import Linearization


class Energy(Protocol):
    """A scalar energy per image, batched, with parameters, which a backend differentiates."""

    def energy(self, x: torch.Tensor) -> torch.Tensor:
        """`r(x_b)`, `[B]`."""
        ...


class Backend(Protocol):
    """The three derivatives of one energy, and the backend's availability and coverage.

    It may have `capturable = True`: `value_and_grad` performs no host synchronization and can be captured in a CUDA
    graph. The same attribute of a `Linearization` concerns `hvp`, that of `SrmKernels` all products. It may then have
    `signature(energy, x)`, and a linearization `signature()` and `moved(put)`, so that later solves can reuse a graph
    (`gpu/graphs.py`).
    """

    name: str
    batch_invariant: bool
    """Whether an image's bits are the same in any batch, including a batch of one."""

    def unavailable(self) -> str | None:
        """None if the backend can run on this machine, otherwise the reason and the remedy."""
        ...

    def unsupported_reason(self, energy: nn.Module, x: torch.Tensor) -> str | None:
        """None if the backend covers this energy for this tensor, else the reason."""
        ...

    def value_and_grad(self, energy: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`r(x_b)` `[B]` and `grad r(x_b)` `[B, C, H, W]`."""
        ...

    def linearize(self, energy: nn.Module, x: torch.Tensor) -> Linearization:
        """The Hessian and the mixed derivative at a fixed point."""
        ...


class SrmKernels(Protocol):
    """A structurally random matrix's products, for images of one dtype and device."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`A x`, `[B, C, H, W] -> [B, m]`."""
        ...

    def adjoint(self, y: torch.Tensor) -> torch.Tensor:
        """`A^T y`."""
        ...

    def normal(self, x: torch.Tensor) -> torch.Tensor:
        """`A^T A x`."""
        ...

    def correct(self, x: torch.Tensor, y: torch.Tensor, weight: float | torch.Tensor) -> torch.Tensor:
        """`x_b + weight_b A^T (y_b - A x_b)`, `weight` `[B]` or a number."""
        ...
