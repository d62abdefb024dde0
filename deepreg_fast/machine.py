"""What is built for this machine and what it has, as far as can be said without torch: `deepreg-fast info` answers
before torch could be imported."""

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
    """The compiled module, or None and the reason why it is not here."""
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
    """The instruction set in force: that of `DEEPREG_FAST_ISA` if set, else the best of this machine."""
    return _instruction_set(os.environ.get("DEEPREG_FAST_ISA", ""))


@lru_cache(maxsize=8)
def _instruction_set(asked: str) -> str:
    module, reason = extension()
    if module is None:
        raise BackendUnavailable(reason)
    found = module.instruction_sets()
    wanted = asked or found[0]
    if wanted not in found:
        raise BackendUnavailable(
            f"DEEPREG_FAST_ISA must be one of {found}, what this machine has, but is {wanted!r}; unset or change it."
        )
    return wanted


def may_have_cuda() -> bool:
    """Whether torch has to be asked for CUDA devices: where Linux has no NVIDIA driver, there are none."""
    if sys.platform == "darwin":
        return False
    # /dev/dxg: Windows' driver, as its Linux subsystem shows it.
    traces = ("/proc/driver/nvidia/version", "/dev/nvidiactl", "/dev/nvhost-gpu", "/dev/dxg")
    return not sys.platform.startswith("linux") or any(Path(p).exists() for p in traces)


def torch_build() -> dict[str, str | None]:
    """The release of torch that is installed and the CUDA version that it is built with, from its file of versions."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return {"version": None, "cuda": None}
    values: dict[str, str | None] = {}
    exec(Path(spec.origin).with_name("version.py").read_text(encoding="utf-8"), values)
    return {"version": values.get("__version__"), "cuda": values.get("cuda")}
