# ruff: noqa: PLR0913 - a launch needs every pointer
"""What a solver decides for each image, from the sums of its passes: a warp takes 32 images.

Each kernel stands for some dozens of torch's operations on `[B]` tensors, takes them in the same order in float64 and
gives the same bits (no fused multiply-add), NaN and infinities included. A number changes only where `running` `[B]`
(bytes) is true; results are written beside what they replace, `next_...`. `settings` is a float64 tensor, so that a new
tolerance needs no new kernel.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..variants import Variant, unspecialized

BLOCK = 32

# deepreg_fast.Status, and what a linear solve has before its end
RUNNING = tl.constexpr(-1)
CONVERGED = tl.constexpr(0)
MAX_ITERATIONS = tl.constexpr(1)
STAGNATED = tl.constexpr(2)
NEGATIVE_CURVATURE = tl.constexpr(3)
NON_FINITE = tl.constexpr(4)
RUNAWAY = tl.constexpr(5)


@triton.jit
def finite(a):
    """Whether a number is neither NaN nor infinite."""
    return tl.abs(a) < float("inf")


@triton.jit
def larger(a, b):
    """`torch.maximum`: NaN where either is."""
    return tl.where((a > b) | (a != a), a, b)


@triton.jit
def smaller(a, b):
    """`torch.minimum`: NaN where either is."""
    return tl.where((a < b) | (a != a), a, b)


@unspecialized("images", anywhere=None)
def pgd_residual(
    sums, scale, settings, tau, lipschitz_estimate, residual, gradients, status, running,
    next_residual, next_status, next_running, images, EPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The residual at x from `<step, step>, <x, x>, <g, g>`, and whether the image ends there.

    `settings`: tolerance, first tau, growth, shrinkage, limit on gradients.
    """
    b = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = b < images
    on = tl.load(running + b, mask=inside, other=0) != 0
    tolerance, first = tl.load(settings), tl.load(settings + 1)
    length = tl.sqrt(tl.load(sums + b, mask=inside, other=0.0))
    size = tl.sqrt(tl.load(sums + images + b, mask=inside, other=0.0))
    slope = tl.sqrt(tl.load(sums + 2 * images + b, mask=inside, other=0.0))
    t, most = tl.load(tau + b, mask=inside, other=1.0), tl.load(lipschitz_estimate + b, mask=inside, other=0.0)
    count = tl.load(gradients + b, mask=inside, other=0)
    tested = most > 0
    safe = tl.where(tested, smaller(t, 1.0 / larger(most, 1e-300)), t)
    found = length / safe / larger(larger(tl.load(scale + b, mask=inside, other=0.0), slope), 1e-300)
    still = (length <= 2.0 * EPS * size) | (t < 1e-12 * first)
    probed = tested | (count > 1) | (length == 0)
    done = on & (found <= tolerance) & probed
    stuck = on & (found > tolerance) & still
    ended = tl.where(done, CONVERGED, tl.load(status + b, mask=inside, other=0))
    go = on & (done == 0) & (stuck == 0) & (count < tl.load(settings + 4))
    tl.store(next_residual + b, tl.where(on, found, tl.load(residual + b, mask=inside, other=0.0)), mask=inside)
    tl.store(next_status + b, tl.where(stuck, STAGNATED, ended), mask=inside)
    tl.store(next_running + b, tl.where(go, 1, 0).to(tl.uint8), mask=inside)


@unspecialized("images", anywhere=None)
def pgd_candidate(
    sums, value, limit, settings, tau, lipschitz_estimate, plain_next, gradients, iterations, status, running,
    next_tau, next_lipschitz_estimate, next_plain_next, next_gradients, next_iterations, next_status, next_running,
    accept, forget, images, EPS: tl.constexpr, PLAIN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Accept the candidate or shrink tau, from `<dx, dx>, <dg, dg>, <dx, dg>, <g, g>, <candidate, candidate>`.

    `value` is the candidate's, `limit` the longest plausible image, `forget` where an accelerator does. `PLAIN`: there
    is no accelerator. `settings` as in `pgd_residual`.
    """
    b = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = b < images
    on = tl.load(running + b, mask=inside, other=0) != 0
    first, grow, shrink = tl.load(settings + 1), tl.load(settings + 2), tl.load(settings + 3)
    dx2, dg2 = tl.load(sums + b, mask=inside, other=0.0), tl.load(sums + images + b, mask=inside, other=0.0)
    bend = tl.load(sums + 2 * images + b, mask=inside, other=0.0)
    old2 = tl.load(sums + 3 * images + b, mask=inside, other=0.0)
    before, most = tl.load(tau + b, mask=inside, other=1.0), tl.load(lipschitz_estimate + b, mask=inside, other=0.0)
    sound = finite(dg2) & finite(tl.load(value + b, mask=inside, other=0.0))
    # The difference of two gradients carries their rounding; below it the test says nothing.
    good = on & sound & (bend <= dx2 / before + 4.0 * EPS * tl.sqrt(old2 * dx2))
    clear = good & (dg2 * 1e4 > EPS * EPS * old2 * 1e6)
    most = tl.where(clear, larger(most, tl.sqrt(dg2 / larger(dx2, 1e-300))), most)
    was_cautious = tl.load(plain_next + b, mask=inside, other=0) != 0
    if PLAIN:
        plain = b >= 0
        careful = b < 0
    else:
        plain = was_cautious
        careful = good == 0
    # As torch divides a number by a tensor.
    cap = tl.where(most > 0, 10.0 * (1.0 / larger(most, 1e-300)), float("inf"))
    t = tl.where(on & plain, tl.where(good, smaller(before * grow, cap), before * shrink), before)
    lost = on & (sound == 0) & (t < 1e-6 * first)
    size = tl.sqrt(tl.load(sums + 4 * images + b, mask=inside, other=0.0))
    diverged = good & (size > tl.load(limit + b, mask=inside, other=0.0))
    ended = tl.where(lost, NON_FINITE, tl.load(status + b, mask=inside, other=0))
    careful = tl.where(on, tl.where(careful, 1, 0), tl.where(was_cautious, 1, 0))
    tl.store(next_tau + b, t, mask=inside)
    tl.store(next_lipschitz_estimate + b, most, mask=inside)
    tl.store(next_plain_next + b, careful.to(tl.uint8), mask=inside)
    more = tl.load(gradients + b, mask=inside, other=0) + tl.where(on, 1, 0)
    tl.store(next_gradients + b, more, mask=inside)
    more = tl.load(iterations + b, mask=inside, other=0) + tl.where(good, 1, 0)
    tl.store(next_iterations + b, more, mask=inside)
    tl.store(next_status + b, tl.where(diverged, RUNAWAY, ended), mask=inside)
    tl.store(next_running + b, tl.where(on & (lost == 0) & (diverged == 0), 1, 0).to(tl.uint8), mask=inside)
    tl.store(accept + b, tl.where(good, 1, 0).to(tl.uint8), mask=inside)
    tl.store(forget + b, tl.where(plain | (good == 0), 1, 0).to(tl.uint8), mask=inside)


@unspecialized("images", anywhere=None)
def cg_beta(
    new_rz, rz, restarted, status, running, factor, next_rz, next_restarted, next_status, next_running, images,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """From `<r, M^-1 r>` the factor of the old direction, or the end."""
    b = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = b < images
    on, begins = tl.load(running + b, mask=inside, other=0) != 0, tl.load(restarted + b, mask=inside, other=0) != 0
    new, old = tl.load(new_rz + b, mask=inside, other=0.0), tl.load(rz + b, mask=inside, other=1.0)
    found = tl.where(finite(new), tl.where(new > 0, RUNNING, NEGATIVE_CURVATURE), NON_FINITE)
    go = on & (found == RUNNING)
    tl.store(factor + b, tl.where(begins, 0.0, new / old), mask=inside)
    tl.store(next_rz + b, tl.where(go, new, old), mask=inside)
    tl.store(next_restarted + b, tl.where(go, 0, tl.where(begins, 1, 0)).to(tl.uint8), mask=inside)
    tl.store(next_status + b, tl.where(on, found, tl.load(status + b, mask=inside, other=0)), mask=inside)
    tl.store(next_running + b, tl.where(go, 1, 0).to(tl.uint8), mask=inside)


@unspecialized("images", anywhere=None)
def cg_alpha(
    sums, squared_norms, rz, a_norm, status, running, length, next_norm, next_status, next_running, images,
    EPS: tl.constexpr, MAX_NORM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """From `<p, p>, <p, Ap>, <Ap, Ap>` the length of the step, zero where there is none, and a bound on `||A||`.

    `moved` are `<x, x>, <r, r>`; a step that may make x or r longer than `MAX_NORM` is not taken.
    """
    b = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = b < images
    on = tl.load(running + b, mask=inside, other=0) != 0
    pp, bend = tl.load(sums + b, mask=inside, other=1.0), tl.load(sums + images + b, mask=inside, other=1.0)
    size, norm = tl.load(sums + 2 * images + b, mask=inside, other=1.0), tl.load(a_norm + b, mask=inside, other=0.0)
    ratio = tl.sqrt(size / pp)
    norm = tl.where(on & finite(ratio), larger(norm, ratio), norm)
    # <p, A p> carries the rounding of A p: below it the sign says nothing.
    noise = 0.5 * EPS * norm * pp
    found = tl.where(bend > noise, RUNNING, tl.where(bend < -noise, NEGATIVE_CURVATURE, STAGNATED))
    found = tl.where(finite(bend) & finite(size), found, NON_FINITE)
    go = on & (found == RUNNING)
    step = tl.where(go, tl.load(rz + b, mask=inside, other=0.0) / bend, 0.0)
    x = tl.sqrt(tl.load(squared_norms + b, mask=inside, other=0.0)) + step * tl.sqrt(pp)
    r = tl.sqrt(tl.load(squared_norms + images + b, mask=inside, other=0.0)) + step * tl.sqrt(size)
    found = tl.where(go & (((x <= MAX_NORM) & (r <= MAX_NORM)) == 0), NON_FINITE, found)
    go = on & (found == RUNNING)
    tl.store(length + b, tl.where(go, step, 0.0), mask=inside)
    tl.store(next_norm + b, norm, mask=inside)
    tl.store(next_status + b, tl.where(on, found, tl.load(status + b, mask=inside, other=0)), mask=inside)
    tl.store(next_running + b, tl.where(go, 1, 0).to(tl.uint8), mask=inside)


@unspecialized("images", anywhere=None)
def cg_has_converged(
    squared_norms,
    sums,
    length,
    stagnant_steps,
    target_norm,
    running,
    next_stagnant_steps,
    next_running,
    images,
    EPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Whether the recurrence is done: `||r|| <= aim`, or three steps in a row left x as it was.

    `moved` are `<x, x>, <r, r>` after the step; the first of `sums` is `<p, p>`.
    """
    b = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = b < images
    on = tl.load(running + b, mask=inside, other=0) != 0
    xx, rr = (
        tl.load(squared_norms + b, mask=inside, other=0.0),
        tl.load(squared_norms + images + b, mask=inside, other=0.0),
    )
    step = tl.load(length + b, mask=inside, other=0.0) * tl.sqrt(tl.load(sums + b, mask=inside, other=0.0))
    count = tl.where(step <= 0.25 * EPS * tl.sqrt(xx), tl.load(stagnant_steps + b, mask=inside, other=0) + 1, 0)
    done = (tl.sqrt(rr) <= tl.load(target_norm + b, mask=inside, other=0.0)) | (rr == 0) | (count >= 3)
    tl.store(next_stagnant_steps + b, count, mask=inside)
    tl.store(next_running + b, tl.where(on & (done == 0), 1, 0).to(tl.uint8), mask=inside)


def variants() -> list[Variant]:
    """The kernels as shipped."""
    flags, counts = (
        ("plain_next", "restarted", "running", "accept", "forget"),
        ("gradients", "iterations", "status", "stagnant_steps"),
    )
    kinds = dict.fromkeys((*flags, *(f"next_{n}" for n in flags)), "*u8") | {"value": "*fp32", "images": "i32"}
    kinds |= dict.fromkeys((*counts, *(f"next_{n}" for n in counts)), "*i64")
    constants: dict[str, object] = {"EPS": 2.0**-23, "BLOCK": BLOCK, "PLAIN": False, "MAX_NORM": 1e38}
    return [
        Variant(
            kernel,
            {n: kinds.get(n, "*fp64") for n in kernel.arg_names if n not in constants},
            {n: v for n, v in constants.items() if n in kernel.arg_names},
            BLOCK // 32,
            1,
        )
        for kernel in (pgd_residual, pgd_candidate, cg_beta, cg_alpha, cg_has_converged)
    ]
