"""Fourier transforms of real images, and circular convolution (docs/math.md, M2)."""

from __future__ import annotations

from collections.abc import Callable

import torch


def rfft2(x: torch.Tensor) -> torch.Tensor:
    """The half spectrum of each image, `[..., H, W] -> [..., H, W//2 + 1]`, complex."""
    return _alike(torch.fft.rfft2, x)


def irfft2(spectrum: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """The inverse of `rfft2` for images of `size` (H, W)."""
    return _alike(lambda s: torch.fft.irfft2(s, s=size), spectrum)


def full_fft2(x: torch.Tensor) -> torch.Tensor:
    """The whole spectrum of each real image, `[..., H, W]`, complex."""
    return _alike(torch.fft.fft2, x)


def fft2(x: torch.Tensor) -> torch.Tensor:
    """The orthonormal transform of each real or complex image with both origins in the middle, complex."""
    return torch.fft.fftshift(_alike(_orthonormal, torch.fft.ifftshift(x, dim=(-2, -1))), dim=(-2, -1))


def ifft2(spectrum: torch.Tensor) -> torch.Tensor:
    """The inverse of `fft2`, complex."""
    shifted = torch.fft.ifftshift(spectrum, dim=(-2, -1))
    return torch.fft.fftshift(_alike(_orthonormal_inverse, shifted), dim=(-2, -1))


class Spectrum:
    """The half spectrum `K` of a kernel, to multiply others by.

    Torch's complex product has other code at the end of a vector, so the bits of an image would depend on its place in
    the batch. Here each part is a product and a sum of real numbers, rounded one by one.

    Attributes
    ----------
    power : Tensor `[..., H, W//2 + 1]`
        `|K|^2`.
    """

    def __init__(self, kernel: torch.Tensor, size: tuple[int, int], dtype: torch.dtype) -> None:
        """Of `kernel` `[..., h, w]` on an H x W grid, its center `(h//2, w//2)` at the origin; computed in float64."""
        parts = torch.view_as_real(rfft2(embed(kernel, size)))
        self.power = parts.square().sum(-1).to(dtype)
        self._real = parts[..., :1].to(dtype).contiguous()
        self._imaginary = torch.cat([-parts[..., 1:], parts[..., 1:]], -1).to(dtype)

    def times(self, x: torch.Tensor) -> torch.Tensor:
        """`K x` for a complex x."""
        x = torch.view_as_real(x)
        return torch.view_as_complex(x * self._real + x.flip(-1) * self._imaginary)

    def conj_times(self, x: torch.Tensor) -> torch.Tensor:
        """`conj(K) x` for a complex x."""
        x = torch.view_as_real(x)
        return torch.view_as_complex(x * self._real - x.flip(-1) * self._imaginary)


def scale(x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """`factor x` for a complex x and a real factor."""
    return torch.view_as_complex(torch.view_as_real(x) * factor.unsqueeze(-1))


def divide(x: torch.Tensor, divisor: torch.Tensor) -> torch.Tensor:
    """`x / divisor` for a complex x and a real divisor."""
    return torch.view_as_complex(torch.view_as_real(x) / divisor.unsqueeze(-1))


def embed(kernel: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """The kernel on an H x W grid of zeros with its center at the origin, float64."""
    h, w = kernel.shape[-2:]
    grid = torch.zeros(*kernel.shape[:-2], *size, dtype=torch.float64, device=kernel.device)
    grid[..., :h, :w] = kernel
    return torch.roll(grid, (-(h // 2), -(w // 2)), (-2, -1))


def _orthonormal(x: torch.Tensor) -> torch.Tensor:
    return torch.fft.fft2(x, norm="ortho")


def _orthonormal_inverse(x: torch.Tensor) -> torch.Tensor:
    return torch.fft.ifft2(x, norm="ortho")


def _alike(transform: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """The transform of each image by the same code for any batch size. MKL has other code for a single transform, whose
    last bits differ, so a single image is transformed twice."""
    if x.shape[:-2].numel() != 1 or x.device.type != "cpu":
        return transform(x)
    return transform(torch.stack([x, x]))[0]
