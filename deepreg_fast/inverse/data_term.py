"""The data term: the weight mu = lam sigma^2, the noise, and the start of a recovery (docs/math.md, M1)."""

from __future__ import annotations

import numpy as np
import torch

from .. import checks
from ..errors import InputError
from ..operators.base import LinearOperator
from ..regularizers.base import Regularizer

LAM = 60.0
"""Default `mu / sigma^2` of `mu_with_noise` for a regularizer whose own value is unknown. It gave the best mean PSNR
among 15, 30, 60 and 120 for the 3x16 conv chain trained bi-level without noise at ratio 1/5 (beta = 10), on validation
images of BSD400 with noise of 10/255 and 25/255. Half of it is better by up to 0.3 dB at ratio 0.1, and twice as much
by up to 0.3 dB at ratio 0.5. At 5/255 no choice changes the PSNR by more than 0.1 dB."""


def resolve_mu(
    mu: float | torch.Tensor | None,
    lam: float | torch.Tensor | None = None,
    sigma: float | torch.Tensor | None = None,
    *,
    like: torch.Tensor,
) -> torch.Tensor:
    """The weight of each image, `[B]`: mu itself, or `lam sigma^2`, with the dtype and device of `like` `[B, ...]`.

    Raises
    ------
    InputError
        If neither or both are given, or mu is not positive and finite.
    """
    has_pair = lam is not None and sigma is not None
    if (mu is None) != has_pair or (mu is not None and (lam is not None or sigma is not None)):
        raise InputError(
            "The weight must be given as mu, or as lam and sigma (mu = lam sigma^2), "
            f"but got mu={mu!r}, lam={lam!r}, sigma={sigma!r}; give one of the two."
        )
    mu, lam, sigma = (v if isinstance(v, torch.Tensor) else checks.plain(v) for v in (mu, lam, sigma))
    if isinstance(mu, np.ndarray):
        mu = torch.from_numpy(mu)
    for name, argument in (("mu", mu), ("lam", lam), ("sigma", sigma)):
        if isinstance(argument, bool) or not isinstance(argument, (int, float, torch.Tensor, type(None))):
            raise InputError(f"{name} must be a number or a tensor [B], but is {checks.describe(argument)}.")
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


def mu_with_noise(mu: float, sigma: float, lam: float = LAM) -> float:
    """Weight of the regularizer for noisy measurements, `max(mu, lam sigma^2)`.

    Weights trained without noise have a small mu, with which the recovery fits the noise and loses 2 to 5 dB at
    sigma = 25/255. Since `||y - A x||^2 / (2 sigma^2)` measures the misfit, the weight grows with the variance.

    Parameters
    ----------
    mu : float > 0
        The trained weight.
    sigma : float >= 0
        Standard deviation of the noise of one measurement, in the units of y.
    lam : float >= 0
        `mu / sigma^2` for this regularizer. Scaling r by c divides it by c.

    Returns
    -------
    float

    Raises
    ------
    InputError
        If a number is out of range.

    Examples
    --------
    >>> import deepreg_fast as dr
    >>> dr.mu_with_noise(0.01, 0.5)
    15.0
    """
    lam, sigma = checks.number(lam, "lam", 0.0), checks.number(sigma, "sigma", 0.0)
    return max(checks.number(mu, "mu", 0.0, open_low=True), lam * sigma**2)


def standard_normal(count: int, seed: int) -> torch.Tensor:
    """`count` standard normal numbers in float64 on the CPU, from a separate generator with an integer `seed >= 0`.

    The Box-Muller transform of raw Philox output. numpy guarantees that stream, so a seed gives the same numbers in
    every release, up to the rounding of log and cos.
    """
    seed = checks.integer(seed, "seed", 0)
    raw = np.random.Philox(np.random.SeedSequence(seed)).random_raw(2 * count).reshape(2, -1)
    u, v = ((raw >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    return torch.from_numpy(np.sqrt(-2.0 * np.log(u)) * np.cos(2.0 * np.pi * v))


def add_noise(y: torch.Tensor, sigma: float, seed: int) -> torch.Tensor:
    """Add white Gaussian noise, `y + sigma n`.

    Parameters
    ----------
    y : Tensor `[B, m]`
    sigma : float >= 0
        Standard deviation in the units of y.
    seed : int >= 0
        The same seed gives the same noise on every device.

    Returns
    -------
    Tensor `[B, m]`

    Raises
    ------
    InputError
        If a number is out of range.

    Examples
    --------
    >>> import torch, deepreg_fast as dr
    >>> y = torch.zeros(2, 10)
    >>> torch.equal(dr.add_noise(y, 0.1, seed=3), dr.add_noise(y, 0.1, seed=3))
    True
    """
    sigma = checks.number(sigma, "sigma", 0.0)
    seed = checks.integer(seed, "seed", 0)
    if sigma == 0:
        return y.clone()
    return y + sigma * standard_normal(y.numel(), seed).reshape(y.shape).to(y)


def initial_point(y: torch.Tensor, A: LinearOperator, reg: Regularizer) -> torch.Tensor:
    """The start of a recovery: `prox_l2(c, y, 1/mu0)` at the regularizer's center c, with `mu0 = 1e-3 ||A||^2`.

    If `A A^T = g I`, it is the limit for `mu0 = 0`, the point closest to c that matches the measurements, `c + A^+ (y -
    A c)`. For other operators, such as a blur, that point would be made of amplified noise.
    """
    c = y.new_full((y.shape[0], *A.image_shape), reg.center)
    if A.gram_scale is not None:
        return c + A.A_dagger(y - A.A(c))
    return A.prox_l2(c, y, 1e3 / A.sqnorms(y.dtype))
