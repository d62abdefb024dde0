"""Convex and weakly convex ridge energies: filters, then a scalar profile of each response (Goujon et al. 2022, 2024).

`r(u) = sum_i sum_p psi_i((W_i * u)_p)` with zero padding. Goujon et al. learn psi_i' as a linear spline on a grid of
knots. Here it is a sum of smooth steps at fixed scales `s_1 < ... < s_K`,

    psi_i'(t) = sum_k c_ik t / sqrt(1 + (s_k t)^2),     psi_i(t) = sum_k c_ik (sqrt(1 + (s_k t)^2) - 1) / s_k^2,

because the bi-level gradient needs products with psi_i''. A spline's psi_i'' jumps at the knots. This one is smooth,
`psi_i''(t) = sum_k c_ik (1 + (s_k t)^2)^(-3/2)`, and needs neither a grid, which responses could leave, nor the
spline's projections.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..ambient import outside_inference
from .conv_chain import per_image
from .dct import dct_matrix
from .unaltered import alteration, plain_numbers

FINEST, COARSEST = 300.0, 3.0


def scales_of(count: int) -> tuple[float, ...]:
    """`count` scales from 3 to 300 in equal ratios (30 if one): the range of pixel differences in [0, 1]."""
    if count == 1:
        return (math.sqrt(FINEST * COARSEST),)
    return tuple(COARSEST * (FINEST / COARSEST) ** (k / (count - 1)) for k in range(count))


def nested_dct(count: int, size: int, channels: int = 1) -> torch.Tensor:
    """`[count, channels, size, size]`: orthonormal 2-D DCT bases of sides 3, 5, ..., `size` without their constants.

    Each is centered in a filter. They are sorted by frequency within each side, and repeated if `count` is larger. The
    low frequencies of the largest basis alone would not penalize the finest details of an image. Each of them takes
    turns over the channels' DCT: of three colors, that is luma and two chromas.
    """
    bases = []
    for side in range(3, size + 1, 2):
        c = dct_matrix(side, torch.float64, torch.device("cpu"))
        order = sorted(((i, j) for i in range(side) for j in range(side) if i + j), key=lambda ij: (sum(ij), ij))
        edge = (size - side) // 2
        bases += [F.pad(torch.outer(c[i], c[j]), [edge] * 4) for i, j in order]
    mix = dct_matrix(channels, torch.float64, torch.device("cpu")) if channels > 1 else bases[0].new_ones(1, 1)
    turns = (divmod(n, channels) for n in range(count))
    return torch.stack([mix[c][:, None, None] * bases[n % len(bases)] for n, c in turns]).float()


def inverse_softplus(a: torch.Tensor) -> torch.Tensor:
    """The raw parameters whose softplus is `a > 0`, without the overflow of `log(exp(a) - 1)`."""
    return a + torch.log(-torch.expm1(-a))


class RidgeNet(nn.Module):
    """The parameters of a ridge energy: free filters, and `a_ik = softplus(raw_ik) > 0`, which give its coefficients.

    With the steps `e_k(t) = s_k t / sqrt(1 + (s_k t)^2)`, between -1 and 1 and steeper for larger k, and `e_0 = 0`:

    - convex: `psi_i' = q sum_k a_ik e_k`;
    - weakly convex: `psi_i' = q sum_k a_ik (e_k - e_(k-1))`. Any `a >= 0` gives `psi_i' >= 0` for `t > 0`, and each
      term with k > 1 vanishes for large responses. The convex profiles are those with `a_i1 >= a_i2 >= ...`.

    `q = 1 / (F sqrt(s_1 s_K))`, so that curvatures are of order 1. Both kinds start as the same convex energy.
    """

    @outside_inference
    def __init__(  # noqa: PLR0913 - one argument for each setting of the network
        self,
        filters: int,
        kernel_size: int,
        scales: int,
        convex: bool,
        zero_mean: bool,
        seed: int,
        image_channels: int = 1,
    ) -> None:
        super().__init__()
        self.convex, self.zero_mean = convex, zero_mean
        self.scales = scales_of(scales)
        start = nested_dct(filters, kernel_size, image_channels)
        g = torch.Generator().manual_seed(seed)
        new: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
        noise = torch.randn(start.shape, generator=g, **new) / kernel_size
        self.filters = nn.Parameter(start + 0.1 * noise)
        steps = torch.full((filters, scales), math.log(2.0), **new)
        if not convex:
            steps = steps.flip(1).cumsum(1).flip(1)
        self.raw = nn.Parameter(inverse_softplus(steps))

    def numbers(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The filters `[F, C, k, k]` and the `c_ik` `[F, K]`, attached to autograd's graph."""
        w = self.filters
        if self.zero_mean:
            w = w - w.mean((-2, -1), keepdim=True)
        a = F.softplus(self.raw)
        if not self.convex:
            a = a - F.pad(a[:, 1:], (0, 1))
        q = 1.0 / (len(w) * math.sqrt(self.scales[0] * self.scales[-1]))
        return w, a * (q * a.new_tensor(self.scales))


def ridge_alteration(net: object) -> str | None:
    """None if `net` is an unaltered `RidgeNet` (its values may differ), otherwise the difference."""
    if (reason := alteration(net, RidgeNet, ("filters", "raw"))) is not None:
        return reason
    assert isinstance(net, RidgeNet)
    if net.filters.ndim != 4:
        return "filters or profiles of another shape"
    count, channels, side = net.filters.shape[:3]
    same = net.filters.shape == (count, channels, side, side) and net.raw.shape == (count, len(net.scales))
    if (
        not same
        or side % 2 == 0
        or side < 3
        or not count
        or not channels
        or not net.scales
        or not plain_numbers(*net.scales)
    ):
        return "filters or profiles of another shape"
    return None


@dataclass(frozen=True)
class RidgeForm:
    """`r(x) = sum_i sum_p psi_i((W_i * u)_p)`, `u = x - center`: the form that kernels need."""

    net: RidgeNet
    center: float

    def energy(self, x: torch.Tensor) -> torch.Tensor:
        """`r(x_b)`, `[B]`."""
        w, c = self.net.numbers()
        t2 = F.conv2d(x - self.center, w, padding=w.shape[-1] // 2).square()
        weighted = torch.zeros_like(t2)
        for k, s in enumerate(self.net.scales):
            # (sqrt(1 + z^2) - 1) / s^2 = t^2 / (1 + sqrt(1 + z^2)): no difference of nearly equal numbers.
            weighted = weighted + c[:, k, None, None] / (1.0 + torch.sqrt(1.0 + s * s * t2))
        return per_image(t2 * weighted)
