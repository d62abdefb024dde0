"""Batched linear solvers on callables: one state, one end and one status per image."""

from .cg import CGOptions, cg
from .lanczos import extreme_eigenvalues
from .minres import MinresOptions, minres
from .system import LinearSolution

__all__ = ["CGOptions", "LinearSolution", "MinresOptions", "cg", "extreme_eigenvalues", "minres"]
