"""The adversarial penalty `xi sum_b relu(beta_hat_b - beta)` of bi-level training (docs/math.md, M11)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..batched.linalg import expand, norm
from ..regularizers.lipschitz import PENALTIES, LipschitzQuotient
from .config import BilevelConfig
from .lanes import Batch

if TYPE_CHECKING:
    from .trainer import Trainer
    from .warm_starts import WarmStarts


@dataclass
class Ascended:
    """The penalized quotient of each image at its new perturbation, and how many of its steps left it unchanged."""

    quotient: LipschitzQuotient
    unchanged: torch.Tensor


class Penalty:
    """Perturbations of the samples, which ascend the quotient that the penalty bounds, and its gradient in theta."""

    def __init__(self, config: BilevelConfig, run: Trainer, store: WarmStarts) -> None:
        self.config, self.run, self.store = config, run, store

    @property
    def is_active(self) -> bool:
        """Whether there is a penalty at all."""
        return self.config.beta > 0 and self.config.xi > 0

    @property
    def beta(self) -> float:
        """The current bound, raised linearly from `beta_start` over the first half."""
        c = self.config
        if c.beta_start == 0:
            return c.beta
        return c.beta_start + (c.beta - c.beta_start) * min(1.0, 2.0 * self.run.step_done / c.steps)

    def ascend(self, batch: Batch) -> Ascended | None:
        """Take the configured number of ascent steps from the saved perturbations, and save the last ones."""
        if not self.is_active:
            return None
        c, reg, x = self.config, self.run.reg, batch.x
        grad_x = reg.value_and_grad(x)[1]
        radius = c.delta_radius * norm(x - reg.center).clamp_min(1e-6)
        delta = self.perturbation(batch, radius)
        measure = PENALTIES[c.penalty]
        quotient = measure(reg, x, delta, grad_x)
        unchanged = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        late = 3 * self.run.step_done >= 2 * c.steps
        for _ in range(c.delta_steps_late if late else c.delta_steps):
            free = c.delta_ball == "free"
            delta, is_unchanged = quotient.gradient_step(radius) if free else quotient.power_step(radius)
            unchanged += is_unchanged
            quotient = measure(reg, x, delta, grad_x)
        self.store.put("delta", batch.rows, delta)
        return Ascended(quotient, unchanged)

    def gradient(self, ascended: Ascended, lane: slice, beta_hat: torch.Tensor) -> dict[str, torch.Tensor]:
        """Gradient of the penalty of a lane's images; empty if none exceeds the bound. `beta_hat` is on the host."""
        if not bool((beta_hat[lane] > self.beta).any()):
            return {}
        q = ascended.quotient
        if len(q.x) > lane.stop - lane.start:
            q = PENALTIES[self.config.penalty](self.run.reg, q.x[lane], q.delta[lane], q.grad_x[lane])
        return q.grad_theta(self.config.xi * (q.beta > self.beta).to(q.x.dtype))

    def perturbation(self, batch: Batch, radius: torch.Tensor) -> torch.Tensor:
        """Each sample's saved perturbation, rescaled to norm `radius` for the sphere. Samples without one get a random
        perturbation of that norm."""
        rows, upload = batch.rows, self.run.placement.upload
        delta = self.store.get("delta", rows)
        blank = self.store.blank[rows.local]
        if blank.any():
            shape = tuple(batch.x.shape[1:])
            keys = [[self.config.seed, 3, int(s)] for s in rows.samples[blank]]
            drawn = [np.random.Generator(np.random.PCG64(k)).standard_normal(shape, dtype=np.float32) for k in keys]
            index = upload(torch.from_numpy(np.flatnonzero(blank)))
            delta.index_copy_(0, index, upload(torch.from_numpy(np.stack(drawn))))
        scale = radius / norm(delta).clamp_min(1e-30)
        if self.config.delta_ball == "free":
            scale = torch.where(upload(torch.from_numpy(blank)), scale, 1.0)
        return expand(scale, delta) * delta
