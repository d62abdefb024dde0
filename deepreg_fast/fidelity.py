"""The data term: the weight mu = lam sigma^2, the noise, the objective (docs/math.md, M1)."""

from __future__ import annotations

import numpy as np
import torch

from . import checks
from .errors import InputError


def resolve_mu(
    mu: float | torch.Tensor | None,
    lam: float | torch.Tensor | None = None,
    sigma: float | torch.Tensor | None = None,
    *,
    like: torch.Tensor,
) -> torch.Tensor:
    """The weight `mu` of each image, `[B]` in the dtype and device of `like` `[B, ...]`: mu itself, or `lam sigma^2`.

    Raises
    ------
    InputError
        If neither or both are given, or mu is not positive and finite.
    """
    pair = lam is not None and sigma is not None
    if (mu is None) != pair or (mu is not None and (lam is not None or sigma is not None)):
        raise InputError(
            "The weight must be given as mu, or as lam and sigma (mu = lam sigma^2), "
            f"but mu={mu!r}, lam={lam!r}, sigma={sigma!r} came; give one of the two."
        )
    for name, given in (("mu", mu), ("lam", lam), ("sigma", sigma)):
        if isinstance(given, bool) or not isinstance(given, (int, float, torch.Tensor, type(None))):
            raise InputError(f"{name} must be a number or a tensor [B], but is {checks.describe(given)}.")
    value = mu if mu is not None else lam * sigma**2  # type: ignore[operator]
    t = torch.as_tensor(value, dtype=like.dtype, device=like.device).detach()
    if t.ndim > 1 or (t.ndim == 1 and len(t) not in (1, len(like))):
        raise InputError(
            f"mu must be one number or one for each of the {len(like)} images, but has shape {list(t.shape)}."
        )
    if not bool((torch.isfinite(t) & (t > 0)).all()):
        raise InputError(
            f"mu must be positive and finite, but is {value}; for noiseless data use a small one, such as 1e-3."
        )
    return t.expand(len(like)).clone()


def standard_normal(count: int, seed: int) -> torch.Tensor:
    """`count` standard normal numbers in float64 on the CPU, from a generator of their own, of integer `seed >= 0`.

    Box and Muller's transform of raw Philox output: numpy keeps that stream for good, so a seed gives the same numbers
    with every release, to the rounding of log and cos.
    """
    checks.integer(seed, "seed", 0)
    raw = np.random.Philox(np.random.SeedSequence(seed)).random_raw(2 * count).reshape(2, -1)
    u, v = ((raw >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    return torch.from_numpy(np.sqrt(-2.0 * np.log(u)) * np.cos(2.0 * np.pi * v))


def add_noise(y: torch.Tensor, sigma: float, seed: int) -> torch.Tensor:
    """`y + sigma n`, `n` of `standard_normal` with integer `seed >= 0`, the same on every device; `sigma >= 0`."""
    checks.number(sigma, "sigma", 0.0)
    checks.integer(seed, "seed", 0)
    if sigma == 0:
        return y.clone()
    return y + sigma * standard_normal(y.numel(), seed).reshape(y.shape).to(y)


def objective(y: torch.Tensor, Ax: torch.Tensor, value: torch.Tensor, mu: torch.Tensor) -> torch.Tensor:
    """`1/2 ||y_b - (A x)_b||^2 + mu_b r_b`, `[B]`, in float64; `value` is `r(x_b)`."""
    return 0.5 * (y - Ax).double().square().sum(1) + mu.double() * value.double()
