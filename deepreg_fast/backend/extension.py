"""The C++ extension of `csrc/cpu`, the instruction set that it runs with, and memory lent to its sweeps."""

from __future__ import annotations

import os
from functools import lru_cache
from types import ModuleType

import torch

from ..errors import BackendUnavailable


@lru_cache(maxsize=1)
def extension() -> tuple[ModuleType | None, str]:
    """The compiled module, or None and the reason why it is not here."""
    try:
        from .. import _cpu
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


# The memory of the linearization that died last: fresh pages cost as much as the sweep that fills them.
_SPARE: list[torch.Tensor] = []


def borrow(count: int) -> torch.Tensor:
    """Uninitialized floats: the spare ones if they are enough and not far too many, else new ones."""
    try:
        spare = _SPARE.pop()
    except IndexError:
        return torch.empty(count)
    return spare if count <= spare.numel() <= 4 * count else torch.empty(count)


def give_back(memory: torch.Tensor) -> None:
    """The next `borrow` may have this memory."""
    _SPARE[:] = [memory]
