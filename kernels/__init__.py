"""Triton kernels, installed as `deepreg_fast.kernels`. They import nothing from the rest of the package.

`conv_chain/` has the kernels of the conv chain, `solvers/` those of the solvers. Each module's `variants()` lists its
kernels as shipped, for compilation without a GPU. `backend/gpu/` launches them.
"""

if __name__ != "deepreg_fast.kernels":
    raise ImportError(
        "The folder kernels/ is a part of deepreg_fast and cannot be imported by itself: install the package "
        "(pip install -e .) and write `import deepreg_fast.kernels`."
    )
