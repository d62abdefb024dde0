# ruff: noqa: PLR0913 - a launch needs every pointer
"""Proximal gradient descent: vector updates and per-image decisions of one iteration (`solvers/pgd.py`)."""

from __future__ import annotations

import triton.language as tl

from ..variants import Variant, unspecialized
from .reductions import keep, piece_of, product
from .scalars import (
    CONVERGED,
    NON_FINITE,
    NUMBERS,
    RUNAWAY,
    STAGNATED,
    decisions,
    finite,
    larger,
    number,
    smaller,
    updates,
)


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


@unspecialized("images", anywhere=None)
def convergence_test(
    sums, scale, settings, tau, lipschitz_estimate, residual, gradients, status, running,
    next_residual, next_status, next_running, images, EPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The residual at x from `<step, step>, <x, x>, <g, g>`, and whether the image stops there.

    `settings`: tolerance, initial tau, grow, shrink, maximum number of gradients.
    """
    b = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = b < images
    active = tl.load(running + b, mask=inside, other=0) != 0
    tolerance, first = tl.load(settings), tl.load(settings + 1)
    length = tl.sqrt(tl.load(sums + b, mask=inside, other=0.0))
    size = tl.sqrt(tl.load(sums + images + b, mask=inside, other=0.0))
    slope = tl.sqrt(tl.load(sums + 2 * images + b, mask=inside, other=0.0))
    t, estimate = tl.load(tau + b, mask=inside, other=1.0), tl.load(lipschitz_estimate + b, mask=inside, other=0.0)
    count = tl.load(gradients + b, mask=inside, other=0)
    has_estimate = estimate > 0
    tau_eff = tl.where(has_estimate, smaller(t, 1.0 / larger(estimate, 1e-300)), t)
    relative = length / tau_eff / larger(larger(tl.load(scale + b, mask=inside, other=0.0), slope), 1e-300)
    stagnated = (length <= 2.0 * EPS * size) | (t < 1e-12 * first)
    testable = has_estimate | (count > 1) | (length == 0)
    done = active & (relative <= tolerance) & testable
    stuck = active & (relative > tolerance) & stagnated
    new_status = tl.where(done, CONVERGED, tl.load(status + b, mask=inside, other=0))
    next_active = active & (done == 0) & (stuck == 0) & (count < tl.load(settings + 4))
    tl.store(next_residual + b, tl.where(active, relative, tl.load(residual + b, mask=inside, other=0.0)), mask=inside)
    tl.store(next_status + b, tl.where(stuck, STAGNATED, new_status), mask=inside)
    tl.store(next_running + b, tl.where(next_active, 1, 0).to(tl.uint8), mask=inside)


@unspecialized("images", anywhere=None)
def acceptance_test(
    sums, value, limit, settings, tau, lipschitz_estimate, plain_next, gradients, iterations, status, running,
    next_tau, next_lipschitz_estimate, next_plain_next, next_gradients, next_iterations, next_status, next_running,
    accept, forget, images, EPS: tl.constexpr, PLAIN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Accept the candidate or shrink tau, from `<dx, dx>, <dg, dg>, <dx, dg>, <g, g>, <candidate, candidate>`.

    `value` is r at the candidate, `limit` the largest plausible norm of an image, `forget` whether the accelerator is
    reset. `PLAIN`: without acceleration. `settings` as in `convergence_test`.
    """
    b = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = b < images
    active = tl.load(running + b, mask=inside, other=0) != 0
    first, grow, shrink = tl.load(settings + 1), tl.load(settings + 2), tl.load(settings + 3)
    dx2, dg2 = tl.load(sums + b, mask=inside, other=0.0), tl.load(sums + images + b, mask=inside, other=0.0)
    dxdg = tl.load(sums + 2 * images + b, mask=inside, other=0.0)
    old2 = tl.load(sums + 3 * images + b, mask=inside, other=0.0)
    before, estimate = tl.load(tau + b, mask=inside, other=1.0), tl.load(lipschitz_estimate + b, mask=inside, other=0.0)
    valid = finite(dg2) & finite(tl.load(value + b, mask=inside, other=0.0))
    # The difference of two gradients contains their rounding; below it the test has no meaning.
    good = active & valid & (dxdg <= dx2 / before + 4.0 * EPS * tl.sqrt(old2 * dx2))
    significant = good & (dg2 * 1e4 > EPS * EPS * old2 * 1e6)
    estimate = tl.where(significant, larger(estimate, tl.sqrt(dg2 / larger(dx2, 1e-300))), estimate)
    was_plain = tl.load(plain_next + b, mask=inside, other=0) != 0
    if PLAIN:
        plain = b >= 0
        next_plain = b < 0
    else:
        plain = was_plain
        next_plain = good == 0
    # Torch divides a number by a tensor in this way.
    cap = tl.where(estimate > 0, 10.0 * (1.0 / larger(estimate, 1e-300)), float("inf"))
    t = tl.where(active & plain, tl.where(good, smaller(before * grow, cap), before * shrink), before)
    failed = active & (valid == 0) & (t < 1e-6 * first)
    size = tl.sqrt(tl.load(sums + 4 * images + b, mask=inside, other=0.0))
    diverged = good & (size > tl.load(limit + b, mask=inside, other=0.0))
    new_status = tl.where(failed, NON_FINITE, tl.load(status + b, mask=inside, other=0))
    next_plain = tl.where(active, tl.where(next_plain, 1, 0), tl.where(was_plain, 1, 0))
    tl.store(next_tau + b, t, mask=inside)
    tl.store(next_lipschitz_estimate + b, estimate, mask=inside)
    tl.store(next_plain_next + b, next_plain.to(tl.uint8), mask=inside)
    more = tl.load(gradients + b, mask=inside, other=0) + tl.where(active, 1, 0)
    tl.store(next_gradients + b, more, mask=inside)
    more = tl.load(iterations + b, mask=inside, other=0) + tl.where(good, 1, 0)
    tl.store(next_iterations + b, more, mask=inside)
    tl.store(next_status + b, tl.where(diverged, RUNAWAY, new_status), mask=inside)
    tl.store(next_running + b, tl.where(active & (failed == 0) & (diverged == 0), 1, 0).to(tl.uint8), mask=inside)
    tl.store(accept + b, tl.where(good, 1, 0).to(tl.uint8), mask=inside)
    tl.store(forget + b, tl.where(plain | (good == 0), 1, 0).to(tl.uint8), mask=inside)


def variants() -> list[Variant]:
    """The kernels as shipped."""
    return updates(descend, pgd_step, take) + decisions(convergence_test, acceptance_test)
