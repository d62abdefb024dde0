"""Parallel-beam computed tomography (docs/math.md, M2)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import pad

from .. import checks
from ..ambient import full_precision
from ..autograd import tomography as products
from ..batched.linalg import expand
from ..errors import InputError
from ..functional import fourier
from ..functional.tomography import Geometry, default_detectors, ramp, uniform_angles
from .base import LinearOperator, register


class Tomography(LinearOperator):
    """Parallel-beam projections `y[a, d]`: integrals along the lines `x cos(a) + y sin(a) = d - (detectors - 1)/2`.

    Pixels and detectors have size one, the origin is the center of the image, x points to the right and y up, as in
    ASTRA's `parallel` geometry; at angle zero a projection holds the column sums. Each line is sampled once per row, or
    per column if it is closer to the horizontal, with linear interpolation (Joseph 1982), as by ASTRA's `linear`
    projector. `||A||^2` is about the number of angles times the width; `s * A` is an operator with another norm.

    `A^T A` is close to division by the frequency, so CG solves for the proximal map with a filter as preconditioner.

    Parameters
    ----------
    image_shape : (C, H, W)
    angles : int, or sequence of float
        In degrees; an integer n means n angles spread over half a turn, `180 i / n`.
    detectors : int, optional
        Default: `ceil(sqrt(H^2 + W^2))`, with which each pixel is seen at every angle.

    Raises
    ------
    InputError
        If an argument is out of range.

    Examples
    --------
    >>> import torch, deepreg_fast as dr
    >>> A = dr.Tomography((1, 16, 16), angles=12)
    >>> x = torch.rand(2, 1, 16, 16)
    >>> A.A(x).shape
    torch.Size([2, 1, 12, 23])
    >>> torch.allclose(A.A(x)[:, :, 0].sum(-1), x.sum((2, 3)), rtol=1e-4)
    True
    """

    def __init__(
        self, image_shape: tuple[int, int, int], angles: int | Sequence[float], detectors: int | None = None
    ) -> None:
        super().__init__(image_shape, 0)
        c, h, w = self.image_shape
        if detectors is None:
            detectors = default_detectors(h, w)
        detectors = checks.integer(detectors, "detectors", 1)
        self.geometry = Geometry(h, w, _angles(angles), detectors)
        self._measurement_shape = (c, len(self.geometry.angles), detectors)
        self.measurements = math.prod(self._measurement_shape)

    def _forward(self, x: torch.Tensor) -> torch.Tensor:
        return products.project(x, self.geometry)

    def _adjoint(self, y: torch.Tensor) -> torch.Tensor:
        return products.back_project(y, self.geometry)

    def _precondition(self, v: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        """Division by `angles / (pi |f|) + c` on a grid of twice the size."""
        h, w = v.shape[-2:]
        size = (2 * h, 2 * w)
        f = self._derive(("frequencies", v.dtype, v.device), [], lambda: _frequencies(size, v))
        divisor = f * expand(c, v) + len(self.geometry.angles) / math.pi
        filtered = fourier.divide(fourier.scale(fourier.rfft2(pad(v, (0, w, 0, h))), f), divisor)
        return fourier.irfft2(filtered, size)[..., :h, :w].contiguous()

    @full_precision
    def fbp(self, y: torch.Tensor) -> torch.Tensor:
        """Filtered back projection with the ramp filter: an approximate inverse for angles evenly spread over half
        turns, and a start `x0` of recoveries."""
        y = self._measured(y, "y")
        n = 2 ** math.ceil(math.log2(2 * y.shape[-1]))
        f = self._derive(("ramp", n, y.dtype, y.device), [], lambda: ramp(n, y.dtype, y.device))
        spectrum = fourier.scale(torch.fft.rfft(pad(y, (0, n - y.shape[-1]))), f)
        filtered = torch.fft.irfft(spectrum, n=n)[..., : y.shape[-1]].contiguous()
        return self._adjoint(filtered) * (math.pi / len(self.geometry.angles))

    def A_dagger(self, y: torch.Tensor) -> torch.Tensor:
        """`fbp(y)`, an approximation: the minimum-norm solution amplifies noise without bound."""
        return self.fbp(y)

    def describe(self) -> dict[str, Any]:
        """Constructor arguments."""
        return {
            "kind": "tomography",
            "image_shape": list(self.image_shape),
            "angles": list(self.geometry.angles),
            "detectors": self.geometry.detectors,
        }


def _angles(angles: object) -> tuple[float, ...]:
    if isinstance(angles, int):
        return tuple(uniform_angles(checks.integer(angles, "angles", 1)))
    values = angles.tolist() if hasattr(angles, "tolist") else angles  # type: ignore[attr-defined]
    if not isinstance(values, (list, tuple)) or not values:
        raise InputError(f"angles must be a number of angles or a list of degrees, but is {checks.describe(angles)}.")
    return tuple(checks.number(a, "every angle", -math.inf) for a in values)


def _frequencies(size: tuple[int, int], like: torch.Tensor) -> torch.Tensor:
    """`|f|` in cycles per pixel at the frequencies of `rfft2`; a quarter of the lowest one for zero."""
    h, w = size
    f = torch.hypot(
        torch.fft.fftfreq(h, dtype=torch.float64, device=like.device)[:, None],
        torch.fft.rfftfreq(w, dtype=torch.float64, device=like.device),
    )
    f[0, 0] = 0.25 / max(h, w)
    return f.to(like.dtype)


register("tomography", Tomography)
