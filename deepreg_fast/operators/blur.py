"""Convolution with a kernel: deblurring (docs/math.md, M2)."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import pad

from .. import checks
from ..ambient import outside_inference
from ..batched.linalg import expand
from ..errors import InputError
from ..functional import fourier
from .base import LinearOperator, register
from .files import pack, unpack
from .kernels import check_kernel

BOUNDARIES = ("circular", "valid", "reflect", "zero")


class Blur(LinearOperator):
    """Convolution `y = k * x`, with the center of the kernel at `(h//2, w//2)`.

    `y_i = sum_j k_j x_{i - j + center}`, a true convolution, equal to `deepinv.physics.Blur` with the same padding.
    With circular boundaries `A = F^{-1} diag(K) F`, and every closed form is exact (docs/math.md, M2). With the others,
    CG solves the systems, preconditioned by the circular ones.

    Parameters
    ----------
    image_shape : (C, H, W)
    kernel : Tensor `[h, w]`, or `[B, 1 or C, h, w]`
        One kernel, or one for each image or channel.
    boundary : "circular", "valid", "reflect" or "zero"
        What lies beyond the image: its other side, nothing (the measurements are `[B, C, H - h + 1, W - w + 1]`), its
        mirror image (without repeating the edge), or zeros.

    Raises
    ------
    InputError
        If an argument is out of range.

    Warns
    -----
    UserWarning
        If the kernel does not sum to one, or has an even size.

    Examples
    --------
    >>> import torch, deepreg_fast as dr
    >>> A = dr.Blur((1, 16, 16), torch.full((3, 3), 1 / 9))
    >>> x = torch.rand(2, 1, 16, 16)
    >>> v = A.shifted_inverse(x, 0.1)
    >>> torch.allclose(A.normal(v) + 0.1 * v, x, atol=1e-5)
    True
    """

    per_image = ("kernel",)

    @outside_inference
    def __init__(self, image_shape: tuple[int, int, int], kernel: torch.Tensor, boundary: str = "circular") -> None:
        super().__init__(image_shape, 0)
        self.boundary = checks.choice(boundary, "boundary", BOUNDARIES)
        k = check_kernel(unpack(kernel), self.image_shape)
        c, height, width = self.image_shape
        h, w = k.shape[2:]
        out = (height - h + 1, width - w + 1) if boundary == "valid" else (height, width)
        self._measurement_shape = (c, *out)
        self.measurements = c * out[0] * out[1]
        # Padding before the valid convolution: above, below, left, right.
        self._margins = (h - 1 - h // 2, h // 2, w - 1 - w // 2, w // 2)
        if boundary == "reflect" and (max(self._margins[:2]) >= height or max(self._margins[2:]) >= width):
            raise InputError(
                f"boundary='reflect' needs images larger than half the kernel, but the images are {height} x {width} "
                f"and the kernel {h} x {w}; use 'circular' or 'zero'."
            )
        if len(k) > 1:
            self.batch = len(k)
        self.register_buffer("kernel", k)
        self.kernel: torch.Tensor

    def spectrum(self, like: torch.Tensor, size: tuple[int, int]) -> fourier.Spectrum:
        """The kernel's spectrum on a grid of `size`, stored until the kernel changes."""
        kernel, dtype = self.kernel, like.dtype
        return self._derive((size, dtype), [kernel], lambda: fourier.Spectrum(kernel, size, dtype))

    def _convolve(self, x: torch.Tensor) -> torch.Tensor:
        size = (x.shape[2], x.shape[3])
        return fourier.irfft2(self.spectrum(x, size).times(fourier.rfft2(x)), size)

    def _correlate(self, x: torch.Tensor) -> torch.Tensor:
        size = (x.shape[2], x.shape[3])
        return fourier.irfft2(self.spectrum(x, size).conj_times(fourier.rfft2(x)), size)

    def _forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.boundary == "circular":
            return self._convolve(x)
        # A circular convolution is the valid one wherever the kernel does not cross the edge.
        above, below, left, right = self._margins
        wide = self._extend(x)
        return self._convolve(wide)[..., above : wide.shape[2] - below, left : wide.shape[3] - right].contiguous()

    def _adjoint(self, y: torch.Tensor) -> torch.Tensor:
        if self.boundary == "circular":
            return self._correlate(y)
        above, below, left, right = self._margins
        return self._fold(self._correlate(pad(y, (left, right, above, below))))

    def _extend(self, x: torch.Tensor) -> torch.Tensor:
        above, below, left, right = self._margins
        if self.boundary == "valid":
            return x
        margins = (left, right, above, below)
        return pad(x, margins, mode="reflect") if self.boundary == "reflect" else pad(x, margins)

    def _fold(self, wide: torch.Tensor) -> torch.Tensor:
        """The adjoint of `_extend`."""
        above, below, left, right = self._margins
        if self.boundary == "valid":
            return wide
        for dim, (low, high) in ((2, (above, below)), (3, (left, right))):
            n = wide.shape[dim] - low - high
            inner = wide.narrow(dim, low, n)
            if self.boundary == "reflect":
                inner = inner.clone()
                inner.narrow(dim, 1, low).add_(wide.narrow(dim, 0, low).flip(dim))
                inner.narrow(dim, n - 1 - high, high).add_(wide.narrow(dim, low + n, high).flip(dim))
            wide = inner
        return wide.contiguous()

    def _normal(self, x: torch.Tensor) -> torch.Tensor:
        if self.boundary != "circular":
            return super()._normal(x)
        size = self.image_shape[1:]
        return fourier.irfft2(fourier.scale(fourier.rfft2(x), self.spectrum(x, size).power), size)

    @property
    def has_shifted_inverse(self) -> bool:
        """Whether the boundaries are circular."""
        return self.boundary == "circular"

    def _shifted_inverse(self, v: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        size = self.image_shape[1:]
        spectrum = self.spectrum(v, size)
        return fourier.irfft2(fourier.divide(fourier.rfft2(v), spectrum.power + expand(c, v)), size)

    _precondition = _shifted_inverse  # the same on the grid of the image, whatever the boundaries

    def _gram_solve(self, r: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        return self._shifted_inverse(r, c)

    def _prox(self, z: torch.Tensor, y: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
        # Two transforms and one of y; the products one after the other would take six.
        size = self.image_shape[1:]
        spectrum = self.spectrum(z, size)
        residual = self._transform_once(y, fourier.rfft2) - spectrum.times(fourier.rfft2(z))
        step = fourier.divide(spectrum.conj_times(residual), spectrum.power + expand(1.0 / gamma, z))
        return z + fourier.irfft2(step, size)

    def _square_norms(self, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        if self.boundary != "circular":
            return super()._square_norms(device, dtype)
        return self.spectrum(self.kernel.double(), self.image_shape[1:]).power.amax((1, 2, 3))

    def describe(self) -> dict[str, Any]:
        """Constructor arguments."""
        return {
            "kind": "blur",
            "image_shape": list(self.image_shape),
            "kernel": pack(self.kernel),
            "boundary": self.boundary,
        }


register("blur", Blur)
