"""Public name of `deepreg_fast.autograd`: differentiable energies and gradients for use in other torch code."""

from .autograd import energy, grad, value_and_grad

__all__ = ["energy", "grad", "value_and_grad"]
