"""Smoothed total variation: the classical baseline."""

from __future__ import annotations

from typing import Any

import torch

from .. import checks
from ..ambient import full_precision
from ..functional.tv import TvForm, smoothed_tv
from ..functional.unaltered import plain_numbers
from .base import Regularizer, register


class TV(Regularizer):
    """Smoothed isotropic total variation `r(x) = sum_p (sqrt(|Dx|_p^2 + eps^2) - eps)`, without trainable parameters.

    `D` takes forward differences (Rudin, Osher, Fatemi 1992; docs/math.md, M13). `|Dx|_p` is the norm over the
    differences of all channels, which aligns the edges of the colors (vectorial TV; Bresson and Chan 2008);
    `PerChannel(TV(eps))` treats each channel alone.

    Parameters
    ----------
    eps : float > 0
        Smoothing in gray values; `Lip(grad r) <= 8/eps`.

    Raises
    ------
    InputError
        If `eps` is not positive.

    Examples
    --------
    >>> import torch, deepreg_fast as dr
    >>> float(dr.TV().energy(torch.ones(1, 1, 8, 8)))
    0.0
    """

    def __init__(self, eps: float = 1e-2) -> None:
        super().__init__()
        self.eps = checks.number(eps, "eps", 0.0, open_low=True)

    @full_precision
    def energy(self, x: torch.Tensor) -> torch.Tensor:
        """`r(x_b)`, `[B]`."""
        return smoothed_tv(x, self.eps)

    def kernel_form(self) -> TvForm | None:
        """The form that kernels need; None for a subclass with a different energy."""
        altered = type(self).energy is not TV.energy or "energy" in vars(self) or not plain_numbers(self.eps)
        return None if altered else TvForm(float(self.eps))

    def describe(self) -> dict[str, Any]:
        """Constructor arguments."""
        return {"kind": "tv", "eps": self.eps}


register("tv", TV)
