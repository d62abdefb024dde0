"""The reference backend: torch's autograd on the energy as it is written.

`linearize` saves the graph of `grad r(x)` and reuses it. The Hessian is symmetric, so its product with `v` is the
vector-Jacobian product of the gradient; the mixed derivative comes from the same graph. This was measured as the
fastest formulation in eager torch, and it supports any `nn.Module`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import chain
from typing import Any, Protocol

import torch
from torch import nn

from ..ambient import detached, eager, full_precision, outside_inference
from ..errors import InputError
from ..functional.conv_chain import ConvChainForm
from ..functional.unaltered import hook_on


class Linearization(Protocol):
    """`grad r` linearized at a fixed point `x`, for a batch of images.

    Every backend returns one; the parameters must not change while it is in use.
    """

    x: torch.Tensor
    value: torch.Tensor
    grad: torch.Tensor

    def hvp(self, v: torch.Tensor) -> torch.Tensor:
        """`hess r(x_b) v_b`, `[B, C, H, W]`."""
        ...

    def param_vjp(self, v: torch.Tensor) -> dict[str, torch.Tensor]:
        """`sum_b d/dtheta <grad r(x_b), v_b>`, by parameter name."""
        ...


def unsupported_norm_position(form: ConvChainForm) -> str | None:
    """Why kernels do not cover the position of the LayerNorm, or None if they do."""
    if form.net.norm_place == "before":
        return None
    return "its LayerNorm stands before SiLU; this one stands after."


def describe_energy(energy: nn.Module) -> str:
    """The class of an energy without kernels, and how it was altered."""
    reason = getattr(energy, "altered", lambda: None)() or hook_on(*energy.modules())
    return type(energy).__name__ + ("" if reason is None else f" with {reason}")


def srm_key(A: Any) -> tuple[Any, ...]:
    """Cache key of an SRM's kernels: its settings, and the addresses and versions of its buffers."""
    buffers = [
        None if t is None else (t.data_ptr(), t.dtype, t.shape, tensor_version(t)) for t in (A.rows, A.signs, A.perm)
    ]
    return (A.transform, A.block, tuple(A.image_shape), A.measurements, *buffers)


def tensor_version(t: torch.Tensor) -> int:
    """The tensor's in-place version counter (0 for inference-mode tensors, which have none)."""
    return 0 if t.is_inference() else t._version


class ParameterGuard:
    """Checks that the parameters have not changed since `linearize`, and that a direction matches `x`."""

    def __init__(self, params: list[nn.Parameter]) -> None:
        self._params = params
        self._counts = [tensor_version(p) for p in params]

    def check(self, v: torch.Tensor, x: torch.Tensor) -> None:
        """Raise an `InputError` if a parameter has changed, or if v does not match x."""
        if [tensor_version(p) for p in self._params] != self._counts:
            raise InputError(
                "The regularizer's parameters must stay as they were at linearize(x), but have changed since; "
                "call linearize(x) again."
            )
        if v.shape != x.shape or v.dtype != x.dtype or v.device != x.device:
            raise InputError(
                f"v must have the shape {list(x.shape)} and dtype of x ({x.dtype}) on {x.device}, "
                f"but has {list(v.shape)} and {v.dtype} on {v.device}."
            )


class Gradients:
    """Maps the gradients of a network's tensors to an energy's parameters, by name.

    The gradients of a shared parameter are summed; a parameter that is not part of the network gets zeros.
    """

    def __init__(self, energy: nn.Module, tensors: Sequence[torch.Tensor]) -> None:
        self._places = [id(t) for t in tensors]
        self._named = [(n, p) for n, p in energy.named_parameters() if p.requires_grad]

    def by_name(self, parts: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        """The gradients of the tensors, in their order, by parameter name."""
        total: dict[int, torch.Tensor] = {}
        for place, part in zip(self._places, parts, strict=True):
            total[place] = total[place] + part if place in total else part
        return {
            n: total[id(p)].to(p.dtype).reshape(p.shape) if id(p) in total else torch.zeros_like(p)
            for n, p in self._named
        }


class ReferenceLinearization:
    """The saved graph of the gradient."""

    @outside_inference
    @full_precision
    def __init__(self, energy: nn.Module, x: torch.Tensor) -> None:
        _check_parameters(energy)
        self._names = [n for n, p in energy.named_parameters() if p.requires_grad]
        self._params = [p for p in energy.parameters() if p.requires_grad]
        self._guard = ParameterGuard(self._params)
        self._x = detached(x).requires_grad_()
        with torch.enable_grad(), _float32(x), eager():
            value = energy.energy(self._x)  # type: ignore[operator]
            self._grad = _grad_of(value, self._x, create_graph=True)
        self.x = self._x.detach()
        self.value = value.detach()
        self.grad = self._grad.detach()

    @outside_inference
    @full_precision
    def _pull_back(self, v: torch.Tensor, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        self._guard.check(v, self.x)
        if not self._grad.requires_grad or not inputs:
            return [torch.zeros_like(p) for p in inputs]
        v = detached(v)
        with _float32(v):
            out = torch.autograd.grad(self._grad, inputs, v, retain_graph=True, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for g, p in zip(out, inputs, strict=True)]

    def hvp(self, v: torch.Tensor) -> torch.Tensor:
        """`hess r(x_b) v_b`."""
        return self._pull_back(v, [self._x])[0].detach()

    def param_vjp(self, v: torch.Tensor) -> dict[str, torch.Tensor]:
        """`sum_b d/dtheta <grad r(x_b), v_b>`, by parameter name."""
        return dict(zip(self._names, self._pull_back(v, list(self._params)), strict=True))


def _check_parameters(energy: nn.Module) -> None:
    if any(t.is_inference() for t in chain(energy.parameters(), energy.buffers())):
        raise InputError(
            f"The tensors of {type(energy).__name__} must be ones that torch can differentiate, but were made inside "
            "torch.inference_mode(); build or load it outside."
        )


def _grad_of(value: torch.Tensor, x: torch.Tensor, create_graph: bool) -> torch.Tensor:
    """Gradient of `sum_b value_b`; zero if the energy does not depend on x."""
    if not value.requires_grad:
        return torch.zeros_like(x)
    (g,) = torch.autograd.grad(value.sum(), x, create_graph=create_graph, allow_unused=True)
    return torch.zeros_like(x) if g is None else g


@contextmanager
def _float32(x: torch.Tensor) -> Iterator[None]:
    """Disable TF32, to which torch's float32 convolutions round on a GPU by default (three decimal digits)."""
    before = None
    if x.is_cuda:
        # If a program has set torch's newer fp32_precision, reading the old flag may raise; its setting is respected.
        with suppress(RuntimeError):
            before = torch.backends.cudnn.allow_tf32
    if before is None:
        yield
        return
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


class ReferenceBackend:
    """Supports any energy, device and floating dtype."""

    name = "reference"
    batch_invariant = False

    def unavailable(self) -> str | None:
        """Always available."""
        return None

    def unsupported_reason(self, energy: nn.Module, x: torch.Tensor) -> str | None:
        """Always None: every energy is supported."""
        return None

    @outside_inference
    @full_precision
    def value_and_grad(self, energy: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`r(x_b)` and `grad r(x_b)` with one backward pass."""
        _check_parameters(energy)
        leaf = detached(x).requires_grad_()
        with torch.enable_grad(), _float32(x):
            value = energy.energy(leaf)  # type: ignore[operator]
            grad = _grad_of(value, leaf, create_graph=False)
        return value.detach(), grad

    def linearize(self, energy: nn.Module, x: torch.Tensor) -> ReferenceLinearization:
        """Save the graph of the gradient at x."""
        return ReferenceLinearization(energy, x)
