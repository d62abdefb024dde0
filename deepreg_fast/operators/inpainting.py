"""Masks: inpainting and demosaicing."""

from __future__ import annotations

from typing import Any

import torch

from .. import checks
from ..ambient import outside_inference
from ..batched.linalg import expand
from ..errors import InputError
from .base import LinearOperator, register
from .files import pack, unpack

PATTERNS = ("rggb", "bggr", "grbg", "gbrg")


class Inpainting(LinearOperator):
    """`y = m x`, the pixels at which the mask is one; the others are zero in y.

    Equal to `deepinv.physics.Inpainting`. `A A^T` is diagonal, so every closed form is exact. Values of y outside of
    the mask have no effect.

    Parameters
    ----------
    mask : Tensor `[C, H, W]`, or `[B, C, H, W]` for one mask per image
        Zeros and ones, of any dtype.

    Raises
    ------
    InputError
        If the mask has another shape, holds other values, or keeps no pixel of some image.

    Examples
    --------
    >>> import torch, deepreg_fast as dr
    >>> A = dr.Inpainting(torch.rand(1, 16, 16) < 0.5)
    >>> y = A.A(torch.rand(2, 1, 16, 16))
    >>> torch.equal(A.A(y), y)
    True
    """

    per_image = ("mask",)

    @outside_inference
    def __init__(self, mask: torch.Tensor) -> None:
        m = check_mask(unpack(mask))
        super().__init__((m.shape[-3], m.shape[-2], m.shape[-1]), tuple(m.shape[-3:]))
        if m.ndim == 4:
            self.batch = len(m)
        self.register_buffer("mask", m)
        self.mask: torch.Tensor

    def _forward(self, x: torch.Tensor) -> torch.Tensor:
        # A product would let an infinite pixel of x through as NaN.
        return torch.where(self.mask, x, 0.0)

    def _adjoint(self, y: torch.Tensor) -> torch.Tensor:
        return torch.where(self.mask, y, 0.0)

    def _normal(self, x: torch.Tensor) -> torch.Tensor:
        return torch.where(self.mask, x, 0.0)

    def _gram_solve(self, r: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        s = expand(c, r)
        return torch.where(self.mask, r / (1.0 + s), r / s)

    def _shifted_inverse(self, v: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        return self._gram_solve(v, c)

    def _prox(self, z: torch.Tensor, y: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
        g = expand(gamma, z)
        return torch.where(self.mask, z + g / (1.0 + g) * (y - z), z)

    def A_dagger(self, y: torch.Tensor) -> torch.Tensor:
        """`A^T y`: the pixels of the mask, zero elsewhere."""
        return self.A_adjoint(y)

    def _square_norms(self, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        return torch.ones(1, dtype=torch.float64, device=device)

    def describe(self) -> dict[str, Any]:
        """Constructor arguments."""
        return {"kind": "inpainting", "mask": pack(self.mask)}


class Demosaicing(Inpainting):
    """One color per pixel, as a Bayer sensor measures it: `Inpainting` of an RGB image with the sensor's mask.

    Parameters
    ----------
    image_shape : (3, H, W)
    pattern : "rggb", "bggr", "grbg" or "gbrg"
        The colors of the upper left 2 x 2 pixels, row by row.

    Raises
    ------
    InputError
        If an argument is out of range.

    Examples
    --------
    >>> import torch, deepreg_fast as dr
    >>> A = dr.Demosaicing((3, 4, 4))
    >>> int(A.mask.sum())
    16
    """

    def __init__(self, image_shape: tuple[int, int, int], pattern: str = "rggb") -> None:
        shape = tuple(image_shape) if isinstance(image_shape, (tuple, list)) else ()
        if len(shape) != 3 or shape[0] != 3:
            raise InputError(f"image_shape must be (3, H, W) for color images, but is {image_shape!r}.")
        self.pattern = checks.choice(pattern, "pattern", PATTERNS)
        h, w = (checks.integer(n, "every size in image_shape", 1) for n in shape[1:])
        mask = torch.zeros(3, h, w, dtype=torch.bool, device="cpu")
        for i, color in enumerate(self.pattern):
            mask["rgb".index(color), i // 2 :: 2, i % 2 :: 2] = True
        super().__init__(mask)

    def describe(self) -> dict[str, Any]:
        """Constructor arguments."""
        return {"kind": "demosaicing", "image_shape": list(self.image_shape), "pattern": self.pattern}


def check_mask(mask: object, name: str = "mask") -> torch.Tensor:
    """Check a mask `[C, H, W]` or `[B, C, H, W]` of zeros and ones; return it as bool."""
    if not isinstance(mask, torch.Tensor) or mask.ndim not in (3, 4) or mask.numel() == 0:
        raise InputError(
            f"{name} must be a tensor [C, H, W], or [B, C, H, W] for one per image, but is {checks.describe(mask)}."
        )
    m = mask.detach()
    if m.dtype != torch.bool:
        if not bool(((m == 0) | (m == 1)).all()):
            raise InputError(
                f"{name} must hold zeros and ones, but has values from {float(m.min()):.3g} to {float(m.max()):.3g}; "
                "use mask > 0.5, for example."
            )
        m = m == 1
    if not bool((m.flatten(1) if m.ndim == 4 else m.flatten()[None]).any(1).all()):
        raise InputError(f"{name} must keep at least one pixel of every image, but keeps none; is it inverted?")
    return m.clone()


register("inpainting", Inpainting)
register("demosaicing", Demosaicing)
