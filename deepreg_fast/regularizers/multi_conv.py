"""Ridge regularizers whose filters are a chain of convolutions (Goujon et al. 2023 and 2024, Hertrich et al. 2025)."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .. import checks
from ..ambient import full_precision, outside_inference
from ..errors import InputError
from ..functional.conv_chain import per_image
from .base import Regularizer, register

PROFILES = ("huber", "spline")


def huber(t: torch.Tensor) -> torch.Tensor:
    """`t^2/2` for `|t| <= 1`, and `|t| - 1/2` beyond."""
    inside = t.clamp(-1.0, 1.0)
    return inside * (t - 0.5 * inside)


def spline_integral(t: torch.Tensor, values: torch.Tensor, reach: float) -> torch.Tensor:
    """The integral from 0 to t of the linear spline with `values` at equidistant knots in [-reach, reach].

    Beyond the outer knots the spline is constant. The number of knots is odd.
    """
    count = len(values)
    step = 2.0 * reach / (count - 1)
    areas = 0.5 * step * (values[1:] + values[:-1])
    integral = torch.cat([values.new_zeros(1), areas.cumsum(0)])
    integral = integral - integral[count // 2]
    inside = t.clamp(-reach, reach)
    place = (inside + reach) / step
    knot = place.detach().floor().clamp(0, count - 2)
    f, j = place - knot, knot.long()
    left, right = values[j], values[j + 1]
    within = integral[j] + step * f * (left + 0.5 * f * (right - left))
    end = torch.where(t > 0, values[-1], values[0])
    return within + end * (t - inside)


def monotone(values: torch.Tensor, reach: float) -> torch.Tensor:
    """The authors' projection of a spline: slopes in [0, 1], zero at both ends, and an odd function."""
    step = 2.0 * reach / (len(values) - 1)
    slopes = F.pad((values.diff() / step).clamp(0.0, 1.0)[1:-1], (1, 1))
    values = F.pad(slopes.cumsum(0) * step, (1, 0))
    return 0.5 * (values - values.flip(0))


class MultiConvRidge(Regularizer):
    """Ridge regularizer whose filters are a chain of zero-padded convolutions, as in the authors' CRR and WCRR.

    `r(x) = w/c^2 sum_i sum_p exp(-2 s_i) psi(exp(s_i) (W c x)_(i,p))` with weight w, contrast c and
    `W = W_3 W_2 W_1/||W_3 W_2 W_1||`; the mean of each filter of `W_1` is subtracted. The norm is the largest value of
    the filters' spectrum at grid x grid frequencies. `r + w rho/2 ||x||^2` is convex away from the border.

    - `profile="huber"`: `psi(t) = exp(-b) h(exp(b) t) - rho h(t)`, `h` the Huber function (Hertrich et al. 2025).
    - `profile="spline"`: `psi' = exp(m) p - rho q` with linear splines p and q, odd and with slopes in [0, 1]
      (Goujon et al. 2024).

    `psi''` jumps at the knots. Every convolution is padded with zeros, so responses in the outer 4 pixels (for three
    5 x 5 convolutions) differ from those of the composed filters `bank()`; all others are equal.

    Parameters
    ----------
    channels, kernel_sizes : sequences of int
        Channels before and after each convolution, beginning with 1, and the odd sizes of the filters.
    rho : float, >= 0
        Weight of the concave part: 0 for CRR, 1 for WCRR.
    profile : "huber" or "spline"
    knots : int
        Odd number of knots of a spline.
    reach : float, > 0
        Last knot of a spline.
    grid : int
        Frequencies per axis at which the norm of the filters is computed.

    Raises
    ------
    InputError
        If an argument is out of range.
    """

    center = 0.0
    image_channels = 1
    no_kernels = (
        "the responses of a zero-padded chain of convolutions are not those of one filter bank at the border, and no "
        "profile of Ridge is a Huber function or a spline"
    )

    @outside_inference
    def __init__(  # noqa: PLR0913 - one argument for each setting of the network
        self,
        channels: tuple[int, ...] = (1, 4, 8, 64),
        kernel_sizes: tuple[int, ...] = (5, 5, 5),
        rho: float = 1.0,
        profile: str = "huber",
        *,
        knots: int = 101,
        reach: float = 0.1,
        grid: int = 256,
    ) -> None:
        super().__init__()
        self.channels = [checks.integer(c, "channels", 1) for c in channels]
        self.kernel_sizes = [checks.integer(k, "kernel_sizes", 1) for k in kernel_sizes]
        if len(self.channels) != len(self.kernel_sizes) + 1 or self.channels[0] != 1:
            raise InputError(
                f"channels must begin with 1 and have one entry more than kernel_sizes, but are {self.channels} "
                f"and {self.kernel_sizes}."
            )
        self.knots = checks.integer(knots, "knots", 3)
        if any(n % 2 == 0 for n in (*self.kernel_sizes, self.knots)):
            raise InputError(f"kernel_sizes and knots must be odd, but are {self.kernel_sizes} and {self.knots}.")
        if profile not in PROFILES:
            raise InputError(f"profile must be one of {list(PROFILES)}, but is {profile!r}.")
        self.rho, self.profile = checks.number(rho, "rho", 0.0), profile
        self.reach = checks.number(reach, "reach", 0.0, open_low=True)
        self.grid = checks.integer(grid, "grid", 2 * sum(k - 1 for k in self.kernel_sizes) + 1)
        g = torch.Generator().manual_seed(0)
        shapes = zip(self.channels[1:], self.channels[:-1], self.kernel_sizes, strict=True)
        new: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
        self.filters = nn.ParameterList(
            torch.randn(o, i, k, k, generator=g, **new) / math.sqrt(i * k * k) for o, i, k in shapes
        )
        self.log_scales = nn.Parameter(torch.full((self.channels[-1],), math.log(20.0), **new))
        self.log_slope = nn.Parameter(torch.tensor(4.0, **new))
        if profile == "spline":
            identity = torch.linspace(-self.reach, self.reach, self.knots, **new)
            self.convex_spline = nn.Parameter(0.5 * identity)
            self.concave_spline = nn.Parameter(identity)
        self.log_weight = nn.Parameter(torch.zeros((), **new))
        self.log_contrast = nn.Parameter(torch.zeros((), **new))

    def _weights(self) -> list[torch.Tensor]:
        """The filters of each convolution, the first without their means."""
        first, *rest = self.filters
        return [first - first.mean((1, 2, 3), keepdim=True), *rest]

    def _composed(self, weights: list[torch.Tensor]) -> torch.Tensor:
        """Composed filters `[K, 1, k, k]` for `conv2d`, before the division by their norm."""
        bank = weights[0]
        for w in weights[1:]:
            reach = w.shape[-1] - 1
            bank = F.conv2d(bank.transpose(0, 1), w.flip(-2, -1), padding=reach).transpose(0, 1)
        return bank

    def _square_norm(self, weights: list[torch.Tensor]) -> torch.Tensor:
        """`max_f sum_i |W_i(f)|^2`: the spectrum of the filters' autocorrelation, one small convolution and one FFT."""
        bank = self._composed(weights).transpose(0, 1)
        correlation = F.conv2d(bank, bank, padding=bank.shape[-1] - 1)
        return torch.fft.fft2(correlation, s=(self.grid, self.grid)).abs().amax()

    def bank(self) -> torch.Tensor:
        """The normalized chain as one filter bank `[K, 1, k, k]` for `conv2d`, valid away from the border."""
        weights = self._weights()
        return self._composed(weights) / self._square_norm(weights).sqrt()

    def responses(self, x: torch.Tensor) -> torch.Tensor:
        """`W x`, `[B, K, H, W]`."""
        weights = self._weights()
        x = x / self._square_norm(weights).sqrt()
        for w in weights:
            x = F.conv2d(x, w, padding=w.shape[-1] // 2)
        return x

    def _profile(self, t: torch.Tensor) -> torch.Tensor:
        slope = self.log_slope.exp()
        if self.profile == "huber":
            value = huber(slope * t) / slope
            return value - self.rho * huber(t) if self.rho else value
        value = slope * spline_integral(t, monotone(self.convex_spline, self.reach), self.reach)
        if not self.rho:
            return value
        return value - self.rho * spline_integral(t, monotone(self.concave_spline, self.reach), self.reach)

    @full_precision
    def energy(self, x: torch.Tensor) -> torch.Tensor:
        """`r(x_b)`, `[B]`."""
        if x.shape[1] != 1:
            raise InputError(f"MultiConvRidge takes grey images [B, 1, H, W], but x has shape {list(x.shape)}.")
        scale = self.log_scales.exp()[:, None, None]
        t = self.responses(self.log_contrast.exp() * x)
        factor = (self.log_weight - 2.0 * self.log_contrast).exp()
        return factor * per_image(self._profile(scale * t) / scale.square())

    def describe(self) -> dict[str, Any]:
        """Constructor arguments."""
        if type(self) is not MultiConvRidge:
            return super().describe()
        spline = {"knots": self.knots, "reach": self.reach} if self.profile == "spline" else {}
        sizes = {"channels": self.channels, "kernel_sizes": self.kernel_sizes, "grid": self.grid}
        return {"kind": "multi_conv_ridge", **sizes, "rho": self.rho, "profile": self.profile, **spline}


register("multi_conv_ridge", MultiConvRidge)
