# ruff: noqa: PLR0913 - a launch needs every pointer
"""The solvers' per-image decisions, from the sums of their vector updates: a warp processes 32 images.

Each kernel replaces dozens of torch operations on `[B]` tensors. It computes them in the same order in float64, with
the same bits (no fused multiply-add), including NaN and infinities. Numbers change only for active images (`running`
`[B]`, bytes); results are written to separate tensors, `next_...`. `settings` is a float64 tensor, so that a new
tolerance needs no new kernel.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..variants import Variant, unspecialized

BLOCK = 32

# deepreg_fast.Status, and the status of a linear solve that has not stopped
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
    """`torch.maximum`: NaN if either is."""
    return tl.where((a > b) | (a != a), a, b)


@triton.jit
def smaller(a, b):
    """`torch.minimum`: NaN if either is."""
    return tl.where((a < b) | (a != a), a, b)


@unspecialized("images", anywhere=None)
def pgd_residual(
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
def pgd_candidate(
    sums, value, limit, settings, tau, lipschitz_estimate, plain_next, gradients, iterations, status, running,
    next_tau, next_lipschitz_estimate, next_plain_next, next_gradients, next_iterations, next_status, next_running,
    accept, forget, images, EPS: tl.constexpr, PLAIN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Accept the candidate or shrink tau, from `<dx, dx>, <dg, dg>, <dx, dg>, <g, g>, <candidate, candidate>`.

    `value` is r at the candidate, `limit` the largest plausible norm of an image, `forget` whether the accelerator is
    reset. `PLAIN`: without acceleration. `settings` as in `pgd_residual`.
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
    """Whether the recurrence stops: `||r|| <= target_norm`, or three consecutive steps did not change x.

    `squared_norms` are `<x, x>, <r, r>` after the step; the first of `sums` is `<p, p>`.
    """
    b = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = b < images
    active = tl.load(running + b, mask=inside, other=0) != 0
    xx, rr = (
        tl.load(squared_norms + b, mask=inside, other=0.0),
        tl.load(squared_norms + images + b, mask=inside, other=0.0),
    )
    step = tl.load(length + b, mask=inside, other=0.0) * tl.sqrt(tl.load(sums + b, mask=inside, other=0.0))
    count = tl.where(step <= 0.25 * EPS * tl.sqrt(xx), tl.load(stagnant_steps + b, mask=inside, other=0) + 1, 0)
    done = (tl.sqrt(rr) <= tl.load(target_norm + b, mask=inside, other=0.0)) | (rr == 0) | (count >= 3)
    tl.store(next_stagnant_steps + b, count, mask=inside)
    tl.store(next_running + b, tl.where(active & (done == 0), 1, 0).to(tl.uint8), mask=inside)


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
