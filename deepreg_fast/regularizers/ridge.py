"""Convex and weakly convex ridge regularizers (Goujon et al. 2022, 2024)."""

from __future__ import annotations

from typing import Any

import torch

from .. import checks
from ..ambient import full_precision
from ..functional.ridge import RidgeForm, RidgeNet, ridge_alteration
from ..functional.unaltered import hook_on, plain_numbers
from .base import Regularizer, register


class Ridge(Regularizer):
    """Ridge regularizer `r(x) = sum_i sum_p psi_i((W_i * u)_p)` with `u = x - center`.

    The filters `W_i` and the profiles `psi_i` are learned; the profiles are sums of smooth steps at fixed scales
    (Goujon et al. 2022 and 2024; docs/math.md, M15). `r >= 0 = r(center)`.

    - `convex=True`: every `psi_i` is convex, and so is r, so no Lipschitz penalty is needed (train with `beta=0`).
      `s = 1/2 ||u||^2 - r` serves only `beta_hat` and `spectrum`, with `hess s <= I`.
    - `convex=False`: `psi_i'' >= -rho_i`, so `r + rho/2 ||u||^2` is convex for `rho = max_i rho_i ||W||^2`, where
      `||W||` is the spectral norm of all filters together; `weak_convexity()` bounds `rho_i`.

    Parameters
    ----------
    filters, kernel_size, scales : int
        Number of filters (>= 1), their odd size (>= 3), and the number of steps in a profile (1 to 8).
    convex : bool
    zero_mean : bool
        Subtract each filter's mean, so that r ignores constants except at the border, which is zero-padded.
    center : float
        Gray value subtracted from the image; the padding has this value.
    image_channels : int
        Channels C of the images. The filters span all of them, and each channel of a filter has mean zero if
        `zero_mean`.
    seed : int
        Seed of the noise on the initial filters, which are DCT bases.

    Raises
    ------
    InputError
        If an argument is out of range.

    Examples
    --------
    >>> import torch, deepreg_fast as dr
    >>> reg = dr.Ridge(filters=4, kernel_size=5)
    >>> float(reg.value_and_grad(torch.full((1, 1, 8, 8), 0.5))[0])
    0.0
    """

    def __init__(  # noqa: PLR0913 - one argument for each setting of the network
        self,
        filters: int = 32,
        kernel_size: int = 9,
        scales: int = 4,
        convex: bool = True,
        *,
        zero_mean: bool = True,
        center: float = 0.5,
        image_channels: int = 1,
        seed: int = 0,
    ) -> None:
        super().__init__()
        filters, scales = checks.integer(filters, "filters", 1), checks.integer(scales, "scales", 1, 8)
        convex, zero_mean = checks.boolean(convex, "convex"), checks.boolean(zero_mean, "zero_mean")
        kernel_size, seed = checks.integer(kernel_size, "kernel_size", 3), checks.integer(seed, "seed", 0)
        if kernel_size % 2 == 0:
            raise checks.InputError(f"kernel_size must be odd, but is {kernel_size}.")
        self.center = checks.number(center, "center", -1e6)
        self.image_channels = checks.integer(image_channels, "image_channels", 1)
        self._description = {
            "kind": "ridge",
            "filters": filters,
            "kernel_size": kernel_size,
            "scales": scales,
            "convex": convex,
            "zero_mean": zero_mean,
            "center": self.center,
        }
        # Omit the default, so that older versions can read files of gray ridges.
        if self.image_channels != 1:
            self._description["image_channels"] = self.image_channels
        self.net = RidgeNet(filters, kernel_size, scales, convex, zero_mean, seed, self.image_channels)

    @full_precision
    def energy(self, x: torch.Tensor) -> torch.Tensor:
        """`r(x_b)`, `[B]`."""
        channels = self.net.filters.shape[1]
        if x.shape[1] != channels:
            remedy = "PerChannel applies it to each channel" if channels == 1 else "convert the images"
            raise checks.InputError(
                f"Ridge takes images [B, {channels}, H, W], but x has shape {list(x.shape)}; {remedy}."
            )
        return RidgeForm(self.net, self.center).energy(x)

    def kernel_form(self) -> RidgeForm | None:
        """The form that kernels need; None if the energy was altered or has hooks."""
        if self.altered() is not None or hook_on(self.net) is not None:
            return None
        return RidgeForm(self.net, self.center)

    def altered(self) -> str | None:
        """How this energy differs from `Ridge` (a subclass, or changes to the network); None if it does not."""
        if type(self).energy is not Ridge.energy or "energy" in vars(self):
            return "an energy of its own"
        return ridge_alteration(self.net) if plain_numbers(self.center) else "a center that is no number"

    def weak_convexity(self) -> torch.Tensor:
        """Bounds `rho_i`, `[F]`, with `psi_i'' >= -rho_i`: the sum of `|c_ik|`, `c_ik < 0`; zeros if r is convex."""
        return self.net.numbers()[1].detach().neg().clamp_min(0).sum(1)

    def describe(self) -> dict[str, Any]:
        """Constructor arguments except the seed of the initial weights; only the class if the energy was altered."""
        if self.altered() is not None:
            return super().describe()
        return self._description | {
            "convex": self.net.convex,
            "zero_mean": self.net.zero_mean,
            "center": float(self.center),
        }


register("ridge", Ridge)
