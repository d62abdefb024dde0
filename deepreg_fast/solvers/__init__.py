"""Batched solvers: linear systems (CG, MINRES), extreme eigenvalues (Lanczos), and proximal gradient descent.

Every image has its own state, stopping test and status.
"""

from __future__ import annotations

from .acceleration import ACCELERATIONS
from .cg import CGOptions, cg
from .lanczos import extreme_eigenvalues
from .linear_system import LinearSolution
from .minres import MinresOptions, minres
from .options import PGDOptions, Solution
from .pgd import pgd
from .slots import Slots

__all__ = [
    "ACCELERATIONS",
    "CGOptions",
    "LinearSolution",
    "MinresOptions",
    "PGDOptions",
    "Slots",
    "Solution",
    "cg",
    "extreme_eigenvalues",
    "minres",
    "pgd",
]
