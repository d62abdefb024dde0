"""The GPU backend: launches of the Triton kernels in `kernels/` and of the CUDA kernels in `csrc/cuda`."""
