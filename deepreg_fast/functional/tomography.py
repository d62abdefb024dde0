"""Parallel-beam projections with linear weights (Joseph 1982), and their adjoint (docs/math.md, M2)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.nn.functional import pad

_PAD = 2


class Rays(NamedTuple):
    """The rays of one angle, which cross the rows of the image, or its columns if `transposed`.

    Detector d, counted backwards if `reversed`, meets line i of n at pixel
    `slope (d - (D-1)/2) + tilt (i - (n-1)/2) + (m-1)/2` of m, with `1 <= slope <= sqrt(2)` and `|tilt| <= 1`.
    """

    transposed: bool
    reversed: bool
    slope: float
    tilt: float


class Geometry(NamedTuple):
    """Image size, angles in degrees, and number of detectors."""

    height: int
    width: int
    angles: tuple[float, ...]
    detectors: int

    def rays(self) -> list[Rays]:
        """The rays of each angle: across rows where they are closer to the vertical, else across columns."""
        every = []
        for angle in self.angles:
            c, s = math.cos(math.radians(angle)), math.sin(math.radians(angle))
            if abs(c) >= abs(s):
                every.append(Rays(False, c < 0, 1.0 / abs(c), s / c))
            else:
                every.append(Rays(True, s > 0, 1.0 / abs(s), c / s))
        return every

    def first_places(self, rays: Rays, device: torch.device) -> torch.Tensor:
        """Where detector 0 meets each line, float64 `[n]`."""
        n, m = (self.width, self.height) if rays.transposed else (self.height, self.width)
        lines = torch.arange(n, dtype=torch.float64, device=device) - (n - 1) / 2
        return rays.tilt * lines + ((m - 1) / 2 - rays.slope * (self.detectors - 1) / 2)


def project(x: torch.Tensor, geometry: Geometry) -> torch.Tensor:
    """`A x`, `[B, C, H, W] -> [B, C, angles, detectors]`."""
    d = torch.arange(geometry.detectors, dtype=torch.float64, device=x.device)
    upright, transposed = pad(x, (_PAD, _PAD)), pad(x.mT, (_PAD, _PAD))
    out = []
    for rays in geometry.rays():
        image = transposed if rays.transposed else upright
        n, m = image.shape[-2], image.shape[-1] - 2 * _PAD
        place = rays.slope * d + geometry.first_places(rays, x.device)[:, None]
        lower = place.floor()
        part = place - lower
        k = (lower.long() + _PAD).clamp(0, m + _PAD) + torch.arange(n, dtype=torch.int64, device=x.device)[
            :, None
        ] * image.shape[-1]
        flat = image.flatten(-2)
        sums = _sum_lines((1.0 - part).to(x.dtype) * flat[..., k] + part.to(x.dtype) * flat[..., k + 1])
        out.append(rays.slope * (sums.flip(-1) if rays.reversed else sums))
    return torch.stack(out, -2)


def back_project(y: torch.Tensor, geometry: Geometry) -> torch.Tensor:
    """`A^T y`, `[B, C, angles, detectors] -> [B, C, H, W]`: each pixel collects from the at most two detectors that
    have weight on it, so that no order of additions is left to the device."""
    sums: dict[bool, torch.Tensor | None] = {False: None, True: None}
    for rays, values in zip(geometry.rays(), y.unbind(-2), strict=True):
        m = geometry.height if rays.transposed else geometry.width
        data = rays.slope * pad(values.flip(-1) if rays.reversed else values, (_PAD, _PAD))
        j = torch.arange(m, dtype=torch.float64, device=y.device)
        first = geometry.first_places(rays, y.device)[:, None]
        detector = ((j - 1.0 - first) / rays.slope).floor() + 1.0
        distance = rays.slope * detector + first - j
        near, far = (1.0 - distance.abs()).clamp_min(0.0), (1.0 - (distance + rays.slope).abs()).clamp_min(0.0)
        k = (detector.long() + _PAD).clamp(0, geometry.detectors + _PAD)
        term = near.to(y.dtype) * data[..., k] + far.to(y.dtype) * data[..., k + 1]
        before = sums[rays.transposed]
        sums[rays.transposed] = term if before is None else before + term
    rows, columns = sums[False], sums[True]
    if columns is None:
        assert rows is not None
        return rows
    return columns.mT if rows is None else rows + columns.mT


def ramp(count: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The transform of the band-limited ramp filter on a circle of `count` detectors (Kak, Slaney 1988, 3.3)."""
    n = torch.fft.fftfreq(count, 1.0 / count, dtype=torch.float64, device=device).round()
    odd = n.long() % 2 != 0
    kernel = torch.where(odd, -1.0 / (math.pi * n).square().clamp_min(1e-30), 0.0)
    kernel[0] = 0.25
    return torch.fft.rfft(kernel).real.to(dtype)


def _sum_lines(t: torch.Tensor) -> torch.Tensor:
    """The sum over dimension -2 by halves: `torch.sum` has another order for other batches and threads."""
    while t.shape[-2] > 1:
        half = t.shape[-2] // 2
        t, rest = t[..., :half, :] + t[..., half : 2 * half, :], t[..., 2 * half :, :]
        if rest.shape[-2]:
            t = torch.cat([t[..., :-1, :], t[..., -1:, :] + rest], -2)
    return t[..., 0, :]


def default_detectors(height: int, width: int) -> int:
    """Enough to see every pixel at every angle."""
    return math.ceil(math.hypot(height, width))


def uniform_angles(count: int) -> Sequence[float]:
    """`count` angles over half a turn, in degrees, the first one zero."""
    return [180.0 * i / count for i in range(count)]
