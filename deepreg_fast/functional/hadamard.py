"""Hadamard matrices by Sylvester's and Paley's constructions and their products (docs/math.md, M3)."""

from __future__ import annotations

import itertools
import math
from functools import lru_cache, reduce

import numpy as np
import torch

from ..ambient import outside_inference
from ..errors import InputError
from .dct import separable


def _prime_power(q: int) -> tuple[int, int] | None:
    """`(p, k)` with `q = p^k`, p prime, or None."""
    if q < 2:
        return None
    p = next((p for p in range(2, math.isqrt(q) + 1) if q % p == 0), q)
    k = 0
    while q % p == 0:
        q, k = q // p, k + 1
    return (p, k) if q == 1 else None


def _generator_powers(p: int, k: int) -> list[int]:
    """`g^0, ..., g^(q-2)` for a generator g of GF(q)'s multiplicative group, `q = p^k`, elements in base-p digits.

    The field is GF(p)[x]/f with the first monic f of degree k for which x itself is a generator.
    """
    q = p**k
    for tail in itertools.product(range(p), repeat=k):
        element, powers = [1] + [0] * (k - 1), []
        while len(powers) < q - 1:
            powers.append(sum(c * p**i for i, c in enumerate(element)))
            top = element[-1]
            element = [(c - top * t) % p for c, t in zip([0, *element[:-1]], tail, strict=True)]
            if element == [1] + [0] * (k - 1):
                break
        if len(powers) == q - 1 and len(set(powers)) == q - 1:
            return powers
    raise AssertionError(f"GF({p}^{k}) has a primitive polynomial")


def _jacobsthal(p: int, k: int) -> np.ndarray:
    """`Q[a, b] = chi(a - b)`, chi the quadratic character of GF(p^k): the even powers of a generator are squares."""
    q = p**k
    chi = np.full(q, -1, np.int8)
    if k == 1:
        chi[(np.arange(1, q, dtype=np.int64) ** 2) % q] = 1
    else:
        chi[_generator_powers(p, k)[::2]] = 1
    chi[0] = 0
    a, b = np.arange(q)[:, None], np.arange(q)[None, :]
    return chi[sum((a // p**i - b // p**i) % p * p**i for i in range(k))]


def _paley(n: int) -> np.ndarray | None:
    """Paley I (`n = q + 1`, `q = 3 mod 4`) or II (`n = 2(q + 1)`, `q = 1 mod 4`), or None."""
    power = _prime_power(n - 1)
    if power and (n - 1) % 4 == 3:
        s = np.eye(n, dtype=np.int8)
        s[0, 1:], s[1:, 0] = 1, -1
        s[1:, 1:] += _jacobsthal(*power)
        return s
    q = n // 2 - 1
    power = _prime_power(q)
    if n % 4 == 0 and power and q % 4 == 1:
        c = np.zeros((q + 1, q + 1), np.int8)
        c[0, 1:], c[1:, 0], c[1:, 1:] = 1, 1, _jacobsthal(*power)
        i = np.eye(q + 1, dtype=np.int8)
        h = np.block([[c + i, c - i], [c - i, -c - i]])
        # Columns are negated so that row 0 is constant: coefficient 0 is then the mean, as in the other constructions.
        return (h * h[0]).astype(np.int8)
    return None


def _has_paley(n: int) -> bool:
    """Whether `_paley` has a matrix of order n, a multiple of 4."""
    return bool(_prime_power(n - 1) or ((n // 2 - 1) % 4 == 1 and _prime_power(n // 2 - 1)))


@lru_cache(maxsize=512)
def exists(n: int) -> bool:
    """Whether `_construct` has a matrix of order n; does not build it."""
    if n in (1, 2):
        return True
    if n % 4:
        return False
    if n & (n - 1) == 0 or _has_paley(n):
        return True
    return any(n % k == 0 and exists(k) and exists(n // k) for k in range(2, math.isqrt(n) + 1))


def factors(n: int) -> list[int]:
    """The orders of the matrices whose Kronecker product, first one outermost, is the matrix of order n (see `exists`).

    They are powers of two (Sylvester's matrices) or orders of Paley's constructions.
    """
    if n & (n - 1) == 0 or _has_paley(n):
        return [n]
    k = next(k for k in range(2, math.isqrt(n) + 1) if n % k == 0 and exists(k) and exists(n // k))
    return [*factors(k), *factors(n // k)]


@lru_cache(maxsize=16)
def _construct(n: int) -> np.ndarray:
    """A Hadamard matrix with constant row 0, for an order that `exists`."""
    if n == 1:
        return np.ones((1, 1), np.int8)
    if n == 2:
        return np.array([[1, 1], [1, -1]], np.int8)
    h = None if n & (n - 1) == 0 else _paley(n)
    if h is not None:
        return h
    parts = [2, n // 2] if n & (n - 1) == 0 else factors(n)
    return reduce(np.kron, [_construct(k) for k in parts]).astype(np.int8)


def hadamard(n: int) -> np.ndarray:
    """A Hadamard matrix of order n, int8 entries +-1, `H H^T = n I`.

    Raises
    ------
    InputError
        If neither Sylvester's nor Paley's construction nor a product has this order; names the nearest orders.
    """
    if n < 1 or not exists(n):
        below = next((k for k in range(n - 1, 0, -1) if exists(k)), 1)
        above = next(k for k in itertools.count(max(1, n + 1)) if exists(k))
        raise InputError(
            "The Hadamard transform needs sides that Sylvester's or Paley's construction gives, but a side of the "
            f"image is {n}; crop to {below} or pad the images to {above} beforehand, or use transform='dct'."
        )
    return _construct(n).copy()


@lru_cache(maxsize=64)
@outside_inference
def _scaled(n: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(hadamard(n) / np.sqrt(n)).to(device=device, dtype=dtype)


def hadamard2(x: torch.Tensor) -> torch.Tensor:
    """`H_h X H_w^T / sqrt(h w)` of each channel, `[B, C, H, W]`."""
    hh, hw = (_scaled(n, x.dtype, x.device) for n in x.shape[-2:])
    return separable(hh, x, hw)


def ihadamard2(x: torch.Tensor) -> torch.Tensor:
    """The inverse (and transpose) of `hadamard2`."""
    hh, hw = (_scaled(n, x.dtype, x.device) for n in x.shape[-2:])
    return separable(hh.T, x, hw.T)
