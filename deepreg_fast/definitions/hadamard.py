"""Hadamard matrices by Sylvester's and Paley's constructions and their products (docs/math.md, M3)."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch

from ..errors import InputError
from .dct import separable


def _is_prime(q: int) -> bool:
    return q > 1 and all(q % p for p in range(2, int(q**0.5) + 1))


def _jacobsthal(q: int) -> np.ndarray:
    """`Q[a, b] = chi(a - b)`, chi the quadratic character modulo the prime q."""
    chi = np.full(q, -1, np.int8)
    chi[(np.arange(1, q, dtype=np.int64) ** 2) % q] = 1
    chi[0] = 0
    return chi[(np.arange(q)[:, None] - np.arange(q)[None, :]) % q]


@lru_cache(maxsize=256)
def _construct(n: int) -> np.ndarray | None:
    """A Hadamard matrix of order n, or None where these constructions give none."""
    if n == 1:
        return np.ones((1, 1), np.int8)
    if n != 2 and n % 4:
        return None
    if n == 2:
        return np.array([[1, 1], [1, -1]], np.int8)
    if _is_prime(n - 1) and (n - 1) % 4 == 3:
        s = np.zeros((n, n), np.int8)
        s[0, 1:], s[1:, 0], s[1:, 1:] = 1, -1, _jacobsthal(n - 1)
        return s + np.eye(n, dtype=np.int8)
    q = n // 2 - 1
    if _is_prime(q) and q % 4 == 1:
        c = np.zeros((q + 1, q + 1), np.int8)
        c[0, 1:], c[1:, 0], c[1:, 1:] = 1, 1, _jacobsthal(q)
        i = np.eye(q + 1, dtype=np.int8)
        return np.block([[c + i, c - i], [c - i, -c - i]]).astype(np.int8)
    for k in range(2, int(n**0.5) + 1):
        if n % k == 0:
            a, b = _construct(k), _construct(n // k)
            if a is not None and b is not None:
                return np.kron(a, b).astype(np.int8)
    return None


def hadamard(n: int) -> np.ndarray:
    """A Hadamard matrix of order n, int8 entries +-1, `H H^T = n I`.

    Raises
    ------
    InputError
        If Sylvester's and Paley's constructions and their products give none, with the nearest orders that exist.
    """
    h = _construct(n)
    if h is None:
        below = next(k for k in range(n - 1, 0, -1) if _construct(k) is not None)
        above = next(k for k in range(n + 1, 8 * n + 9) if _construct(k) is not None)
        raise InputError(
            f"The Hadamard transform needs sides that Sylvester's or Paley's construction gives, but a side "
            f"of the image is {n}; crop to {below} or {above}, or use transform='dct'."
        )
    return h


@lru_cache(maxsize=64)
def _scaled(n: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(hadamard(n) / np.sqrt(n)).to(device=device, dtype=dtype)


def hadamard2(x: torch.Tensor) -> torch.Tensor:
    """`H_h X H_w^T / sqrt(h w)` of each channel, `[B, C, H, W]`."""
    hh, hw = (_scaled(n, x.dtype, x.device) for n in x.shape[-2:])
    return separable(hh, x, hw)


def ihadamard2(x: torch.Tensor) -> torch.Tensor:
    """The inverse of `hadamard2`, its transpose."""
    hh, hw = (_scaled(n, x.dtype, x.device) for n in x.shape[-2:])
    return separable(hh.T, x, hw.T)
