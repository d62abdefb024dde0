"""Magnetic resonance imaging on a Cartesian grid: one coil, or several with their sensitivities (docs/math.md, M2)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from .. import checks
from ..ambient import outside_inference
from ..batched.linalg import expand
from ..errors import InputError
from ..functional import fourier
from .base import LinearOperator, register
from .files import pack, unpack
from .inpainting import check_mask


class MRI(LinearOperator):
    """`y = M F S x`: the orthonormal Fourier transform of a complex image times each coil's sensitivity, masked by M.

    Complex numbers are two channels, the real part first, and both origins are in the middle: as `deepinv.physics.MRI`
    without coils, with measurements `[B, 2, H, W]`, and as `MultiCoilMRI` with them, `[B, 2, coils, H, W]`. Without
    coils every closed form is exact. With them CG solves the systems, with the circulant matrix nearest to `A^T A` as
    preconditioner.

    Parameters
    ----------
    mask : Tensor `[H, W]`, or `[B, 1, H, W]` for one mask per image
        Zeros and ones, of any dtype, with the lowest frequency at `(H//2, W//2)`.
    coil_maps : complex Tensor `[coils, H, W]`, or `[B, coils, H, W]` for those of each image, optional
        Or real with the parts first, `[2, coils, H, W]` or `[B, 2, coils, H, W]`.

    Raises
    ------
    InputError
        If an argument has another shape or other values.

    Examples
    --------
    >>> import torch, deepreg_fast as dr
    >>> from deepreg_fast.operators import cartesian_mask, simulate_coil_maps
    >>> A = dr.MRI(cartesian_mask((32, 32), 4), simulate_coil_maps((32, 32), 8))
    >>> A.A(torch.rand(3, 2, 32, 32)).shape
    torch.Size([3, 2, 8, 32, 32])
    """

    @outside_inference
    def __init__(self, mask: torch.Tensor, coil_maps: torch.Tensor | None = None) -> None:
        mask = unpack(mask)
        m = check_mask(mask[None] if isinstance(mask, torch.Tensor) and mask.ndim == 2 else mask)
        if m.shape[-3] != 1:
            raise InputError(f"mask must be [H, W], or [B, 1, H, W] for one per image, but has shape {list(m.shape)}.")
        h, w = m.shape[-2:]
        maps = None if coil_maps is None else _check_maps(unpack(coil_maps), h, w)
        super().__init__((2, h, w), (2, h, w) if maps is None else (2, maps.shape[-3], h, w))
        batches = {"mask": len(m) if m.ndim == 4 else None}
        batches["coil_maps"] = len(maps) if maps is not None and maps.ndim == 5 else None
        sizes = {n for n in batches.values() if n is not None}
        if len(sizes) > 1:
            raise InputError(f"mask and coil_maps must be for one number of images, but are for {sorted(sizes)}.")
        self.batch = sizes.pop() if sizes else None
        self.per_image = tuple(name for name, n in batches.items() if n is not None)
        self.register_buffer("mask", m)
        self.register_buffer("coil_maps", maps)
        self.mask: torch.Tensor
        self.coil_maps: torch.Tensor | None

    def _forward(self, x: torch.Tensor) -> torch.Tensor:
        maps = self._maps(x)
        if maps is None:
            return _planes(torch.where(self._complex_mask(), fourier.fft2(_complex(x)), 0.0))
        return _planes(torch.where(self._complex_mask(), fourier.fft2(_complex(_times(maps, x[:, :, None]))), 0.0))

    def _adjoint(self, y: torch.Tensor) -> torch.Tensor:
        images = _planes(fourier.ifft2(torch.where(self._complex_mask(), _complex(y), 0.0)))
        maps = self._maps(y)
        return images if maps is None else _sum_coils(_conj_times(maps, images))

    def _complex_mask(self) -> torch.Tensor:
        """The mask beside complex images `[B, H, W]`, or `[B, coils, H, W]`."""
        return self.mask if self.coil_maps is not None or self.mask.ndim == 3 else self.mask[:, 0]

    def _maps(self, like: torch.Tensor) -> torch.Tensor | None:
        return None if self.coil_maps is None else self.coil_maps.to(like.dtype)

    @property
    def has_shifted_inverse(self) -> bool:
        """Whether there is one coil without a sensitivity."""
        return self.coil_maps is None

    def _gram_solve(self, r: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        s = expand(c, r)
        return torch.where(self.mask, r / (1.0 + s), r / s)

    def _shifted_inverse(self, v: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        spectrum = _planes(fourier.fft2(_complex(v)))
        return _planes(fourier.ifft2(_complex(self._gram_solve(spectrum, c))))

    def _prox(self, z: torch.Tensor, y: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
        g = expand(gamma, z)
        return z + self._adjoint(g / (1.0 + g) * (y - self._forward(z)))

    def _precondition(self, v: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        eigenvalues = self._derive(("circulant", v.dtype), self._used(), lambda: self._circulant().to(v.dtype))
        spectrum = _planes(fourier.fft2(_complex(v)))
        return _planes(fourier.ifft2(_complex(spectrum / (eigenvalues + expand(c, v)))))

    def _circulant(self) -> torch.Tensor:
        """The diagonal of `F A^T A F^T`, `[1 or B, 1, H, W]`: the mask, correlated with the power spectra of the
        sensitivities."""
        assert self.coil_maps is not None
        maps = self.coil_maps.double()
        maps = maps if maps.ndim == 5 else maps[None]
        power = fourier.fft2(_complex(maps)).abs().square().sum(1, keepdim=True)
        mask = self.mask.double().reshape(-1, 1, *self.mask.shape[-2:])
        pair = (
            torch.fft.fft2(torch.fft.ifftshift(mask, dim=(-2, -1)))
            * torch.fft.fft2(torch.fft.ifftshift(power, dim=(-2, -1))).conj()
        )
        means = torch.fft.ifft2(pair).real / power.shape[-2:].numel()
        return torch.fft.fftshift(means, dim=(-2, -1)).clamp_min(0.0)

    def _used(self) -> list[torch.Tensor]:
        return [t for t in (self.mask, self.coil_maps) if t is not None]

    def A_dagger(self, y: torch.Tensor) -> torch.Tensor:
        """Without coils `A^T y`. With them the solution of least squares with a small shift, as in the base class."""
        if self.coil_maps is None:
            return self.A_adjoint(y)
        return self.shifted_inverse(self.A_adjoint(y), torch.finfo(y.dtype).eps ** 0.5 * self.sqnorm())

    def _square_norms(self, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        if self.coil_maps is None:
            return torch.ones(1, dtype=torch.float64, device=device)
        return super()._square_norms(device, dtype)

    def as_image(self, y: torch.Tensor) -> torch.Tensor:
        """`log(1 + |y| / mean |y|)` of each frequency over all coils, `[B, 1, H, W]`, the lowest one in the middle."""
        square = self._measured(y, "y").square().sum(1)
        size = (square if square.ndim == 3 else square.sum(1)).sqrt()[:, None]
        return torch.log1p(size / size.mean((1, 2, 3), keepdim=True).clamp_min(torch.finfo(size.dtype).tiny))

    def describe(self) -> dict[str, Any]:
        """Constructor arguments."""
        maps = {} if self.coil_maps is None else {"coil_maps": pack(self.coil_maps)}
        return {"kind": "mri", "mask": pack(self.mask), **maps}


def _complex(x: torch.Tensor) -> torch.Tensor:
    """`[B, 2, ...]` as complex `[B, ...]`."""
    return torch.complex(x[:, 0], x[:, 1])


def _planes(z: torch.Tensor) -> torch.Tensor:
    return torch.stack([z.real, z.imag], 1)


# Real products, because PyTorch's complex product has different code at the end of a vector (functional/fourier.py).


def _times(s: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """`s x`; s `[2, N, H, W]` or `[B, 2, N, H, W]`, x `[B, 2, 1, H, W]`."""
    sr, si, xr, xi = s.select(-4, 0), s.select(-4, 1), x[:, 0], x[:, 1]
    return torch.stack([sr * xr - si * xi, sr * xi + si * xr], 1)


def _conj_times(s: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """`conj(s) x`; x `[B, 2, N, H, W]`."""
    sr, si, xr, xi = s.select(-4, 0), s.select(-4, 1), x[:, 0], x[:, 1]
    return torch.stack([sr * xr + si * xi, sr * xi - si * xr], 1)


def _sum_coils(x: torch.Tensor) -> torch.Tensor:
    """`[B, 2, N, H, W] -> [B, 2, H, W]`, one coil after the other, in any batch."""
    total, *rest = x.unbind(2)
    for image in rest:
        total = total + image
    return total


def _check_maps(maps: object, h: int, w: int) -> torch.Tensor:
    if isinstance(maps, torch.Tensor) and maps.is_complex() and maps.ndim in (3, 4):
        maps = torch.stack([maps.real, maps.imag], -4)
    good = isinstance(maps, torch.Tensor) and maps.is_floating_point() and maps.ndim in (4, 5)
    if not good or maps.shape[-4] != 2 or maps.shape[-3] < 1 or maps.shape[-2:] != (h, w):  # type: ignore[union-attr]
        raise InputError(
            f"coil_maps must be complex [coils, {h}, {w}], or [B, coils, {h}, {w}] for those of each image, but is "
            f"{checks.describe(maps)}."
        )
    assert isinstance(maps, torch.Tensor)
    if not bool(torch.isfinite(maps).all()):
        raise InputError("coil_maps must be finite, but has NaN or infinite values; set them to zero.")
    return maps.detach().clone()


def simulate_coil_maps(size: tuple[int, int], coils: int = 8, radius: float = 1.5) -> torch.Tensor:
    """Simulated sensitivities of coils on a circle around the image ("birdcage"), complex128 `[coils, H, W]`.

    Coil n is at `radius` half widths from the center, at angle `2 pi n / coils`. Its sensitivity falls with the
    distance, its phase turns with the direction. The sum of `|S_n|^2` is one at every pixel, so `||A|| <= 1`.

    Raises
    ------
    InputError
        If an argument is out of range.
    """
    h, w = (checks.integer(n, "every size", 1) for n in size)
    n = checks.integer(coils, "coils", 1)
    radius = checks.number(radius, "radius", 0.0, open_low=True)
    turn = 2.0 * np.pi * np.arange(n)[:, None, None] / n
    y, x = (np.arange(h)[:, None] - h / 2) / (h / 2), (np.arange(w) - w / 2) / (w / 2)
    dx, dy = x - radius * np.cos(turn), y - radius * np.sin(turn)
    maps = np.exp(1j * (np.arctan2(dx, -dy) - turn)) / np.maximum(np.hypot(dx, dy), 1e-6)
    return torch.from_numpy(maps / np.sqrt((np.abs(maps) ** 2).sum(0)))


def cartesian_mask(
    size: tuple[int, int], acceleration: float = 4.0, center: float = 0.08, seed: int = 0
) -> torch.Tensor:
    """Whole columns of k-space, as fastMRI's random masks: the `center` fraction in the middle, and others at random.

    bool `[H, W]` with `max(1, round(W / acceleration))` columns, the same on every platform. fastMRI uses
    (4, 0.08) and (8, 0.04).

    Raises
    ------
    InputError
        If an argument is out of range.
    """
    h, w = (checks.integer(n, "every size", 1) for n in size)
    count = max(1, round(w / checks.number(acceleration, "acceleration", 1.0)))
    middle = min(count, round(w * checks.number(center, "center", 0.0, 1.0)))
    keys = np.random.PCG64(np.random.SeedSequence([checks.integer(seed, "seed", 0), 11])).random_raw(w)
    first = w // 2 - middle // 2
    columns = np.zeros(w, dtype=bool)
    columns[first : first + middle] = True
    order = np.argsort(keys, kind="stable")
    columns[order[~columns[order]][: count - middle]] = True
    return torch.from_numpy(columns).expand(h, w).clone()


register("mri", MRI)
