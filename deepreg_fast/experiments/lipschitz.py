"""Estimates of the Lipschitz constant of `grad s` on test images, by ascent and by Lanczos."""

from __future__ import annotations

import torch

from ..batched.linalg import expand, norm
from ..regularizers.base import Regularizer
from ..regularizers.lipschitz import beta_hat, spectrum

STARTS = 3
ASCENTS = 30
LANCZOS = 30


def estimates(reg: Regularizer, x: torch.Tensor, radius: float) -> dict[str, list[float]]:
    """Lower bounds on `Lip(grad s)` at images `x` `[B, C, H, W]`, per image.

    `beta_hat` is the largest `||grad s(x) - grad s(x + delta)|| / ||delta||` over `STARTS` random perturbations of norm
    `radius ||x - center||` with `ASCENTS` steps each (training uses few steps). `lambda_min` and `lambda_max` are the
    extreme eigenvalues of `hess s(x)` after `LANCZOS` steps.
    """
    size = radius * norm(x - reg.center).clamp_min(1e-6)
    grad = reg.value_and_grad(x)[1]
    best = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    for start in range(STARTS):
        # The same noise for every image, so that the result does not depend on how the images are batched.
        g = torch.Generator().manual_seed(start)
        noise = torch.randn(x.shape[1:], generator=g, dtype=torch.float64, device="cpu").to(x)
        delta = expand(size / norm(noise[None]), x) * noise.expand_as(x)
        for _ in range(ASCENTS):
            point = beta_hat(reg, x, delta, grad)
            best = torch.maximum(best, point.beta.nan_to_num(0.0))
            delta, _unchanged = point.power_step(size)
    low, high = spectrum(reg, x, LANCZOS)
    return {"beta_hat": best.tolist(), "lambda_min": low.tolist(), "lambda_max": high.tolist()}
