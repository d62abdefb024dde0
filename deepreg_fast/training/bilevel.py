"""Bi-level training of theta, mu and the perturbations (Nair & Schniter 2022; docs/math.md, M7 and M11).

Each step recovers `xhat` for a batch, solves for `gamma`, and computes `d/dtheta` and `d/dlog mu`. It then ascends each
image's perturbation, adds the penalty's gradient for images with `beta_hat > beta`, and updates with Adam.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from ..ambient import outside_inference
from ..batched.linalg import ordered_sum
from ..errors import TrainingDiverged
from ..regularizers.base import Regularizer, as_regularizer
from .build import regularizer_of
from .checkpoint import Array, Shard
from .config import UNSUPERVISED, BilevelConfig
from .hypergradients import MSE_SCALE, Hypergradients, loss_of_error
from .lanes import Batch
from .losses import LossFunction
from .objective import LaneGradients, Objective, Stats
from .penalty import Penalty
from .placement import read
from .recoveries import Recoveries
from .trainer import Trainer
from .validation import bilevel_scores
from .warm_starts import WarmStarts

if TYPE_CHECKING:
    from .guards import ToleranceSchedule

# Training aborts after this many consecutive steps without a valid reconstruction. No run recovered after more than a
# few.
_PATIENCE = 100


@dataclass
class StepStats:
    """Statistics of a step: of each image `[B]`, and the gradient in log mu of each lane."""

    error: torch.Tensor
    valid: torch.Tensor
    non_finite: torch.Tensor
    diverged: torch.Tensor
    unconverged: torch.Tensor
    gradients: torch.Tensor
    residual: torch.Tensor
    adjoint_iterations: torch.Tensor
    negative: torch.Tensor
    adjoint_unconverged: torch.Tensor
    judged: torch.Tensor
    beta_hat: torch.Tensor
    unchanged: torch.Tensor
    log_mu: torch.Tensor


class Bilevel(Objective[BilevelConfig]):
    """The error of the recoveries, in theta and log mu, and the penalty.

    Parameters
    ----------
    config : BilevelConfig
    reg : Regularizer or nn.Module, optional
        In place of the one that the settings name.
    loss : callable, optional
        In place of the configured loss.
    """

    method = "bilevel"
    lane_columns = ("log_mu",)
    image_columns = tuple(f.name for f in fields(StepStats) if f.name != "log_mu")

    def __init__(self, config: BilevelConfig, reg: nn.Module | None = None, loss: LossFunction | None = None) -> None:
        super().__init__(config)
        self._reg, self._loss = reg, loss
        self._idle = 0

    def build(self) -> Regularizer:
        """The regularizer passed to the constructor, or the one that the settings name."""
        return regularizer_of(self.config) if self._reg is None else as_regularizer(self._reg)

    def attach(self, run: Trainer) -> None:
        """Allocate the per-sample state."""
        super().attach(run)
        c = self.config
        count, rank = len(run.lanes.owned), run.world.rank
        self.store = WarmStarts(count, run.samples.shape, run.placement, c.memory_budget_mb, run.folder, rank)
        self.recover = Recoveries(c, run, self.store)
        self.hypergradients = Hypergradients(c, run, self.store, self.recover, self._loss)
        self.penalty = Penalty(c, run, self.store)

    @property
    def accuracy(self) -> ToleranceSchedule:
        """The tolerance of the recoveries."""
        return self.recover.accuracy

    def groups(self, params: list[nn.Parameter]) -> list[dict[str, Any]]:
        """Parameter groups of theta and log mu, each with its own learning rate."""
        rate = self.config.mu_lr
        return [*super().groups(params), {"params": [self.run.log_mu], "lr": rate, "peak": rate}]

    def begin(self) -> None:
        """Create the files of the warm starts, if they are stored in files."""
        self.store.open(self.run.world.size)

    def gradients(self, batch: Batch) -> LaneGradients:
        """Hypergradient and penalty. Synchronizes with the device once, before the penalty's gradient."""
        recovered = self.recover(batch)
        hyper = self.hypergradients(batch, recovered)
        ascended = self.penalty.ascend(batch)
        on_device = recovered.stats | hyper.stats | {"log_mu": torch.stack(hyper.log_mu)}
        if ascended is not None:
            on_device |= {"beta_hat": ascended.quotient.beta, "unchanged": ascended.unchanged}
        stats = read(on_device)
        if ascended is not None:
            for lane, theta in zip(batch.lanes, hyper.theta, strict=True):
                for name, g in self.penalty.gradient(ascended, lane, stats["beta_hat"]).items():
                    theta[name] = theta[name] + g
        return LaneGradients(hyper.theta, stats)

    def observe(self, stats: Stats) -> dict[str, Any]:
        """Set the gradient in log mu, count the guards' actions, and update the tolerance."""
        s, run = StepStats(**stats), self.run
        run.log_mu.grad = ordered_sum(s.log_mu.unbind(0)).to(run.log_mu.dtype)
        valid = s.valid > 0
        self._count(s, int(valid.sum()))
        total, pixels = len(s.error), math.prod(run.A.image_shape)
        errors = s.error[valid]
        mse = MSE_SCALE / (total * pixels) * float(errors.sum())
        if self.hypergradients.is_judged:
            loss = float(s.judged[valid].sum())
        else:
            loss = float(loss_of_error(self.config.loss, errors, total, pixels)[0].sum())
        metrics: dict[str, Any] = {
            "adjoint_iterations_mean": float(s.adjoint_iterations.mean()),
            "inner_gradients": float(s.gradients.mean()),
            "inner_residual": float(s.residual[valid].mean()) if bool(valid.any()) else -1.0,
            "tolerance": self.accuracy.tolerance,
        }
        excess, beta = 0.0, self.penalty.beta
        if self.penalty.is_active:
            excess = float((s.beta_hat - beta).clamp_min(0).sum())
            metrics |= {"beta_hat": float(s.beta_hat.mean()), "beta_hat_max": float(s.beta_hat.max()), "beta": beta}
        self.accuracy.observe(loss if self.config.loss in UNSUPERVISED else mse)
        return {"loss": loss + self.config.xi * excess, "mse_loss": mse, **metrics}

    def _count(self, s: StepStats, valid: int) -> None:
        """Update the guards' counters.

        Raises
        ------
        TrainingDiverged
            If nothing could be recovered for many steps.
        """
        for counter, images in (
            ("nonfinite_resets", s.non_finite),
            ("runaway_resets", s.diverged),
            ("inner_unconverged", s.unconverged),
            ("negative_curvature", s.negative),
            ("adjoint_unconverged", s.adjoint_unconverged),
            ("delta_kept", s.unchanged),
        ):
            self.run.counters.add(counter, images.sum())
        self._idle = 0 if valid else self._idle + 1
        if self._idle >= _PATIENCE:
            raise TrainingDiverged(
                f"Training must recover some image, but every recovery of the last {_PATIENCE} steps ran away, so that "
                "nothing is learned any more: r is not bounded below. Begin anew with a lower lr, a longer warmup or a "
                "smaller beta_start."
            )

    def after_update(self) -> None:
        """Clamp mu to its bounds."""
        low, high = np.log(self.config.mu_min), np.log(self.config.mu_max)
        log_mu = self.run.log_mu
        self.run.counters.add("mu_clamped", not low <= float(log_mu.detach()) <= high)
        with torch.no_grad():
            log_mu.clamp_(low, high)

    def validate(self) -> dict[str, Any]:
        """PSNR and SSIM, and the extreme eigenvalues of `hess s` on the validation images."""
        return bilevel_scores(self.config, self.run, self.hypergradients)

    def state(self) -> tuple[Mapping[str, Array], Mapping[str, Shard], dict[str, Any]]:
        """Warm starts and the state of the tolerance schedule."""
        a, lanes = self.accuracy, self.run.lanes
        previous = a.previous if np.isfinite(a.previous) else None
        shards = {k: Shard(t, lanes.owned, lanes.count) for k, t in self.store.state().items()}
        return {}, shards, {"accuracy": [a.tolerance, previous, a.total, a.count], "idle": self._idle}

    def load_state(self, tensors: dict[str, np.ndarray], state: dict[str, Any]) -> None:
        """Restore what `state` returned."""
        self.store.load(tensors, self.run.lanes.owned)
        a = self.accuracy
        a.tolerance, previous, a.total, a.count = state["accuracy"]
        a.previous = float("inf") if previous is None else previous
        # Checkpoints of older releases lack this counter.
        self._idle = state.get("idle", 0)


class BilevelTrainer(Trainer):
    """Bi-level training: theta and log mu minimize the error of the recovery (docs/math.md, M7, M11).

    Each step recovers a batch by PGD, solves the adjoint system by CG for the implicit gradient, updates the
    perturbations of the Lipschitz penalty, and takes one step of Adam.

    Parameters
    ----------
    config : BilevelConfig
    reg : Regularizer or nn.Module, optional
        Your own regularizer (a module maps images to one energy each), which is moved to the configured device; by
        default the one that the configuration names.
    loss : callable, optional
        `loss(xhat, x)`, `[B]` or a mean, in place of the configured loss; computed by torch from its first argument.
    progress : bool, optional
        Show a progress bar on stderr, or nothing. Default: a bar on a terminal, otherwise a line every half minute.

    Raises
    ------
    InputError
        If a setting does not fit the images or the regularizer.

    Examples
    --------
    >>> import tempfile, deepreg_fast as dr
    >>> config = dr.BilevelConfig(out=tempfile.mkdtemp(), steps=2, crop=16, batch=2, validation=0, channels=2)
    >>> trainer = dr.BilevelTrainer(config, progress=False)
    >>> reg = trainer.fit()
    >>> float(trainer.mu) > 0
    True
    """

    method = Bilevel.method
    config: BilevelConfig
    objective: Bilevel

    @outside_inference
    def __init__(
        self,
        config: BilevelConfig,
        reg: nn.Module | None = None,
        progress: bool | None = None,
        loss: LossFunction | None = None,
    ) -> None:
        super().__init__(config, Bilevel(config, reg, loss), progress)
