"""CUDA C++ sources, installed as the data of `deepreg_fast.cuda`; NVRTC compiles them at their first use."""

from importlib.resources import files


def source(name: str) -> str:
    """The text of one of the sources here."""
    return files(__name__).joinpath(name).read_text()
