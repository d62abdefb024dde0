"""Linear operators: `SRM` (compressive sensing), `Identity` (denoising), and the base class for others."""

from __future__ import annotations

from .base import LinearOperator, from_description, register
from .identity import Identity
from .srm import SRM

__all__ = ["SRM", "Identity", "LinearOperator", "from_description", "register"]
