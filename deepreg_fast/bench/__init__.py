"""Benchmarks of the kernels against other implementations and the machine's bounds (`deepreg-fast bench`)."""

from __future__ import annotations

from .cases import CASES
from .ceilings import Ceilings
from .machine import Bounds, bounds, describe
from .peers_learned import check as check_learned_regularizers
from .runner import Result, cases_of, measure, run
from .target import TARGETS, Target
from .timing import Ratio, Timing, interleave, ratio
from .workload import Workload

__all__ = [
    "CASES",
    "Bounds",
    "Ceilings",
    "Workload",
    "TARGETS",
    "Ratio",
    "Result",
    "Target",
    "Timing",
    "bounds",
    "cases_of",
    "check_learned_regularizers",
    "describe",
    "interleave",
    "measure",
    "ratio",
    "run",
]
