"""Bi-level training of theta, mu and the perturbations (Nair & Schniter 2022; docs/math.md, M7 and M11).

Each step recovers `xhat` for a batch, solves for `gamma`, and computes `d/dtheta` and `d/dlog mu`. It then ascends each
image's perturbation, adds the penalty's gradient for images with `beta_hat > beta`, and updates with Adam.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from ..ambient import outside_inference
from ..batched.linalg import dot, expand, norm
from ..errors import TrainingDiverged
from ..inverse.adjoint import Adjoint, Unrolled, adjoint_named, solve_adjoint
from ..inverse.data_term import add_noise, initial_point
from ..inverse.hypergradient import parameter_gradients, unrolled_gradients
from ..inverse.recovery import recover
from ..operators import LinearOperator
from ..regularizers.base import Regularizer, as_regularizer
from ..regularizers.lipschitz import PENALTIES, LipschitzQuotient, spectrum
from ..solvers import PGDOptions, Solution, pgd
from ..status import Status
from . import losses
from .build import regularizer_of
from .checkpoint import Array
from .config import UNSUPERVISED, BilevelConfig
from .guards import ToleranceSchedule
from .placement import Rows, read
from .samples import Noise
from .trainer import Trainer
from .warm_starts import WarmStarts

# Training aborts after this many consecutive steps without a valid reconstruction. No run recovered after more than a
# few.
_PATIENCE = 100

_MSE_SCALE, _MSE_FLOOR = 1e3, 1e-5
# The step of SURE's probe, as a fraction of the noise: small enough for a derivative, and far above the tolerance.
_PROBE = 0.3


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

    method = "bilevel"

    @outside_inference
    def __init__(
        self,
        config: BilevelConfig,
        reg: nn.Module | None = None,
        progress: bool | None = None,
        loss: losses.LossFunction | None = None,
    ) -> None:
        self._given = reg
        self._loss_function = loss or losses.SUPERVISED.get(config.loss)
        super().__init__(config, progress)
        self.config: BilevelConfig = config
        count = len(self.samples)
        self.store = WarmStarts(count, self.samples.shape, self.placement, config.memory_budget_mb, self.folder)
        self.noise = Noise(config.seed, (count, self.A.measurements), self.placement)
        # Of the second measurements of noise2noise.
        self.other_noise = Noise(config.seed + 1, (count, self.A.measurements), self.placement)
        self.accuracy = ToleranceSchedule(config.tolerance_start, config.tolerance_end, config.stall_window)
        self._idle = 0

    def build(self) -> Regularizer:
        """The regularizer passed to the constructor, or the one that the settings name."""
        return regularizer_of(self.config) if self._given is None else as_regularizer(self._given)

    @property
    def adjoint(self) -> Adjoint:
        """How the gradient of the current step passes through the recovery."""
        c = self.config
        method = "jfb" if self.step_done < c.jfb_steps else c.adjoint
        return adjoint_named(method, c.adjoint_iterations, c.adjoint_tolerance, c.adjoint_iterations)

    def groups(self) -> list[dict[str, Any]]:
        """Parameter groups of theta and log mu, each with its own learning rate."""
        rate: float = self.config.mu_lr  # type: ignore[attr-defined]
        return [*super().groups(), {"params": [self.log_mu], "lr": rate, "peak": rate}]

    def gradients(self, rows: Rows, x: torch.Tensor) -> dict[str, Any]:
        """One bi-level step on the samples `rows`. Synchronizes with the device once, before the penalty's gradient."""
        y = self._measure(rows, x)
        mu = torch.full((len(x),), self.mu, dtype=x.dtype, device=x.device)
        sol, valid, metrics_on_device = self._recover(rows, x, y, mu)
        error = dot(sol.x - x, sol.x - x)
        judged = None
        if self._loss_function is not None or self.config.loss in UNSUPERVISED:
            theta, log_mu, gradient_stats, judged = self._gradient_of_loss(rows, x, y, sol, valid, mu)
        elif isinstance(self.adjoint, Unrolled):
            _, weights = self._loss(error, x)
            theta, log_mu, gradient_stats = self._unrolled_gradient(x, y, sol, valid, mu, weights)
        else:
            _, weights = self._loss(error, x)
            theta, log_mu, gradient_stats = self._implicit_gradient(rows, x - sol.x, sol, valid, mu, weights)
        metrics_on_device |= gradient_stats | {"error": error, "log_mu": log_mu}
        if judged is not None:
            metrics_on_device["judged"] = judged
        point, ascended = self._ascend(rows, x)
        stats = read(metrics_on_device | ascended)
        penalty = self._penalty_gradient(point, stats)
        for name, p in self.reg.named_parameters():
            if p.requires_grad:
                p.grad = theta[name] + penalty[name] if penalty else theta[name]
        self.log_mu.grad = stats["log_mu"].to(self.log_mu.dtype)
        self._count(stats)
        errors = stats["error"][stats["sound"] > 0]
        mse = _MSE_SCALE / x.numel() * float(errors.sum())
        if judged is None:
            loss = float(self._loss(errors, x)[0].sum())
        else:
            loss = float(stats["judged"][stats["sound"] > 0].sum())
        self._idle = 0 if len(errors) else self._idle + 1
        if self._idle >= _PATIENCE:
            raise TrainingDiverged(
                f"Training must recover some image, but every recovery of the last {_PATIENCE} steps ran away, so that "
                "nothing is learned any more: r is not bounded below. Begin anew with a lower lr, a longer warmup or a "
                "smaller beta_start."
            )
        metrics = self._metrics(stats)
        self.accuracy.observe(loss if self.config.loss in UNSUPERVISED else mse)
        return {"loss": loss + self.config.xi * metrics.pop("penalty_sum"), "mse_loss": mse, **metrics}

    def begin(self) -> None:
        """Create the files of the warm starts, if they are stored in files."""
        self.store.open()

    def after_update(self) -> None:
        """Clamp mu to its bounds."""
        low, high = np.log(self.config.mu_min), np.log(self.config.mu_max)
        outside = not low <= float(self.log_mu.detach()) <= high
        self.counters.add("mu_clamped", outside)
        with torch.no_grad():
            self.log_mu.clamp_(low, high)

    # -- the parts of a step ---------------------------------------------------------------------------------------

    def _loss(self, error: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`[B]` twice: each image's share of the loss, its derivative in the squared error (docs/math.md, M7).

        "mse" is `1000/N sum_b error_b` over the N pixels of the batch, "psnr" the mean over its images of
        `10 log10(error_b / d + 1e-5)`: minus their PSNR, images beyond 50 dB counting less.
        """
        if self.config.loss == "mse":
            weight = _MSE_SCALE / x.numel()
            return weight * error, torch.full_like(error, weight)
        pixels = x[0].numel()
        floored = error / pixels + _MSE_FLOOR
        return 10.0 / len(x) * torch.log10(floored), 10.0 / (math.log(10.0) * len(x) * pixels) / floored

    def _measure(self, rows: Rows, x: torch.Tensor) -> torch.Tensor:
        """`A x` plus the sample's noise, which is the same in every epoch."""
        y = self.A.A(x)
        return y + self.config.sigma * self._noise(rows, self.noise) if self.config.sigma else y

    def _recover(
        self, rows: Rows, x: torch.Tensor, y: torch.Tensor, mu: torch.Tensor
    ) -> tuple[Solution, torch.Tensor, dict[str, torch.Tensor]]:
        """Recover from the warm starts. An invalid recovery makes the sample's next start cold."""
        c = self.config
        cold = initial_point(y, self.A, self.reg)
        visits = self.store.get("visits", rows)
        warm = (visits > 0) & c.warm_start
        x0 = torch.where(expand(warm, cold), self.store.get("x", rows), cold)
        tau0 = torch.where(warm, self.store.get("tau", rows), 1.0)
        tolerance = self.accuracy.tolerance
        # Computed on the host, without reading `visits`: an epoch draws each sample at most once.
        first = self.samples.epoch(self.step_done, len(rows)) < 1
        limit = (c.first_iterations if first else 0) or c.inner_iterations
        options = PGDOptions(limit, tolerance, c.acceleration, memory=c.memory, monotone=c.monotone)
        sol = pgd(y, self.A, self.reg, mu, options, x0, tau0)
        non_finite = (sol.status == int(Status.NON_FINITE)) | ~torch.isfinite(sol.x).flatten(1).all(1)
        # Without the true images, the size of the cold start must do.
        like = cold if self.config.loss in UNSUPERVISED else x
        max_distance = 2.0 * norm(like - self.reg.center) + 0.1 * x[0].numel() ** 0.5
        diverged = (sol.status == int(Status.RUNAWAY)) | (norm(sol.x - self.reg.center) > max_distance)
        valid = ~(non_finite | diverged)
        sol.x = torch.where(expand(valid, cold), sol.x, cold)
        self.store.put("x", rows, sol.x)
        self.store.put("visits", rows, torch.where(valid, visits + 1, 0))
        self.store.put("tau", rows, torch.where(valid, sol.tau, 1.0))
        stats = {
            "bad": non_finite,
            "away": diverged & ~non_finite,
            "sound": valid,
            "unconverged": sol.status != int(Status.CONVERGED),
        }
        return sol, valid, stats | {"gradients": sol.gradients, "residual": sol.residual}

    def _implicit_gradient(
        self,
        rows: Rows | None,
        b: torch.Tensor,
        sol: Solution,
        valid: torch.Tensor,
        mu: torch.Tensor,
        weights: torch.Tensor,
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor, dict[str, torch.Tensor]]:
        """Solve `H gamma = b` from its warm start, then compute the parameter products.

        b is minus half of the derivative of the loss divided by `weights`: `x - xhat` for the squared error."""
        c, x = self.config, b
        adjoint = self.adjoint
        assert not isinstance(adjoint, Unrolled)
        lin = self.reg.linearize(sol.x)
        b = torch.where(expand(valid, x), b, 0.0)
        gamma0 = self.store.get("gamma", rows) if c.warm_start and rows is not None else None
        adj = solve_adjoint(lin, self.A, mu, b, adjoint, gamma0, 1.0 + self.reg.alpha)
        negative = adj.status == int(Status.NEGATIVE_CURVATURE)
        usable = torch.isfinite(adj.x).flatten(1).all(1) & valid
        gamma = torch.where(expand(usable, x), adj.x, 0.0)
        if rows is not None:
            self.store.put("gamma", rows, torch.where(expand(usable & ~negative, x), gamma, 0.0))
        # Both are linear in gamma. Its warm start is saved without the weights, which change from step to step.
        theta, log_mu = parameter_gradients(lin, mu, expand(weights, gamma) * gamma)
        unconverged = adj.status != int(Status.CONVERGED)
        stats = {"adjoint_iterations": adj.iterations, "negative": negative, "adjoint_unconverged": unconverged}
        return theta, log_mu, stats

    def _gradient_of_loss(
        self,
        rows: Rows,
        x: torch.Tensor,
        y: torch.Tensor,
        sol: Solution,
        valid: torch.Tensor,
        mu: torch.Tensor,
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor, dict[str, torch.Tensor], torch.Tensor]:
        """Gradients of a loss that is not a function of the squared error, and its value for each image."""
        c, ones = self.config, torch.ones_like(sol.tau)
        scale, second = _MSE_SCALE / x.numel(), None
        if self._loss_function is not None:
            judged = losses.supervised(self._loss_function, sol.x, x)
        elif c.loss == "noise2noise":
            other = self.A.A(x) + c.sigma * self._noise(rows, self.other_noise)
            judged = losses.noise2noise(self.A, sol.x, other, scale)
        else:
            probe, tau = self._probe(y.shape, self.step_done), _PROBE * c.sigma
            # From xhat and not from a warm start of its own: the difference of the two must be small and exact.
            options = PGDOptions(c.inner_iterations, self.accuracy.tolerance, c.acceleration)
            second = pgd(y + tau * probe, self.A, self.reg, mu, options, sol.x, sol.tau)
            valid = valid & torch.isfinite(second.x).flatten(1).all(1)
            judged = losses.sure(self.A, sol.x, second.x, y, probe, c.sigma, tau, scale)
        theta, log_mu, stats = self._implicit_gradient(rows, -0.5 * judged.by_x, sol, valid, mu, ones)
        if second is not None and judged.by_second is not None:
            theta_2, log_mu_2, _ = self._implicit_gradient(None, -0.5 * judged.by_second, second, valid, mu, ones)
            theta, log_mu = {n: g + theta_2[n] for n, g in theta.items()}, log_mu + log_mu_2
        return theta, log_mu, stats, judged.value

    def _noise(self, rows: Rows, noise: Noise) -> torch.Tensor:
        return noise.batch(rows).reshape(-1, *self.A.measurement_shape)

    def _unrolled_gradient(
        self,
        x: torch.Tensor,
        y: torch.Tensor,
        sol: Solution,
        valid: torch.Tensor,
        mu: torch.Tensor,
        weights: torch.Tensor,
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor, dict[str, torch.Tensor]]:
        """Backpropagate through `adjoint_iterations` further steps of the valid recoveries. Synchronizes for their
        number."""
        steps = self.config.adjoint_iterations
        valid_rows = valid.nonzero()[:, 0]
        theta, log_mu = unrolled_gradients(
            x[valid_rows],
            y[valid_rows],
            self.A,
            self.reg,
            mu[valid_rows],
            sol.x[valid_rows],
            sol.tau[valid_rows],
            steps,
            weights[valid_rows],
        )
        return theta, log_mu, {"adjoint_iterations": torch.full_like(sol.iterations, steps)}

    def _ascend(self, rows: Rows, x: torch.Tensor) -> tuple[LipschitzQuotient | None, dict[str, torch.Tensor]]:
        """Ascend the perturbations. Returns the penalized quotient (`beta_hat` or `kappa`) at the last ones."""
        c = self.config
        if c.beta == 0 or c.xi == 0:
            return None, {}
        grad_x = self.reg.value_and_grad(x)[1]
        radius = c.delta_radius * norm(x - self.reg.center).clamp_min(1e-6)
        delta = self._perturbation(rows, x, radius)
        measure = PENALTIES[c.penalty]
        point = measure(self.reg, x, delta, grad_x)
        unchanged_steps = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        late = 3 * self.step_done >= 2 * c.steps
        for _ in range(c.delta_steps_late if late else c.delta_steps):
            delta, unchanged = point.gradient_step(radius) if c.delta_ball == "free" else point.power_step(radius)
            unchanged_steps += unchanged
            point = measure(self.reg, x, delta, grad_x)
        self.store.put("delta", rows, delta)
        return point, {"beta_hat": point.beta, "kept": unchanged_steps}

    def _penalty_gradient(
        self, point: LipschitzQuotient | None, stats: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Gradient of `xi sum_b relu(beta_hat_b - beta)`; empty if no image exceeds the bound."""
        if point is None or not bool((stats["beta_hat"] > self._beta()).any()):
            return {}
        above = (point.beta > self._beta()).to(point.x.dtype)
        return point.grad_theta(self.config.xi * above)

    def _count(self, stats: dict[str, torch.Tensor]) -> None:
        """Update the guards' counters."""
        for name, counter in (
            ("bad", "nonfinite_resets"),
            ("away", "runaway_resets"),
            ("unconverged", "inner_unconverged"),
            ("negative", "negative_curvature"),
            ("adjoint_unconverged", "adjoint_unconverged"),
            ("kept", "delta_kept"),
        ):
            if name in stats:
                self.counters.add(counter, stats[name].sum())

    def _metrics(self, stats: dict[str, torch.Tensor]) -> dict[str, Any]:
        """The logged metrics of a step, and `penalty_sum`."""
        valid = stats["sound"] > 0
        metrics: dict[str, Any] = {
            "adjoint_iterations_mean": float(stats["adjoint_iterations"].mean()),
            "inner_gradients": float(stats["gradients"].mean()),
            "inner_residual": float(stats["residual"][valid].mean()) if bool(valid.any()) else -1.0,
            "tolerance": self.accuracy.tolerance,
            "penalty_sum": 0.0,
        }
        if "beta_hat" in stats:
            beta_hat, beta = stats["beta_hat"], self._beta()
            metrics["penalty_sum"] = float((beta_hat - beta).clamp_min(0).sum())
            metrics |= {"beta_hat": float(beta_hat.mean()), "beta_hat_max": float(beta_hat.max()), "beta": beta}
        return metrics

    def _beta(self) -> float:
        """The current bound, raised linearly from `beta_start` over the first half."""
        c = self.config
        if c.beta_start == 0:
            return c.beta
        return c.beta_start + (c.beta - c.beta_start) * min(1.0, 2.0 * self.step_done / c.steps)

    def _perturbation(self, rows: Rows, x: torch.Tensor, radius: torch.Tensor) -> torch.Tensor:
        """Each sample's saved perturbation, rescaled to norm `radius` for the sphere. Samples without one get a random
        perturbation of that norm."""
        delta = self.store.get("delta", rows)
        blank = self.store.blank[rows.host]
        blank_indices = np.flatnonzero(blank)
        if len(blank_indices):
            shape = tuple(x.shape[1:])
            rngs = [
                np.random.Generator(np.random.PCG64([self.config.seed, 3, int(r)])) for r in rows.host[blank_indices]
            ]
            drawn = torch.from_numpy(np.stack([g.standard_normal(shape, dtype=np.float32) for g in rngs]))
            upload = self.placement.upload
            delta.index_copy_(0, upload(torch.from_numpy(blank_indices)), upload(drawn))
        scale = radius / norm(delta).clamp_min(1e-30)
        if self.config.delta_ball == "free":
            scale = torch.where(self.placement.upload(torch.from_numpy(blank)), scale, 1.0)
        return expand(scale, delta) * delta

    def validate(self) -> dict[str, Any]:
        """PSNR and SSIM, and the extreme eigenvalues of `hess s` on the validation images."""
        low, high = spectrum(self.reg, self.validation, steps=12)
        spectral = {"val_lambda_min": float(low.min()), "val_lambda_max": float(high.max())}
        return {**super().validate(), **spectral}

    def score(self, sol: Solution, x: torch.Tensor, y: torch.Tensor, A: LinearOperator) -> float:
        """The mean PSNR of the validation images; for a loss without true images, minus that loss."""
        c, scale = self.config, _MSE_SCALE / x.numel()
        if c.loss not in UNSUPERVISED:
            return super().score(sol, x, y, A)
        if c.loss == "noise2noise":
            return -float(losses.noise2noise(A, sol.x, add_noise(A.A(x), c.sigma, c.seed + 2), scale).value.sum())
        probe, tau = self._probe(y.shape, -1), _PROBE * c.sigma
        options = PGDOptions(300, 1e-4, acceleration="fista")
        second = recover(y + tau * probe, A, self.reg, self.mu, options=options, x0=sol.x, tau0=sol.tau)
        return -float(losses.sure(A, sol.x, second.x, y, probe, c.sigma, tau, scale).value.sum())

    def _probe(self, shape: torch.Size, step: int) -> torch.Tensor:
        """Random signs, other ones at each step: with one probe per sample, training would fit the probes."""
        rng = np.random.Generator(np.random.PCG64([self.config.seed, 5, step + 1]))
        signs = rng.integers(0, 2, shape, dtype=np.int8)
        return self.placement.upload(torch.from_numpy(2.0 * signs.astype(np.float32) - 1.0))

    def extra_state(self) -> tuple[Mapping[str, Array], dict[str, Any]]:
        """Warm starts and the state of the tolerance schedule."""
        a = self.accuracy
        previous = a.previous if np.isfinite(a.previous) else None
        return self.store.state(), {
            "accuracy": [a.tolerance, previous, a.total, a.count],
            "idle": self._idle,
        }

    def load_extra_state(self, tensors: dict[str, np.ndarray], state: dict[str, Any]) -> None:
        """Restore what `extra_state` returned."""
        self.store.load(tensors)
        a = self.accuracy
        a.tolerance, previous, a.total, a.count = state["accuracy"]
        a.previous = float("inf") if previous is None else previous
        # Checkpoints of older releases lack this counter.
        self._idle = state.get("idle", 0)
