"""Triton kernels, installed as `deepreg_fast.kernels`. They import nothing of the rest of the package.

`tiles`, `conv_chain`, `outer`, `whole`, `whole_tangent`: the conv chain; `vectors`, `steps`, `decide`, `anderson`: the
solvers. Each module's `variants()` lists what it ships, for compilation without a GPU. `backend/gpu_*.py` launches.
"""

if __name__ != "deepreg_fast.kernels":
    raise ImportError(
        "The folder kernels/ is a part of deepreg_fast and cannot be imported by itself: install the package "
        "(pip install -e .) and write `import deepreg_fast.kernels`."
    )
