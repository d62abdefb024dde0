"""Blur, then every s-th pixel: super-resolution (docs/math.md, M2)."""

from __future__ import annotations

from typing import Any

import torch

from .. import checks
from ..batched.linalg import expand
from ..errors import InputError
from ..functional import fourier
from .base import LinearOperator, register
from .blur import Blur
from .files import pack


class SuperResolution(LinearOperator):
    """`y = S (k * x)`: blur, then the pixels `0, s, 2 s, ...` of each row and column.

    Equal to `deepinv.physics.Downsampling`. With circular boundaries `A A^T` is a circular convolution on the small
    grid, whose eigenvalues are the means of `|K|^2` over the `s^2` frequencies that coincide there, so every closed
    form is exact (docs/math.md, M2; Zhao et al. 2016). With the others, CG solves the systems.

    Parameters
    ----------
    image_shape : (C, H, W)
        The shape of the large images. With circular boundaries, s divides H and W.
    kernel : Tensor `[h, w]`, or `[B, 1 or C, h, w]`
        One kernel, or one for each image or channel.
    factor : int
        The factor s in each direction.
    boundary : "circular", "valid", "reflect" or "zero"
        As for `Blur`.

    Raises
    ------
    InputError
        If an argument is out of range.

    Examples
    --------
    >>> import torch, deepreg_fast as dr
    >>> A = dr.SuperResolution((1, 16, 16), torch.full((3, 3), 1 / 9), factor=2)
    >>> A.A(torch.rand(2, 1, 16, 16)).shape
    torch.Size([2, 1, 8, 8])
    """

    def __init__(
        self, image_shape: tuple[int, int, int], kernel: torch.Tensor, factor: int = 2, boundary: str = "circular"
    ) -> None:
        super().__init__(image_shape, 0)
        self.factor = checks.integer(factor, "factor", 1)
        self.blur = Blur(self.image_shape, kernel, boundary)
        c, h, w = self.blur.measurement_shape
        if boundary == "circular" and (h % self.factor or w % self.factor):
            raise InputError(
                f"factor must divide the height and width of the images, {h} x {w}, but is {self.factor}; crop them to "
                f"{h // self.factor * self.factor} x {w // self.factor * self.factor}."
            )
        self._measurement_shape = (c, -(-h // self.factor), -(-w // self.factor))
        self.measurements = c * self._measurement_shape[1] * self._measurement_shape[2]
        self.batch = self.blur.batch

    @property
    def boundary(self) -> str:
        """What lies beyond the image."""
        return self.blur.boundary

    def _forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.blur._forward(x)[..., :: self.factor, :: self.factor].contiguous()

    def _adjoint(self, y: torch.Tensor) -> torch.Tensor:
        if self.boundary == "circular":
            return self._from_small_spectrum(fourier.full_fft2(y), y)
        v = y.new_zeros(len(y), *self.blur.measurement_shape)
        v[..., :: self.factor, :: self.factor] = y
        return self.blur._adjoint(v)

    @property
    def has_shifted_inverse(self) -> bool:
        """Whether the boundaries are circular."""
        return self.boundary == "circular"

    def _gram_solve(self, r: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        size = (r.shape[2], r.shape[3])
        half = self._eigenvalues(r.dtype)[..., : size[1] // 2 + 1]
        return fourier.irfft2(fourier.divide(fourier.rfft2(r), half + expand(c, r)), size)

    def _from_small_spectrum(self, small: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """`A^T y` from the spectrum of y. Zeros between the pixels repeat a spectrum s times in each direction."""
        size = self.image_shape[1:]
        half = small.repeat(1, 1, self.factor, self.factor)[..., : size[1] // 2 + 1].contiguous()
        return fourier.irfft2(self.blur.spectrum(like, size).conj_times(half), size)

    def _prox(self, z: torch.Tensor, y: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
        residual = fourier.full_fft2(y - self._forward(z))
        divisor = self._eigenvalues(z.dtype) + expand(1.0 / gamma, z)
        return z + self._from_small_spectrum(fourier.divide(residual, divisor), z)

    def _precondition(self, v: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        # Without the aliases, A^T A is the blur's divided by s^2.
        s2 = float(self.factor**2)
        return self.blur._precondition(v, c * s2) * s2

    def _eigenvalues(self, dtype: torch.dtype) -> torch.Tensor:
        """The eigenvalues of `A A^T`, `[..., H/s, W/s]`, stored until the kernel changes."""
        k, size, s = self.blur.kernel, self.image_shape[1:], self.factor
        return self._derive(("eigenvalues", dtype), [k], lambda: _alias_means(k, size, s).to(dtype))

    def _square_norms(self, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        if self.boundary != "circular":
            return super()._square_norms(device, dtype)
        return self._eigenvalues(torch.float64).amax((1, 2, 3))

    def describe(self) -> dict[str, Any]:
        """Constructor arguments."""
        return {
            "kind": "super_resolution",
            "image_shape": list(self.image_shape),
            "kernel": pack(self.blur.kernel),
            "factor": self.factor,
            "boundary": self.boundary,
        }


def _alias_means(kernel: torch.Tensor, size: tuple[int, int], s: int) -> torch.Tensor:
    """The mean of `|K|^2` over the s^2 frequencies that coincide on the small grid, float64."""
    parts = torch.view_as_real(torch.fft.fft2(fourier.embed(kernel, size)))
    power = parts.square().sum(-1)
    h, w = size
    return power.reshape(*power.shape[:-2], s, h // s, s, w // s).mean((-4, -2))


register("super_resolution", SuperResolution)
