"""PGD's per-image decisions, from the sums of its vector updates (docs/math.md, M4 and M5): functions of vectors `[b]`.

Only the numbers of active images change, so the sums of inactive images may be anything.
"""

from __future__ import annotations

import torch

from ..backend.solver_kernels import PerImageState
from ..batched.fused import decision
from ..status import Status
from .options import PGDOptions


@decision
def convergence_test(
    n: PerImageState, sums: torch.Tensor, scale: torch.Tensor, options: PGDOptions, eps: float
) -> PerImageState:
    """The residual at x from `<step, step>, <x, x>, <g, g>`, `[3, b]`: the image converges, stagnates or continues.

    `scale` is the norm of the first gradient, `eps` the machine epsilon of the images' dtype.
    """
    length, size, slope = torch.sqrt(sums)
    has_estimate = n.lipschitz_estimate > 0
    tau_eff = torch.where(has_estimate, torch.minimum(n.tau, 1.0 / n.lipschitz_estimate.clamp_min(1e-300)), n.tau)
    residual = length / tau_eff / torch.maximum(scale, slope).clamp_min(1e-300)
    stagnated = (length <= 2.0 * eps * size) | (n.tau < 1e-12 * options.tau)
    testable = has_estimate | (n.gradients > 1) | (length == 0)
    done = n.running & (residual <= options.tolerance) & testable
    stuck = n.running & (residual > options.tolerance) & stagnated
    status = torch.where(stuck, int(Status.STAGNATED), torch.where(done, int(Status.CONVERGED), n.status))
    return n._replace(
        residual=torch.where(n.running, residual, n.residual),
        status=status,
        running=n.running & ~done & ~stuck & (n.gradients < options.max_iterations),
    )


@decision
def acceptance_test(
    n: PerImageState, sums: torch.Tensor, value: torch.Tensor, limit: torch.Tensor, options: PGDOptions, eps: float
) -> tuple[PerImageState, torch.Tensor, torch.Tensor]:
    """Accept the candidate or shrink tau, from `<dx, dx>, <dg, dg>, <dx, dg>, <g, g>, <x+, x+>`, `[5, b]`.

    `value` is r at the candidate and `limit` the largest plausible norm of an image. Returns the state, and two masks:
    candidates that are accepted, and images whose accelerator is reset (arbitrary for inactive images).
    """
    dx2, dg2, dxdg, old2, size2 = sums
    finite = torch.isfinite(dg2) & torch.isfinite(value)
    # The difference of two gradients contains their rounding; below it the test has no meaning.
    slack = 4.0 * eps * torch.sqrt(old2 * dx2)
    good = n.running & finite & (dxdg <= dx2 / n.tau + slack)
    significant = good & (dg2 * 1e4 > (eps**2) * old2 * 1e6)
    largest = torch.maximum(n.lipschitz_estimate, torch.sqrt(dg2 / dx2.clamp_min(1e-300)))
    lipschitz_estimate = torch.where(significant, largest, n.lipschitz_estimate)
    # With acceleration, tau changes only if the accelerator is reset anyway.
    plain = n.plain_next if options.acceleration != "none" else torch.ones_like(n.plain_next)
    cap = torch.where(lipschitz_estimate > 0, 10.0 / lipschitz_estimate.clamp_min(1e-300), torch.inf)
    tau = torch.where(good, torch.minimum(n.tau * options.grow, cap), n.tau * options.shrink)
    tau = torch.where(n.running & plain, tau, n.tau)
    failed = n.running & ~finite & (tau < 1e-6 * options.tau)
    diverged = good & (torch.sqrt(size2) > limit)
    status = torch.where(diverged, int(Status.RUNAWAY), torch.where(failed, int(Status.NON_FINITE), n.status))
    numbers = PerImageState(
        tau=tau,
        lipschitz_estimate=lipschitz_estimate,
        residual=n.residual,
        plain_next=torch.where(n.running, ~good & (options.acceleration != "none"), n.plain_next),
        gradients=n.gradients + n.running,
        iterations=n.iterations + good,
        status=status,
        running=n.running & ~failed & ~diverged,
    )
    return numbers, good, plain | ~good
