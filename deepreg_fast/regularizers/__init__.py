"""Regularizers: an energy with its three derivatives.

`RED` (the conv chain with the heads of the literature), `ICNN` (input-convex), `TV` (smoothed), and
`EnergyRegularizer` around any `nn.Module` that maps images to one energy each.
"""

from __future__ import annotations

from .base import Regularizer, as_regularizer, from_description, register
from .custom import EnergyRegularizer
from .field import DenoiserField
from .icnn import ICNN
from .red import RED
from .tv import TV

__all__ = [
    "ICNN",
    "RED",
    "TV",
    "DenoiserField",
    "EnergyRegularizer",
    "Regularizer",
    "as_regularizer",
    "from_description",
    "register",
]
