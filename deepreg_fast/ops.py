"""Public name of `deepreg_fast.autograd`: energies and gradients for use inside other torch code."""

from .autograd import energy, grad, value_and_grad

__all__ = ["energy", "grad", "value_and_grad"]
