"""Factorizations of the lengths of a structurally random matrix into passes of the kernels of `csrc/cuda/srm.cu`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from ...functional import hadamard

# The radices of lines.cuh: of a pass, and of the DCT's last pass.
_RADICES = (2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 15, 16)
_LAST = (1, 2, 3, 4, 5, 6, 8, 9, 10, 12, 16)


@dataclass(frozen=True)
class Factor:
    """A pass of radix `radix`. If `tile` is nonzero, it multiplies by a matrix, with `tile` outputs per thread."""

    radix: int
    tile: int


@lru_cache(maxsize=4096)
def _fewest(n: int) -> tuple[int, ...] | None:
    """Radices with product n: as few as possible, then with the smallest sum; in descending order."""
    if n == 1:
        return ()
    candidates = [(r, *rest) for r in _RADICES if n % r == 0 and (rest := _fewest(n // r)) is not None]
    return min((tuple(sorted(f, reverse=True)) for f in candidates), key=lambda f: (len(f), sum(f), f), default=None)


@lru_cache(maxsize=512)
def dct_factors(n: int) -> tuple[tuple[Factor, ...], int]:
    """The passes of an FFT of n points and the radix of its last one. Primes above 13 are matrix products."""
    large, rest = [], n
    for p in range(17, n + 1, 2):
        while rest % p == 0 and all(p % q for q in range(3, math.isqrt(p) + 1, 2)):
            large.append(Factor(p, 8))
            rest //= p
        if rest < p:
            break
    candidates = [
        (passes, last) for last in _LAST if rest % last == 0 and (passes := _fewest(rest // last)) is not None
    ]
    passes, last = min(candidates, key=lambda f: (len(f[0]), sum(f[0]) + 2 * f[1]))
    return (*large, *(Factor(r, 0) for r in passes)), last


def hadamard_factors(n: int) -> tuple[Factor, ...]:
    """The passes of the Hadamard transform of order n: Sylvester's in radices up to 16, Paley's as matrices."""
    passes: list[Factor] = []
    for order in hadamard.factors(n):
        if order & (order - 1):
            # 16 outputs share more reads, but need more padding for an odd order.
            passes.append(Factor(order, 16 if -order % 16 <= order // 8 else 8))
            continue
        bits = order.bit_length() - 1
        parts = -(-bits // 4)
        passes += [Factor(2 ** (bits * (i + 1) // parts - bits * i // parts), 0) for i in range(parts)]
    return tuple(passes)
