"""Smoothed isotropic total variation (Rudin, Osher, Fatemi 1992; Charbonnier smoothing)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .conv_chain import per_image


def smoothed_tv(x: torch.Tensor, eps: float) -> torch.Tensor:
    """`sum_p (sqrt(|D x|_p^2 + eps^2) - eps)` with forward differences, zero at the border; `[B,C,H,W] -> [B]`.

    `|D x|_p` is the norm over both differences of all channels (vectorial TV; Bresson and Chan 2008).
    """
    dv = torch.zeros_like(x)
    dh = torch.zeros_like(x)
    dv[..., :-1, :] = x[..., 1:, :] - x[..., :-1, :]
    dh[..., :, :-1] = x[..., :, 1:] - x[..., :, :-1]
    return per_image(torch.sqrt((dv.square() + dh.square()).sum(1) + eps**2) - eps)


@dataclass(frozen=True)
class TvForm:
    """`r(x) = smoothed_tv(x, eps)`: the form for kernels."""

    eps: float

    def energy(self, x: torch.Tensor) -> torch.Tensor:
        """`r(x_b)`, `[B]`."""
        return smoothed_tv(x, self.eps)
