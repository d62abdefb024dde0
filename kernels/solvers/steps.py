# ruff: noqa: PLR0913 - a launch needs every pointer
"""The vector work of one iteration of CG, MINRES and proximal gradients, with the fewest reads of memory.

The kernels change images in place, and only those for which `rows` `[B]` (bytes) is true; None means all. Other images
cost nothing: they are neither read nor written, and their sums are not computed. Pieces and sums are as in
`reductions.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..variants import Variant, unspecialized
from .reductions import PIECE, WARPS, keep, piece_of, product

NUMBERS = ("s", "c", "oldeps", "delta", "gamma", "phi", "keep_r", "tail", "rows")
"""Tensors with one number or flag per image."""


@triton.jit
def number(s, image):
    """The number of an image, in the images' precision."""
    return tl.load(s + image).to(tl.float32)


@unspecialized(anywhere=NUMBERS)
def cg_direction(p, z, s, rows, N: tl.constexpr, PIECE: tl.constexpr):
    """`p_b = z_b + s_b p_b`; p is not read if `s_b` is zero."""
    image, start, k, remaining = piece_of(N, PIECE)
    if rows is not None:
        if tl.load(rows + image) == 0:
            return
    factor = number(s, image)
    offset = image * N + start + k
    old = tl.load(p + offset, mask=k < tl.where(factor != 0.0, remaining, 0), other=0.0)
    new = tl.load(z + offset, mask=k < remaining, other=0.0) + factor * old
    tl.store(p + offset, new, mask=k < remaining)


@unspecialized(anywhere=NUMBERS)
def cg_move(x, r, p, q, s, partial, rows, N: tl.constexpr, PIECE: tl.constexpr):
    """`x_b += s_b p_b`, `r_b -= s_b q_b`; `<x_b, x_b>` and `<r_b, r_b>`."""
    image, start, k, remaining = piece_of(N, PIECE)
    if rows is not None:
        if tl.load(rows + image) == 0:
            return
    step = number(s, image)
    inside, offset = k < remaining, image * N + start + k
    new_x = tl.load(x + offset, mask=inside, other=0.0) + step * tl.load(p + offset, mask=inside, other=0.0)
    new_r = tl.load(r + offset, mask=inside, other=0.0) - step * tl.load(q + offset, mask=inside, other=0.0)
    tl.store(x + offset, new_x, mask=inside)
    tl.store(r + offset, new_r, mask=inside)
    keep(partial, 0, product(new_x, new_x))
    keep(partial, 1, product(new_r, new_r))


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


@unspecialized(anywhere=NUMBERS)
def descend(x, s, g, out, rows, N: tl.constexpr, PIECE: tl.constexpr):
    """`out_b = x_b - s_b g_b`."""
    image, start, k, remaining = piece_of(N, PIECE)
    if rows is not None:
        if tl.load(rows + image) == 0:
            return
    inside, offset = k < remaining, image * N + start + k
    step = number(s, image) * tl.load(g + offset, mask=inside, other=0.0)
    tl.store(out + offset, tl.load(x + offset, mask=inside, other=0.0) - step, mask=inside)


@unspecialized(anywhere=NUMBERS)
def pgd_step(prox, x, g, step, candidate, partial, rows, N: tl.constexpr, PIECE: tl.constexpr):
    """`step = prox - x`, `candidate = x + step`, and `<step, step>, <x, x>, <g, g>`."""
    image, start, k, remaining = piece_of(N, PIECE)
    if rows is not None:
        if tl.load(rows + image) == 0:
            return
    inside, offset = k < remaining, image * N + start + k
    old_x, grad = tl.load(x + offset, mask=inside, other=0.0), tl.load(g + offset, mask=inside, other=0.0)
    f = tl.load(prox + offset, mask=inside, other=0.0) - old_x
    tl.store(step + offset, f, mask=inside)
    tl.store(candidate + offset, old_x + f, mask=inside)
    keep(partial, 0, product(f, f))
    keep(partial, 1, product(old_x, old_x))
    keep(partial, 2, product(grad, grad))


@unspecialized(anywhere=NUMBERS)
def take(to, source, to_other, other, rows, N: tl.constexpr, PIECE: tl.constexpr):
    """`to_b = source_b` and, if not None, `to_other_b = other_b`."""
    image, start, k, remaining = piece_of(N, PIECE)
    if rows is not None:
        if tl.load(rows + image) == 0:
            return
    inside, offset = k < remaining, image * N + start + k
    tl.store(to + offset, tl.load(source + offset, mask=inside), mask=inside)
    if other is not None:
        tl.store(to_other + offset, tl.load(other + offset, mask=inside), mask=inside)


def variants() -> list[Variant]:
    """The kernels as shipped, for images of 180 x 180."""
    kinds = dict.fromkeys((*NUMBERS, "partial"), "*fp64") | {"rows": "*u8"}
    kernels = (cg_direction, cg_move, lanczos_first, lanczos_second, minres_move, descend, pgd_step, take)
    size: dict[str, object] = {"N": 32400, "PIECE": PIECE}
    return [
        Variant(kernel, {n: kinds.get(n, "*fp32") for n in kernel.arg_names if n not in size}, size, WARPS, 1)
        for kernel in kernels
    ]
