"""Solvers of the inner problem `argmin 1/2||y - Ax||^2 + mu r(x)`."""

from __future__ import annotations

from .acceleration import ACCELERATIONS
from .options import PGDOptions, Solution
from .pgd import pgd

__all__ = ["ACCELERATIONS", "PGDOptions", "Solution", "pgd"]
