"""An identity whose derivative is an error, for operators without third derivatives."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import Function

from ..errors import InputError
from .library import below_autograd, define, single_level

THIRD_DERIVATIVE = (
    "The kernels have the first and second derivatives of the regularizer, but this call needs one more (of "
    "a Hessian-vector or parameter product in x or the parameters); detach x and the parameters if it is not needed, "
    "or differentiate reg.energy(x), the PyTorch definition."
)


def _compute(like: torch.Tensor) -> torch.Tensor:
    raise InputError(THIRD_DERIVATIVE)


def _vmap(info: Any, in_dims: tuple[Any, ...], like: torch.Tensor) -> Any:
    return _compute(like)


class _NoThirdDerivative(Function):
    """The identity. It raises an error only when reverse mode differentiates through it."""

    @staticmethod
    def forward(t: torch.Tensor) -> torch.Tensor:
        with below_autograd():
            return t.view_as(t)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        return _no_third_derivative(ctx.saved_tensors[0])

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return tangents[0].view_as(tangents[0])


no_third_derivative_of = single_level(_NoThirdDerivative)


# This is an operator because torch.compile traces every derivative in advance: it must fail only when it is run.
_no_third_derivative = define(
    "undefined(Tensor like) -> Tensor", _compute, lambda like: like.new_empty(like.shape), _vmap
)
