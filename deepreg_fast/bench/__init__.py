"""What the kernels cost beside their peers and the machine's own bounds (`deepreg-fast bench`)."""

from __future__ import annotations

from .cases import CASES, Problem
from .machine import Bounds, bounds, describe
from .runner import Result, run
from .timing import Ratio, Timing, interleave, ratio

__all__ = [
    "CASES",
    "Bounds",
    "Problem",
    "Ratio",
    "Result",
    "Timing",
    "bounds",
    "describe",
    "interleave",
    "ratio",
    "run",
]
