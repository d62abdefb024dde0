"""The C++ extension and the hardware of this machine, without importing torch, so that `deepreg-fast info` is fast."""

from __future__ import annotations

import os
import sys
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

from .errors import BackendUnavailable

NO_CUDA = "torch sees no CUDA device; install a CUDA build of torch on a machine with an NVIDIA GPU."


@lru_cache(maxsize=1)
def extension() -> tuple[ModuleType | None, str]:
    """`(module, "")` for the compiled module, or None and the reason why it is unavailable."""
    try:
        from . import _cpu
    except ImportError as error:
        return None, (
            f"the C++ extension is not here ({error}); install a C++17 compiler (g++ or clang++) and run "
            "'pip install --force-reinstall --no-deps deepreg-fast', or use the backend 'reference', which computes "
            "the same values with torch."
        )
    return _cpu, ""


def instruction_set() -> str:
    """The instruction set in use: `DEEPREG_FAST_ISA` if set, otherwise the best of this machine."""
    return _instruction_set(os.environ.get("DEEPREG_FAST_ISA", ""))


@lru_cache(maxsize=8)
def _instruction_set(requested: str) -> str:
    module, reason = extension()
    if module is None:
        raise BackendUnavailable(reason)
    available = module.instruction_sets()
    name = requested or available[0]
    if name not in available:
        raise BackendUnavailable(
            f"DEEPREG_FAST_ISA must be one of {available}, which this machine has, but is {name!r}; unset or change it."
        )
    return name


def may_have_cuda() -> bool:
    """Whether torch may find CUDA devices. On Linux without an NVIDIA driver it finds none."""
    if sys.platform == "darwin":
        return False
    # /dev/dxg: the Windows driver in WSL.
    traces = ("/proc/driver/nvidia/version", "/dev/nvidiactl", "/dev/nvhost-gpu", "/dev/dxg")
    return not sys.platform.startswith("linux") or any(Path(p).exists() for p in traces)


def torch_build() -> dict[str, str | None]:
    """The installed release of torch and the CUDA version of its build, from torch's `version.py`."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return {"version": None, "cuda": None}
    values: dict[str, str | None] = {}
    exec(Path(spec.origin).with_name("version.py").read_text(encoding="utf-8"), values)
    return {"version": values.get("__version__"), "cuda": values.get("cuda")}
