"""Linear operators: one file for each kind, the base class, and operators made of others."""

from __future__ import annotations

from .algebra import Composition, Scaled, Stack
from .base import LinearOperator, from_description, register
from .blur import Blur
from .fourier import FourierSampling
from .identity import Identity
from .inpainting import Demosaicing, Inpainting
from .kernels import gaussian_kernel, motion_kernel
from .mri import MRI, cartesian_mask, simulate_coil_maps
from .srm import SRM
from .super_resolution import SuperResolution
from .tomography import Tomography

__all__ = [
    "MRI",
    "SRM",
    "Blur",
    "Composition",
    "Demosaicing",
    "FourierSampling",
    "Identity",
    "Inpainting",
    "LinearOperator",
    "Scaled",
    "Stack",
    "SuperResolution",
    "Tomography",
    "cartesian_mask",
    "from_description",
    "gaussian_kernel",
    "motion_kernel",
    "register",
    "simulate_coil_maps",
]
