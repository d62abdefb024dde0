"""Batched Lanczos estimates of the ends of a spectrum, with full reorthogonalization (docs/math.md, M14)."""

from __future__ import annotations

import torch

from .. import backend, checks
from ..ambient import full_precision
from ..batched.linalg import dot, expand, norm, select
from ..batched.loop import AnyActive
from .linear_system import Map


@full_precision
@torch.no_grad()
def extreme_eigenvalues(matvec: Map, v0: torch.Tensor, steps: int = 20) -> tuple[torch.Tensor, torch.Tensor]:
    """Smallest and largest Ritz value of each symmetric `A_b` on the Krylov space of `v0_b`.

    Parameters
    ----------
    matvec : callable
        `v -> A v`, both like `v0`, for all images at once.
    v0 : Tensor `[B, ...]`, float32 or float64
        Nonzero start vectors. Random vectors have a component along every eigenvector.
    steps : int
        Dimension of the space, at least 1 (at most the number of entries); as many vectors are stored.

    Returns
    -------
    lmin, lmax : Tensor `[B]`, float64
        Both lie inside the spectrum, to rounding: `lambda_min <= lmin <= lmax <= lambda_max`. They are exact if the
        space is invariant. NaN for an image whose start is zero or whose products are not finite.

    Raises
    ------
    InputError
        If `v0` or `steps` is invalid.
    """
    steps = checks.integer(steps, "steps", 1)
    if not isinstance(v0, torch.Tensor) or v0.ndim < 2 or v0.dtype not in checks.FLOATS:
        raise checks.InputError(f"v0 must be a float32 or float64 tensor [B, ...], but is {checks.describe(v0)}.")
    if v0.numel() == 0:
        return v0.new_zeros(len(v0), dtype=torch.float64), v0.new_zeros(len(v0), dtype=torch.float64)
    steps = min(steps, v0[0].numel())
    eps = torch.finfo(v0.dtype).eps
    v, good = _unit(v0)
    active = good
    basis: list[torch.Tensor] = []
    matrix = torch.zeros(len(v0), steps, steps, dtype=torch.float64, device=v0.device)
    size = torch.zeros(len(v0), dtype=torch.float64, device=v0.device)
    any_active = AnyActive()
    for k in range(steps):
        basis.append(v)
        with backend.active_images(active):
            w = matvec(v)
        a = dot(v, w)
        good = good & (~active | torch.isfinite(a))
        active = active & good
        w = select(active, w, 0.0)
        a = torch.where(active, a, 0.0)
        size = torch.maximum(size, norm(w))
        # An inactive image repeats its first Rayleigh quotient, which lies between its Ritz values.
        matrix[:, k, k] = torch.where(active, a, matrix[:, 0, 0])
        if k + 1 == steps or not any_active(active):
            matrix[:, k + 1 :, k + 1 :] = torch.diag_embed(matrix[:, :1, 0].expand(-1, steps - k - 1))
            break
        for q in basis * 2:
            w = w - expand(dot(q, w), w) * q
        b = norm(w)
        active = active & (b > 10.0 * eps * size)
        v = select(active, w / expand(torch.where(active, b, 1.0), w), 0.0)
        b = torch.where(active, b, 0.0)
        matrix[:, k, k + 1] = matrix[:, k + 1, k] = b
    matrix = torch.where(good[:, None, None], matrix, 0.0)
    values = torch.linalg.eigvalsh(matrix)
    nan = torch.full_like(size, torch.nan)
    return torch.where(good, values[:, 0], nan), torch.where(good, values[:, -1], nan)


def _unit(v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`v / ||v||` for each image (zeros if it is undefined), and whether it is defined."""
    finite = torch.isfinite(v).flatten(1).all(1)
    v = select(finite, v, 0.0)
    # Divide by the largest entry first: the squares of tiny or huge entries underflow or overflow.
    largest = v.flatten(1).abs().amax(1)
    good = finite & (largest > 0)
    v = v / expand(torch.where(good, largest, 1.0), v)
    length = norm(v)
    return v / expand(torch.where(good, length, 1.0), v), good
