"""Samples of the Fourier transform of a real image (docs/math.md, M2)."""

from __future__ import annotations

from typing import Any

import torch

from ..ambient import outside_inference
from ..batched.linalg import expand
from ..functional import fourier
from .base import LinearOperator, register
from .files import pack, unpack
from .inpainting import check_mask


class FourierSampling(LinearOperator):
    """`y = M F x`: the orthonormal 2-D Fourier transform of a real image, at the frequencies of the mask.

    Both origins are in the middle, as in `deepinv.physics.MRI`. The measurements are real: C real parts, then C
    imaginary parts, `[B, 2 C, H, W]`, zero outside of the mask. `A^T A` is a circular convolution, whose eigenvalues
    are the means of the mask at k and -k, so every closed form is exact (docs/math.md, M2).

    Parameters
    ----------
    mask : Tensor `[H, W]`, `[C, H, W]`, or `[B, C, H, W]` for one mask per image
        Zeros and ones, of any dtype, with the lowest frequency at `(H//2, W//2)`.

    Raises
    ------
    InputError
        If the mask has another shape, holds other values, or keeps no frequency of some image.

    Examples
    --------
    >>> import torch, deepreg_fast as dr
    >>> A = dr.FourierSampling(torch.ones(1, 8, 8))
    >>> x = torch.rand(2, 1, 8, 8)
    >>> y = A.A(x)
    >>> y.shape, torch.allclose(A.A_adjoint(y), x, atol=1e-5)
    (torch.Size([2, 2, 8, 8]), True)
    """

    per_image = ("mask",)

    @outside_inference
    def __init__(self, mask: torch.Tensor) -> None:
        mask = unpack(mask)
        if isinstance(mask, torch.Tensor) and mask.ndim == 2:
            mask = mask[None]
        m = check_mask(mask)
        c, h, w = m.shape[-3:]
        super().__init__((c, h, w), (2 * c, h, w))
        if m.ndim == 4:
            self.batch = len(m)
        self.register_buffer("mask", m)
        self.mask: torch.Tensor

    def _forward(self, x: torch.Tensor) -> torch.Tensor:
        return _channels(torch.where(self.mask, fourier.fft2(x), 0.0))

    def _adjoint(self, y: torch.Tensor) -> torch.Tensor:
        real, imaginary = y.chunk(2, 1)
        return fourier.ifft2(torch.where(self.mask, torch.complex(real, imaginary), 0.0)).real.contiguous()

    def _normal(self, x: torch.Tensor) -> torch.Tensor:
        return fourier.irfft2(fourier.scale(fourier.rfft2(x), self._eigenvalues(x.dtype)), self.image_shape[1:])

    @property
    def has_shifted_inverse(self) -> bool:
        """Always True."""
        return True

    def _shifted_inverse(self, v: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        divisor = self._eigenvalues(v.dtype) + expand(c, v)
        return fourier.irfft2(fourier.divide(fourier.rfft2(v), divisor), self.image_shape[1:])

    def _gram_solve(self, r: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        return (r - self._forward(self._shifted_inverse(self._adjoint(r), c))) / expand(c, r)

    def _prox(self, z: torch.Tensor, y: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
        # A^T (A A^T + c I)^{-1} = (A^T A + c I)^{-1} A^T.
        eigenvalues, m = self._eigenvalues(z.dtype), self.mask
        stamp = m.data_ptr(), m._version
        back = self._transform_once(y, lambda t: fourier.rfft2(self._adjoint(t)), stamp)
        residual = back - fourier.scale(fourier.rfft2(z), eigenvalues)
        step = fourier.divide(residual, eigenvalues + expand(1.0 / gamma, z))
        return z + fourier.irfft2(step, self.image_shape[1:])

    def A_dagger(self, y: torch.Tensor) -> torch.Tensor:
        """`(A^T A)^+ A^T y`."""
        size, v = self.image_shape[1:], self.A_adjoint(y)
        eigenvalues = self._eigenvalues(v.dtype)
        inverse = torch.where(eigenvalues > 0, 1.0 / eigenvalues.clamp_min(0.5), 0.0)
        return fourier.irfft2(fourier.scale(fourier.rfft2(v), inverse), size)

    def _eigenvalues(self, dtype: torch.dtype) -> torch.Tensor:
        """`(M(k) + M(-k)) / 2` at the frequencies of `rfft2`, stored until the mask changes."""
        m = self.mask
        return self._derive(("eigenvalues", dtype), [m], lambda: _pair_means(m).to(dtype))

    def _square_norms(self, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        eigenvalues = self._eigenvalues(torch.float64)
        return eigenvalues.amax((1, 2, 3)) if eigenvalues.ndim == 4 else eigenvalues.amax().reshape(1)

    def as_image(self, y: torch.Tensor) -> torch.Tensor:
        """`log(1 + |y| / mean |y|)` of each frequency, `[B, C, H, W]`, the lowest one in the middle."""
        real, imaginary = self._measured(y, "y").chunk(2, 1)
        size = (real.square() + imaginary.square()).sqrt()
        return torch.log1p(size / size.mean((1, 2, 3), keepdim=True).clamp_min(torch.finfo(size.dtype).tiny))

    def describe(self) -> dict[str, Any]:
        """Constructor arguments."""
        return {"kind": "fourier_sampling", "mask": pack(self.mask)}


def _channels(z: torch.Tensor) -> torch.Tensor:
    return torch.cat([z.real, z.imag], 1)


def _pair_means(mask: torch.Tensor) -> torch.Tensor:
    m = torch.fft.ifftshift(mask.double(), dim=(-2, -1))
    opposite = torch.roll(m.flip(-2, -1), (1, 1), (-2, -1))
    return (0.5 * (m + opposite))[..., : m.shape[-1] // 2 + 1].contiguous()


register("fourier_sampling", FourierSampling)
