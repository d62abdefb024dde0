"""What the kernels cost beside their peers and the machine's own bounds (`deepreg-fast bench`)."""

from __future__ import annotations

from .cases import CASES
from .machine import Bounds, bounds, describe
from .peers_learned import check as check_learned_regularizers
from .problem import Problem
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
    "check_learned_regularizers",
    "describe",
    "interleave",
    "ratio",
    "run",
]
