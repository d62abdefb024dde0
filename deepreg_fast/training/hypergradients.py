"""Gradients of a batch's loss in theta and log mu through its recoveries, lane by lane (docs/math.md, M7)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from ..batched.linalg import dot, expand
from ..inverse.adjoint import Adjoint, Unrolled, adjoint_named, solve_adjoint
from ..inverse.hypergradient import parameter_gradients, unrolled_gradients
from ..solvers import PGDOptions, Solution, pgd
from ..status import Status
from . import losses
from .config import UNSUPERVISED, BilevelConfig
from .lanes import Batch
from .losses import LossFunction
from .recoveries import Recovered, Recoveries

if TYPE_CHECKING:
    from .trainer import Trainer
    from .warm_starts import WarmStarts

MSE_SCALE, _MSE_FLOOR = 1e3, 1e-5
# The step of SURE's probe, as a fraction of the noise: small enough for a derivative, and far above the tolerance.
PROBE = 0.3


class Hyper(NamedTuple):
    """`theta` by name and `log_mu` (0-d) for each lane, and statistics `[B]` of each image."""

    theta: list[dict[str, torch.Tensor]]
    log_mu: list[torch.Tensor]
    stats: dict[str, torch.Tensor]

    def plus(self, other: Hyper) -> Hyper:
        """The sum of two gradients, with the statistics of the first."""
        theta = [{n: g + more[n] for n, g in lane.items()} for lane, more in zip(self.theta, other.theta, strict=True)]
        return Hyper(theta, [a + b for a, b in zip(self.log_mu, other.log_mu, strict=True)], self.stats)


def loss_of_error(name: str, error: torch.Tensor, total: int, pixels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`[B]` twice: each image's share of the loss of a batch of `total` images, its derivative in the squared error.

    "mse" is `1000/N sum_b error_b` over the N pixels of the batch, "psnr" the mean over its images of
    `10 log10(error_b / d + 1e-5)`: minus their PSNR, images beyond 50 dB counting less (docs/math.md, M7).
    """
    if name == "mse":
        weight = MSE_SCALE / (total * pixels)
        return weight * error, torch.full_like(error, weight)
    floored = error / pixels + _MSE_FLOOR
    return 10.0 / total * torch.log10(floored), 10.0 / (math.log(10.0) * total * pixels) / floored


class Hypergradients:
    """The gradient of the configured loss, or of a user's, at a batch's recoveries."""

    def __init__(
        self,
        config: BilevelConfig,
        run: Trainer,
        store: WarmStarts,
        recoveries: Recoveries,
        loss: LossFunction | None = None,
    ) -> None:
        self.config, self.run, self.store, self.recoveries = config, run, store, recoveries
        self.loss = loss or losses.SUPERVISED.get(config.loss)

    @property
    def is_judged(self) -> bool:
        """Whether the loss is something else than a function of the squared error."""
        return self.loss is not None or self.config.loss in UNSUPERVISED

    @property
    def adjoint(self) -> Adjoint:
        """How the gradient of the current step passes through the recovery."""
        c = self.config
        method = "jfb" if self.run.step_done < c.jfb_steps else c.adjoint
        return adjoint_named(method, c.adjoint_iterations, c.adjoint_tolerance, c.adjoint_iterations)

    def __call__(self, batch: Batch, r: Recovered) -> Hyper:
        """Gradients of the loss; the statistics contain each image's squared error."""
        difference = r.solution.x - batch.x
        error = dot(difference, difference)
        if self.is_judged:
            hyper = self._of_judged(batch, r)
        else:
            weights = loss_of_error(self.config.loss, error, batch.total, batch.x[0].numel())[1]
            if isinstance(self.adjoint, Unrolled):
                hyper = self._unrolled(batch, r, weights)
            else:
                hyper = self._implicit(batch, r.solution, r, batch.x - r.solution.x, weights)
        hyper.stats["error"] = error
        return hyper

    def _implicit(
        self,
        batch: Batch,
        sol: Solution,
        r: Recovered,
        b: torch.Tensor,
        weights: torch.Tensor,
        warm: bool = True,
    ) -> Hyper:
        """Solve `H gamma = b`, then compute each lane's parameter products.

        b is minus half of the derivative of the loss divided by `weights`: `x - xhat` for the squared error. `warm`
        starts from the saved gamma and saves the new one."""
        adjoint, rows = self.adjoint, batch.rows
        assert not isinstance(adjoint, Unrolled)
        lin = self.run.reg.linearize(sol.x)
        b = torch.where(expand(r.valid, b), b, 0.0)
        gamma0 = self.store.get("gamma", rows) if self.config.warm_start and warm else None
        adj = solve_adjoint(lin, self.run.A, r.mu, b, adjoint, gamma0, 1.0 + self.run.reg.alpha)
        negative = adj.status == int(Status.NEGATIVE_CURVATURE)
        usable = torch.isfinite(adj.x).flatten(1).all(1) & r.valid
        gamma = torch.where(expand(usable, b), adj.x, 0.0)
        if warm:
            self.store.put("gamma", rows, torch.where(expand(usable & ~negative, b), gamma, 0.0))
        # The products are linear in gamma. Its warm start is saved without the weights, which change between steps.
        weighted = expand(weights, gamma) * gamma
        theta, log_mu = [], []
        for lane in batch.lanes:
            part = lin if len(batch.lanes) == 1 else self.run.reg.linearize(sol.x[lane])
            by_theta, by_log_mu = parameter_gradients(part, r.mu[lane], weighted[lane])
            theta.append(by_theta)
            log_mu.append(by_log_mu)
        stats = {
            "adjoint_iterations": adj.iterations,
            "negative": negative,
            "adjoint_unconverged": adj.status != int(Status.CONVERGED),
        }
        return Hyper(theta, log_mu, stats)

    def _of_judged(self, batch: Batch, r: Recovered) -> Hyper:
        """Gradients of a loss that is not a function of the squared error, with its value in the statistics."""
        c, A, sol, ones = self.config, self.run.A, r.solution, torch.ones_like(r.solution.tau)
        scale, second = MSE_SCALE / batch.pixels, None
        if self.loss is not None:
            judged = self._supervised(batch, sol.x)
        elif c.loss == "noise2noise":
            other = A.A(batch.x) + c.sigma * self.recoveries.noise_of(batch, self.recoveries.other_noise)
            judged = losses.noise2noise(A, sol.x, other, scale)
        else:
            tau = PROBE * c.sigma
            signs = self.probe((batch.total, *r.y.shape[1:]), self.run.step_done)
            probe = self.run.placement.upload(torch.from_numpy(signs[batch.positions]))
            # From xhat and not from a warm start of its own: the difference of the two must be small and exact.
            options = PGDOptions(c.inner_iterations, self.recoveries.accuracy.tolerance, c.acceleration)
            second = pgd(r.y + tau * probe, A, self.run.reg, r.mu, options, sol.x, sol.tau)
            r = r._replace(valid=r.valid & torch.isfinite(second.x).flatten(1).all(1))
            judged = losses.sure(A, sol.x, second.x, r.y, probe, c.sigma, tau, scale)
        hyper = self._implicit(batch, sol, r, -0.5 * judged.by_x, ones)
        if second is not None and judged.by_second is not None:
            hyper = hyper.plus(self._implicit(batch, second, r, -0.5 * judged.by_second, ones, warm=False))
        hyper.stats["judged"] = judged.value
        return hyper

    def _supervised(self, batch: Batch, x_hat: torch.Tensor) -> losses.Judged:
        """The mean of a loss over the whole batch; each lane calls it for its own images."""
        assert self.loss is not None
        parts = [losses.supervised(self.loss, x_hat[s], batch.x[s]) for s in batch.lanes]
        share = batch.per_lane / batch.total
        return losses.Judged(share * torch.cat([p.value for p in parts]), share * torch.cat([p.by_x for p in parts]))

    def _unrolled(self, batch: Batch, r: Recovered, weights: torch.Tensor) -> Hyper:
        """Backpropagate through `adjoint_iterations` further steps of the valid recoveries. Synchronizes for their
        number."""
        steps, sol = self.config.adjoint_iterations, r.solution
        theta, log_mu = [], []
        for lane in batch.lanes:
            valid = r.valid[lane].nonzero()[:, 0] + lane.start
            by_theta, by_log_mu = unrolled_gradients(
                batch.x[valid],
                r.y[valid],
                self.run.A,
                self.run.reg,
                r.mu[valid],
                sol.x[valid],
                sol.tau[valid],
                steps,
                weights[valid],
            )
            theta.append(by_theta)
            log_mu.append(by_log_mu)
        return Hyper(theta, log_mu, {"adjoint_iterations": torch.full_like(sol.iterations, steps)})

    def probe(self, shape: tuple[int, ...], step: int) -> np.ndarray:
        """Random signs, other ones at each step: with one probe per sample, training would fit the probes."""
        rng = np.random.Generator(np.random.PCG64([self.config.seed, 5, step + 1]))
        return 2.0 * rng.integers(0, 2, shape, dtype=np.int8).astype(np.float32) - 1.0
