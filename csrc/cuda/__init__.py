"""CUDA C++ sources, installed as the data of `deepreg_fast.cuda`; NVRTC compiles them at first use."""

from importlib.resources import files


def source(name: str) -> str:
    """Text of one source file of this package."""
    return files(__name__).joinpath(name).read_text()
