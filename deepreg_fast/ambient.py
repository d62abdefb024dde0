"""What a program can switch in torch for all that follows, kept out of this package's arithmetic.

Buffers name their dtype and device, so that the defaults of `torch.set_default_dtype` and `torch.set_default_device`
reach none of them (a test reads the sources for it). Autocast, inference mode and the mode of autograd are left by
these decorators. `torch.set_flush_denormal` is a bit of the processor, which the C++ kernels clear while they run.
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
    """The function without autocast, which would round the operands of products to half precision."""

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not (torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")):
            return function(*args, **kwargs)
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return function(*args, **kwargs)

    return cast(F, call)


def outside_inference(function: F) -> F:
    """The function outside `torch.inference_mode`, whose tensors autograd never takes: for what is kept after the call,
    and for what needs a graph. Autograd stays off, as it is in that mode."""

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_inference_mode_enabled():
            return function(*args, **kwargs)
        with torch.inference_mode(False), torch.no_grad():
            return function(*args, **kwargs)

    return cast(F, call)


def detached(t: torch.Tensor) -> torch.Tensor:
    """`t` without a graph, as a tensor that autograd takes (which those of inference mode are not)."""
    return t.detach().clone() if t.is_inference() else t.detach()


def eager() -> AbstractContextManager[object]:
    """Inside, modules that `torch.compile` made run as they were written, for compiled code has no second derivative.
    Where nothing was compiled in this process it costs nothing."""
    loaded = "torch._dynamo" in sys.modules and not torch.compiler.is_compiling()
    return torch.compiler.set_stance("force_eager") if loaded else nullcontext()


def on_cpu() -> AbstractContextManager[object]:
    """Inside, other packages' buffers are on the CPU, whatever `torch.set_default_device` says."""
    return torch.device("cpu")
