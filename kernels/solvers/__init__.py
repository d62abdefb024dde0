"""Triton kernels of the solvers: reductions, fused updates and per-image decisions."""
