# ruff: noqa: PLR0913 - a launch needs every pointer
"""MINRES: vector updates of one iteration (`solvers/minres.py`)."""

from __future__ import annotations

import triton.language as tl

from ..variants import Variant, unspecialized
from .reductions import keep, piece_of, product
from .scalars import NUMBERS, number, updates


@unspecialized(anywhere=NUMBERS)
def lanczos_first(u, c, r1, v, partial, rows, N: tl.constexpr, PIECE: tl.constexpr):
    """`<v, v>`, `<u, u>`, then `u_b -= c_b r1_b`, then `<v, u>`."""
    image, start, k, remaining = piece_of(N, PIECE)
    if rows is not None:
        if tl.load(rows + image) == 0:
            return
    inside, offset = k < remaining, image * N + start + k
    a, old = tl.load(v + offset, mask=inside, other=0.0), tl.load(u + offset, mask=inside, other=0.0)
    new = old - number(c, image) * tl.load(r1 + offset, mask=inside, other=0.0)
    tl.store(u + offset, new, mask=inside)
    keep(partial, 0, product(a, a))
    keep(partial, 1, product(old, old))
    keep(partial, 2, product(a, new))


@unspecialized(anywhere=NUMBERS)
def lanczos_second(u, c, r1, r2, partial, rows, N: tl.constexpr, PIECE: tl.constexpr):
    """`r1, r2 = r2, u - c_b r2` and `<r2, r2>` of the new r2."""
    image, start, k, remaining = piece_of(N, PIECE)
    if rows is not None:
        if tl.load(rows + image) == 0:
            return
    inside, offset = k < remaining, image * N + start + k
    old = tl.load(r2 + offset, mask=inside, other=0.0)
    new = tl.load(u + offset, mask=inside, other=0.0) - number(c, image) * old
    tl.store(r1 + offset, old, mask=inside)
    tl.store(r2 + offset, new, mask=inside)
    keep(partial, 0, product(new, new))


@unspecialized(anywhere=NUMBERS)
def minres_move(
    x, r, w, w_old, v, r2, oldeps, delta, gamma, phi, keep_r, tail, partial, rows,
    N: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    """`w_old, w = w, (v - oldeps w_old - delta w) / gamma`, `x += phi w`, `r = keep_r r - tail r2`, with
    `<x, x>, <r, r>, <w, w>`."""
    image, start, k, remaining = piece_of(N, PIECE)
    if rows is not None:
        if tl.load(rows + image) == 0:
            return
    inside, offset = k < remaining, image * N + start + k
    before = tl.load(w + offset, mask=inside, other=0.0)
    new = tl.load(v + offset, mask=inside, other=0.0) - number(oldeps, image) * tl.load(
        w_old + offset, mask=inside, other=0.0
    )
    old_x, old_r = tl.load(x + offset, mask=inside, other=0.0), tl.load(r + offset, mask=inside, other=0.0)
    new_r = number(keep_r, image) * old_r - number(tail, image) * tl.load(r2 + offset, mask=inside, other=0.0)
    new = tl.div_rn(new - number(delta, image) * before, number(gamma, image))
    new_x = old_x + number(phi, image) * new
    # All loads come before the first store, because the compiler cannot move them across it.
    tl.store(w_old + offset, before, mask=inside)
    tl.store(w + offset, new, mask=inside)
    tl.store(x + offset, new_x, mask=inside)
    tl.store(r + offset, new_r, mask=inside)
    keep(partial, 0, product(new_x, new_x))
    keep(partial, 1, product(new_r, new_r))
    keep(partial, 2, product(new, new))


def variants() -> list[Variant]:
    """The kernels as shipped."""
    return updates(lanczos_first, lanczos_second, minres_move)
