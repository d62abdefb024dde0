"""Triton kernels, installed as `deepreg_fast.kernels`. They import nothing of the rest of the package.

There are none yet: the `gpu` backend says so when it is asked.
"""

if __name__ != "deepreg_fast.kernels":
    raise ImportError(
        "The folder kernels/ is a part of deepreg_fast and cannot be imported by itself: install the package "
        "(pip install -e .) and write `import deepreg_fast.kernels`."
    )
