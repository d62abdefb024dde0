"""This package's operators that equal a deepinv physics."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch

from ...errors import InputError
from ...operators import Blur, Inpainting, LinearOperator, SuperResolution
from .package import deepinv

_BOUNDARIES = {"circular": "circular", "valid": "valid", "reflect": "reflect", "zeros": "zero", "constant": "zero"}


def native_operators(physics: Any, image_shape: tuple[int, int, int]) -> list[LinearOperator]:
    """Operators of this package that a physics should equal, by its class and parameters."""
    kinds = deepinv().physics
    one = torch.ones(1, 1, dtype=torch.float32, device="cpu")

    def blur() -> LinearOperator:
        padding = getattr(physics, "padding", "circular")
        return Blur(image_shape, physics.filter, _BOUNDARIES[padding])

    def downsampling() -> LinearOperator:
        kernel = one if physics.filter is None else physics.filter
        boundary = "circular" if physics.filter is None else _BOUNDARIES[physics.padding]
        return SuperResolution(image_shape, kernel, physics.factor, boundary)

    def inpainting() -> LinearOperator:
        m = physics.mask
        m = m[(None,) * (4 - m.ndim)] if m.ndim < 4 else m
        m = m.expand(len(m), *image_shape)
        return Inpainting(m if len(m) > 1 else m[0])

    def denoising() -> LinearOperator:
        device = physics._device_holder.device
        return Inpainting(torch.ones(image_shape, dtype=torch.bool, device=device))

    makers: list[tuple[Any, Callable[[], LinearOperator]]] = [
        (kinds.Denoising, denoising),
        (kinds.Inpainting, inpainting),
        (kinds.Downsampling, downsampling),
        (kinds.BlurFFT, blur),
        (kinds.Blur, blur),
    ]
    for kind, make in makers:
        if isinstance(physics, kind):
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    return [make()]
            except (InputError, KeyError, RuntimeError):  # another padding, mask or shape: the products of the physics
                return []
    return []
