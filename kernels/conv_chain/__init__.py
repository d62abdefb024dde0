"""Triton kernels of the convolutional network: energy, gradient, tangent and weight gradients."""
