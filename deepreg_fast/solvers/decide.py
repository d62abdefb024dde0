"""What PGD decides for each image, from the sums of its passes (docs/math.md, M4 and M5): functions of vectors `[b]`.

A number changes only where `running`, so that sums of images that have ended may be anything.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..linsolve.passes import kernel_for
from ..status import Status
from .options import PGDOptions


class Numbers(NamedTuple):
    """The numbers of each image, `[b]`: see `Solution`.

    `curvature` is the largest met, `cautious` whether the next candidate is the plain step, `running` whether the image
    is still at work; one that is has the status `MAX_ITERATIONS`. tau, curvature and residual are float64.
    """

    tau: torch.Tensor
    curvature: torch.Tensor
    residual: torch.Tensor
    cautious: torch.Tensor
    gradients: torch.Tensor
    iterations: torch.Tensor
    status: torch.Tensor
    running: torch.Tensor


def judge_residual(n: Numbers, sums: torch.Tensor, scale: torch.Tensor, options: PGDOptions, eps: float) -> Numbers:
    """The residual at x from `<step, step>, <x, x>, <g, g>`, `[3, b]`: the image has converged, is stuck, or goes on.

    `scale` is the norm of the first gradient, `eps` the spacing of the images' floats at 1.
    """
    length, size, slope = torch.sqrt(sums)
    tested = n.curvature > 0
    safe = torch.where(tested, torch.minimum(n.tau, 1.0 / n.curvature.clamp_min(1e-300)), n.tau)
    residual = length / safe / torch.maximum(scale, slope).clamp_min(1e-300)
    still = (length <= 2.0 * eps * size) | (n.tau < 1e-12 * options.tau)
    probed = tested | (n.gradients > 1) | (length == 0)
    done = n.running & (residual <= options.tolerance) & probed
    stuck = n.running & (residual > options.tolerance) & still
    status = torch.where(stuck, int(Status.STAGNATED), torch.where(done, int(Status.CONVERGED), n.status))
    return n._replace(
        residual=torch.where(n.running, residual, n.residual),
        status=status,
        running=n.running & ~done & ~stuck & (n.gradients < options.max_iterations),
    )


def judge_candidate(
    n: Numbers, sums: torch.Tensor, value: torch.Tensor, limit: torch.Tensor, options: PGDOptions, eps: float
) -> tuple[Numbers, torch.Tensor, torch.Tensor]:
    """Accept the candidate or shrink tau, from `<dx, dx>, <dg, dg>, <dx, dg>, <g, g>, <x+, x+>`, `[5, b]`.

    `value` is the candidate's and `limit` the length of the longest plausible image. Returns the numbers, where the
    candidate is accepted, and where the accelerator forgets, which may be anything for images not at work.
    """
    dx2, dg2, bend, old2, size2 = sums
    finite = torch.isfinite(dg2) & torch.isfinite(value)
    # The difference of two gradients carries their rounding; below it the test says nothing.
    slack = 4.0 * eps * torch.sqrt(old2 * dx2)
    good = n.running & finite & (bend <= dx2 / n.tau + slack)
    clear = good & (dg2 * 1e4 > (eps**2) * old2 * 1e6)
    met = torch.maximum(n.curvature, torch.sqrt(dg2 / dx2.clamp_min(1e-300)))
    curvature = torch.where(clear, met, n.curvature)
    # With an accelerator the step size changes only when its memory is gone anyway.
    plain = n.cautious if options.acceleration != "none" else torch.ones_like(n.cautious)
    cap = torch.where(curvature > 0, 10.0 / curvature.clamp_min(1e-300), torch.inf)
    tau = torch.where(good, torch.minimum(n.tau * options.grow, cap), n.tau * options.shrink)
    tau = torch.where(n.running & plain, tau, n.tau)
    lost = n.running & ~finite & (tau < 1e-6 * options.tau)
    away = good & (torch.sqrt(size2) > limit)
    status = torch.where(away, int(Status.RUNAWAY), torch.where(lost, int(Status.NON_FINITE), n.status))
    numbers = Numbers(
        tau=tau,
        curvature=curvature,
        residual=n.residual,
        cautious=torch.where(n.running, ~good & (options.acceleration != "none"), n.cautious),
        gradients=n.gradients + n.running,
        iterations=n.iterations + good,
        status=status,
        running=n.running & ~lost & ~away,
    )
    return numbers, good, plain | ~good


# By the kernels of the backend that serves images like `x`, where it has them: one launch each.


def residual_of(
    x: torch.Tensor, n: Numbers, sums: torch.Tensor, scale: torch.Tensor, options: PGDOptions, eps: float
) -> Numbers:
    """`judge_residual`."""
    if (kernel := kernel_for("pgd_residual", x)) is None:
        return judge_residual(n, sums, scale, options, eps)
    residual, status, running = kernel(n, sums, scale, _settings(options), eps)
    return n._replace(residual=residual, status=status, running=running)


def verdict_on(  # noqa: PLR0913 - judge_candidate's, and the images
    x: torch.Tensor,
    n: Numbers,
    sums: torch.Tensor,
    value: torch.Tensor,
    limit: torch.Tensor,
    options: PGDOptions,
    eps: float,
) -> tuple[Numbers, torch.Tensor, torch.Tensor]:
    """`judge_candidate`."""
    if (kernel := kernel_for("pgd_candidate", x)) is None:
        return judge_candidate(n, sums, value, limit, options, eps)
    plain = options.acceleration == "none"
    numbers, good, forget = kernel(n, sums, value, limit, _settings(options), eps, plain)
    return Numbers(*numbers), good, forget


def _settings(options: PGDOptions) -> tuple[float, ...]:
    return options.tolerance, options.tau, options.grow, options.shrink, options.max_iterations
