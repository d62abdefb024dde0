"""Regularizers: an energy with its three derivatives.

`RED` (the conv chain with the heads of the literature), `ICNN` (input-convex), `Ridge` (filters and profiles),
`TV` (smoothed), `MultiConvRidge` and `TDV` (the priors of others), `Sum` of several, `PerChannel`, `Luma`, `RealImag`
and `Magnitude` (gray regularizers on color and complex images), and `EnergyRegularizer` for any `nn.Module` that maps
images to one energy each.
"""

from __future__ import annotations

from .base import Regularizer, as_regularizer, from_description, register
from .channels import PerChannel, for_channels
from .complex_images import Magnitude, RealImag
from .denoiser import DenoiserField
from .energy import EnergyRegularizer
from .icnn import ICNN
from .luma import Luma
from .multi_conv import MultiConvRidge
from .red import RED
from .ridge import Ridge
from .scaled import Scaled
from .sum import Sum
from .tdv import TDV
from .tv import TV

__all__ = [
    "ICNN",
    "RED",
    "TDV",
    "TV",
    "DenoiserField",
    "EnergyRegularizer",
    "Luma",
    "Magnitude",
    "MultiConvRidge",
    "PerChannel",
    "RealImag",
    "Regularizer",
    "Ridge",
    "Scaled",
    "Sum",
    "as_regularizer",
    "for_channels",
    "from_description",
    "register",
]
