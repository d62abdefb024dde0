"""The C++ backend: the extension of `csrc/cpu`, for float32 tensors on the CPU."""

from __future__ import annotations

import torch
from torch import nn

from ..errors import BackendUnavailable
from .reference import Linearization

_REASON = (
    "this release carries no compiled C++ extension; use the backend 'reference', which computes the same "
    "values with torch."
)


class CpuBackend:
    """Declared in the table so that it can be asked for; it has no kernels in this release."""

    name = "cpu"

    def unavailable(self) -> str | None:
        """The reason why the extension cannot be used."""
        return _REASON

    def why_not(self, energy: nn.Module, x: torch.Tensor) -> str | None:
        """The same reason, for any energy."""
        return _REASON

    def value_and_grad(self, energy: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Not reached while `unavailable` gives a reason."""
        raise BackendUnavailable(_REASON)

    def linearize(self, energy: nn.Module, x: torch.Tensor) -> Linearization:
        """Not reached while `unavailable` gives a reason."""
        raise BackendUnavailable(_REASON)
