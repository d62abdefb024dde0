"""The GPU backend: Triton kernels of `kernels/` and CUDA sources of `csrc/cuda`, for CUDA tensors."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import nn

from ..errors import BackendUnavailable
from .reference import Linearization


class GpuBackend:
    """Declared in the table so that it can be asked for; it has no kernels in this release."""

    name = "gpu"
    batch_invariant = False

    def unavailable(self) -> str | None:
        """The first thing that is missing, and the way to get it."""
        if not torch.cuda.is_available():
            return "torch sees no CUDA device; install a CUDA build of torch on a machine with an NVIDIA GPU."
        for package, name in (("triton", "triton"), ("cupy", "cupy-cuda13x")):
            if find_spec(package) is None:
                return f"the package {name} is missing; pip install 'deepreg-fast[gpu]'."
        return "this release carries no GPU kernels; use 'reference', which runs on CUDA tensors through torch."

    def why_not(self, energy: nn.Module, x: torch.Tensor) -> str | None:
        """The same reason, for any energy."""
        return self.unavailable()

    def value_and_grad(self, energy: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Not reached while `unavailable` gives a reason."""
        raise BackendUnavailable(str(self.unavailable()))

    def linearize(self, energy: nn.Module, x: torch.Tensor) -> Linearization:
        """Not reached while `unavailable` gives a reason."""
        raise BackendUnavailable(str(self.unavailable()))
