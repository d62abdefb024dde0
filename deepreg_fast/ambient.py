"""Protection of this package's arithmetic from torch's global settings.

Every buffer names its dtype and device, so `torch.set_default_dtype` and `torch.set_default_device` have no effect (a
test checks the sources). The decorators below leave autocast, inference mode and autograd's mode.
`torch.set_flush_denormal` sets a flag of the processor, which the C++ kernels clear while they run.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Any, TypeVar, cast

import torch

F = TypeVar("F", bound=Callable[..., Any])


def full_precision(function: F) -> F:
    """Run the function without autocast, which would round operands to half precision."""

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not (torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")):
            return function(*args, **kwargs)
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return function(*args, **kwargs)

    return cast(F, call)


def outside_inference(function: F) -> F:
    """Run the function outside `torch.inference_mode`, because autograd rejects inference tensors. Use it if tensors
    outlive the call or need a graph. Autograd stays off, as in inference mode."""

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_inference_mode_enabled():
            return function(*args, **kwargs)
        with torch.inference_mode(False), torch.no_grad():
            return function(*args, **kwargs)

    return cast(F, call)


def detached(t: torch.Tensor) -> torch.Tensor:
    """`t` without a graph, as a tensor that autograd accepts (it rejects inference tensors)."""
    return t.detach().clone() if t.is_inference() else t.detach()


def eager() -> AbstractContextManager[object]:
    """Context in which modules compiled by `torch.compile` run eagerly, because compiled code has no second derivative.
    It costs nothing if this process has compiled nothing."""
    loaded = "torch._dynamo" in sys.modules and not torch.compiler.is_compiling()
    return torch.compiler.set_stance("force_eager") if loaded else nullcontext()


def on_cpu() -> AbstractContextManager[object]:
    """Context in which other packages create buffers on the CPU, whatever `torch.set_default_device` says."""
    return torch.device("cpu")
