"""Differentiable functions for use in other torch code: a regularizer's energy and gradient, and the recovery."""

from .autograd import energy, grad, value_and_grad
from .inverse.layer import recover

__all__ = ["energy", "grad", "recover", "value_and_grad"]
