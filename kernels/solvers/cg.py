# ruff: noqa: PLR0913 - a launch needs every pointer
"""Conjugate gradients: vector updates and per-image decisions of one iteration (`solvers/cg.py`)."""

from __future__ import annotations

import triton.language as tl

from ..variants import Variant, unspecialized
from .reductions import keep, piece_of, product
from .scalars import (
    NEGATIVE_CURVATURE,
    NON_FINITE,
    NUMBERS,
    RUNNING,
    STAGNATED,
    decisions,
    finite,
    larger,
    number,
    updates,
)


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


@unspecialized("images", anywhere=None)
def cg_beta(
    new_rz, rz, restarted, status, running, factor, next_rz, next_restarted, next_status, next_running, images,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The factor of the old direction from `<r, M^-1 r>`, or a final status."""
    b = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = b < images
    active, starts = tl.load(running + b, mask=inside, other=0) != 0, tl.load(restarted + b, mask=inside, other=0) != 0
    new, old = tl.load(new_rz + b, mask=inside, other=0.0), tl.load(rz + b, mask=inside, other=1.0)
    new_status = tl.where(finite(new), tl.where(new > 0, RUNNING, NEGATIVE_CURVATURE), NON_FINITE)
    next_active = active & (new_status == RUNNING)
    tl.store(factor + b, tl.where(starts, 0.0, new / old), mask=inside)
    tl.store(next_rz + b, tl.where(next_active, new, old), mask=inside)
    tl.store(next_restarted + b, tl.where(next_active, 0, tl.where(starts, 1, 0)).to(tl.uint8), mask=inside)
    tl.store(next_status + b, tl.where(active, new_status, tl.load(status + b, mask=inside, other=0)), mask=inside)
    tl.store(next_running + b, tl.where(next_active, 1, 0).to(tl.uint8), mask=inside)


@unspecialized("images", anywhere=None)
def cg_alpha(
    sums, squared_norms, rz, a_norm, status, running, length, next_norm, next_status, next_running, images,
    EPS: tl.constexpr, MAX_NORM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The step length from `<p, p>, <p, Ap>, <Ap, Ap>`, zero if there is no step, and a lower bound of `||A||`.

    `squared_norms` are `<x, x>, <r, r>`. A step that may make x or r longer than `MAX_NORM` is not taken.
    """
    b = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = b < images
    active = tl.load(running + b, mask=inside, other=0) != 0
    pp, curvature = tl.load(sums + b, mask=inside, other=1.0), tl.load(sums + images + b, mask=inside, other=1.0)
    apap, norm = tl.load(sums + 2 * images + b, mask=inside, other=1.0), tl.load(a_norm + b, mask=inside, other=0.0)
    ratio = tl.sqrt(apap / pp)
    norm = tl.where(active & finite(ratio), larger(norm, ratio), norm)
    # <p, A p> contains the rounding of A p; below it the sign has no meaning.
    noise = 0.5 * EPS * norm * pp
    new_status = tl.where(curvature > noise, RUNNING, tl.where(curvature < -noise, NEGATIVE_CURVATURE, STAGNATED))
    new_status = tl.where(finite(curvature) & finite(apap), new_status, NON_FINITE)
    next_active = active & (new_status == RUNNING)
    step = tl.where(next_active, tl.load(rz + b, mask=inside, other=0.0) / curvature, 0.0)
    x = tl.sqrt(tl.load(squared_norms + b, mask=inside, other=0.0)) + step * tl.sqrt(pp)
    r = tl.sqrt(tl.load(squared_norms + images + b, mask=inside, other=0.0)) + step * tl.sqrt(apap)
    new_status = tl.where(next_active & (((x <= MAX_NORM) & (r <= MAX_NORM)) == 0), NON_FINITE, new_status)
    next_active = active & (new_status == RUNNING)
    tl.store(length + b, tl.where(next_active, step, 0.0), mask=inside)
    tl.store(next_norm + b, norm, mask=inside)
    tl.store(next_status + b, tl.where(active, new_status, tl.load(status + b, mask=inside, other=0)), mask=inside)
    tl.store(next_running + b, tl.where(next_active, 1, 0).to(tl.uint8), mask=inside)


@unspecialized("images", anywhere=None)
def cg_has_converged(
    squared_norms, sums, length, stagnant_steps, target_norm, running, next_stagnant_steps, next_running, images,
    EPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Whether the recurrence stops: `||r|| <= target_norm`, or three consecutive steps did not change x.

    `squared_norms` are `<x, x>, <r, r>` after the step; the first of `sums` is `<p, p>`.
    """
    b = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = b < images
    active = tl.load(running + b, mask=inside, other=0) != 0
    xx = tl.load(squared_norms + b, mask=inside, other=0.0)
    rr = tl.load(squared_norms + images + b, mask=inside, other=0.0)
    step = tl.load(length + b, mask=inside, other=0.0) * tl.sqrt(tl.load(sums + b, mask=inside, other=0.0))
    count = tl.where(step <= 0.25 * EPS * tl.sqrt(xx), tl.load(stagnant_steps + b, mask=inside, other=0) + 1, 0)
    done = (tl.sqrt(rr) <= tl.load(target_norm + b, mask=inside, other=0.0)) | (rr == 0) | (count >= 3)
    tl.store(next_stagnant_steps + b, count, mask=inside)
    tl.store(next_running + b, tl.where(active & (done == 0), 1, 0).to(tl.uint8), mask=inside)


def variants() -> list[Variant]:
    """The kernels as shipped."""
    return updates(cg_direction, cg_move) + decisions(cg_beta, cg_alpha, cg_has_converged)
