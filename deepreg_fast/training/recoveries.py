"""The recoveries of bi-level training: measurements of the samples, and solves from warm starts."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from ..batched.linalg import expand, norm
from ..inverse.data_term import initial_point
from ..solvers import PGDOptions, Solution, pgd
from ..status import Status
from .config import UNSUPERVISED, BilevelConfig
from .guards import ToleranceSchedule
from .lanes import Batch
from .samples import Noise

if TYPE_CHECKING:
    from .trainer import Trainer
    from .warm_starts import WarmStarts


class Recovered(NamedTuple):
    """Recoveries of a batch from `y` `[B, ...]`; those that are not `valid` `[B]` have been replaced by cold starts."""

    y: torch.Tensor
    solution: Solution
    mu: torch.Tensor
    valid: torch.Tensor
    stats: dict[str, torch.Tensor]


class Recoveries:
    """Measures samples and recovers them, each from its last recovery and step size."""

    def __init__(self, config: BilevelConfig, run: Trainer, store: WarmStarts) -> None:
        self.config, self.run, self.store = config, run, store
        shape = (len(run.lanes.owned), run.A.measurements)
        self.noise = Noise(config.seed, shape, run.placement)
        # Of the second measurements of noise2noise.
        self.other_noise = Noise(config.seed + 1, shape, run.placement)
        self.accuracy = ToleranceSchedule(config.tolerance_start, config.tolerance_end, config.stall_window)

    def noise_of(self, batch: Batch, noise: Noise) -> torch.Tensor:
        """Standard normal numbers in the shape of the measurements."""
        return noise.batch(batch.rows).reshape(-1, *self.run.A.measurement_shape)

    def measure(self, batch: Batch) -> torch.Tensor:
        """`A x` plus the sample's noise, which is the same in every epoch."""
        y = self.run.A.A(batch.x)
        return y + self.config.sigma * self.noise_of(batch, self.noise) if self.config.sigma else y

    def __call__(self, batch: Batch) -> Recovered:
        """Recover from the warm starts. An invalid recovery makes the sample's next start cold."""
        c, reg, A, rows, x = self.config, self.run.reg, self.run.A, batch.rows, batch.x
        y = self.measure(batch)
        mu = torch.full((len(x),), self.run.mu, dtype=x.dtype, device=x.device)
        cold = initial_point(y, A, reg)
        visits = self.store.get("visits", rows)
        warm = (visits > 0) & c.warm_start
        x0 = torch.where(expand(warm, cold), self.store.get("x", rows), cold)
        tau0 = torch.where(warm, self.store.get("tau", rows), 1.0)
        # Computed on the host, without reading `visits`: an epoch draws each sample at most once.
        first = self.run.lanes.epoch(self.run.step_done) < 1
        limit = (c.first_iterations if first else 0) or c.inner_iterations
        options = PGDOptions(limit, self.accuracy.tolerance, c.acceleration, memory=c.memory, monotone=c.monotone)
        sol = pgd(y, A, reg, mu, options, x0, tau0)
        non_finite = (sol.status == int(Status.NON_FINITE)) | ~torch.isfinite(sol.x).flatten(1).all(1)
        # Without the true images, the size of the cold start must do.
        like = cold if c.loss in UNSUPERVISED else x
        max_distance = 2.0 * norm(like - reg.center) + 0.1 * x[0].numel() ** 0.5
        diverged = (sol.status == int(Status.RUNAWAY)) | (norm(sol.x - reg.center) > max_distance)
        valid = ~(non_finite | diverged)
        # With weight 0, but finite: NaN times 0 is NaN. Measurements that are not finite have no finite cold start.
        sol.x = torch.where(expand(valid, cold), sol.x, torch.where(torch.isfinite(cold), cold, reg.center))
        self.store.put("x", rows, sol.x)
        self.store.put("visits", rows, torch.where(valid, visits + 1, 0))
        self.store.put("tau", rows, torch.where(valid, sol.tau, 1.0))
        stats = {
            "non_finite": non_finite,
            "diverged": diverged & ~non_finite,
            "valid": valid,
            "unconverged": sol.status != int(Status.CONVERGED),
            "gradients": sol.gradients,
            "residual": sol.residual,
        }
        return Recovered(y, sol, mu, valid, stats)
