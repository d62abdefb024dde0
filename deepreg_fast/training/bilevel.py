"""Bi-level training of theta, mu and the perturbations (Nair & Schniter 2022; docs/math.md, M7 and M11).

Per visit of a batch: recover `xhat`, solve for `gamma`, take `d/dtheta` and `d/dlog mu`; ascend each image's
perturbation, add the penalty's gradient where `beta_hat > beta`; Adam.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from ..fidelity import add_noise
from ..implicit import AdjointOptions, initial_point, parameter_gradients, solve_adjoint, unrolled_gradients
from ..linsolve.batch import dot, expand, norm
from ..lipschitz import beta_hat, spectrum
from ..regularizers import RED
from ..regularizers.base import Regularizer, as_regularizer
from ..solvers import PGDOptions, Solution, pgd
from ..status import Status
from .config import BilevelConfig
from .guards import InnerAccuracy
from .loop import Trainer
from .store import Store


class BilevelTrainer(Trainer):
    """Trains a regularizer so that recovery with it gives back the images.

    Parameters
    ----------
    config : BilevelConfig
    reg : Regularizer or nn.Module, optional
        One of your own (a module maps images to one energy each); by default the `RED` of the settings.
    progress : bool, optional
        Show a progress bar; by default on a terminal.
    """

    method = "bilevel"

    def __init__(self, config: BilevelConfig, reg: nn.Module | None = None, progress: bool | None = None) -> None:
        self._given = reg
        super().__init__(config, progress)
        self.config: BilevelConfig = config
        self.store = Store(len(self.samples), (1, *self.samples.size), config.memory_budget_mb, self.folder)
        self.accuracy = InnerAccuracy(config.tolerance_start, config.tolerance_end, config.stall_window)
        self.adjoint = AdjointOptions(config.adjoint, config.adjoint_iterations, config.adjoint_tolerance)

    def build(self) -> Regularizer:
        """The `RED` of the settings, or the one that was given."""
        c = self.config
        if self._given is not None:
            return as_regularizer(self._given)
        return RED(c.channels, c.depth, c.norm, c.alpha, head=c.head, gain=c.gain, seed=c.seed)

    def groups(self) -> list[dict[str, Any]]:
        """theta and log mu, each with its own rate."""
        rate: float = self.config.mu_lr  # type: ignore[attr-defined]
        return [*super().groups(), {"params": [self.log_mu], "lr": rate, "peak": rate}]

    def gradients(self, rows: np.ndarray, x: torch.Tensor) -> dict[str, Any]:
        """One visit of the samples `rows`."""
        y = self._measure(rows, x)
        mu = torch.full((len(x),), self.mu, dtype=x.dtype)
        sol, sound, start = self._recover(rows, x, y, mu)
        if self.config.adjoint == "unrolled":
            theta, log_mu, metrics = self._unrolled_gradient(rows, x, y, sol, sound, mu)
        else:
            theta, log_mu, metrics = self._implicit_gradient(rows, x, sol, sound, mu)
        metrics |= {
            "inner_gradients": float(sol.gradients.double().mean()),
            "inner_residual": float(sol.residual[sound].mean()) if bool(sound.any()) else -1.0,
            "tolerance": self.accuracy.tolerance,
        }
        scale = 1e3 / x.numel()
        penalty, more = self._penalty(rows, x)
        for name, p in self.reg.named_parameters():
            if p.requires_grad:
                p.grad = scale * theta[name] + penalty[name] if penalty else scale * theta[name]
        self.log_mu.grad = (scale * log_mu).to(self.log_mu.dtype)
        loss = scale * float(dot(sol.x - x, sol.x - x)[sound].sum())
        self.accuracy.observe(loss)
        return {"loss": loss + self.config.xi * more.pop("penalty"), "mse_loss": loss, **metrics, **more}

    def after_update(self) -> None:
        """Keep mu in its bounds."""
        low, high = np.log(self.config.mu_min), np.log(self.config.mu_max)
        outside = not low <= float(self.log_mu.detach()) <= high
        self.counters.add("mu_clamped", outside)
        with torch.no_grad():
            self.log_mu.clamp_(low, high)

    # -- the pieces of a visit -------------------------------------------------------------------------------------

    def _measure(self, rows: np.ndarray, x: torch.Tensor) -> torch.Tensor:
        """`A x` with each sample's own noise, the same at every visit."""
        y = self.A.A(x)
        if self.config.sigma == 0:
            return y
        noisy = [
            add_noise(y[i : i + 1], self.config.sigma, seed=self.config.seed * 1_000_003 + int(r))
            for i, r in enumerate(rows)
        ]
        return torch.cat(noisy)

    def _recover(
        self, rows: np.ndarray, x: torch.Tensor, y: torch.Tensor, mu: torch.Tensor
    ) -> tuple[Solution, torch.Tensor, torch.Tensor]:
        """Recovery from the warm start; an image that ran away starts cold at its next visit."""
        c = self.config
        cold = initial_point(y, self.A, self.reg)
        seen = torch.from_numpy(self.store.arrays["visits"][rows] > 0) & c.warm_start
        x0 = torch.where(expand(seen, cold), self.store.get("x", rows), cold)
        tau0 = torch.where(seen, torch.from_numpy(self.store.arrays["tau"][rows]), 1.0)
        options = PGDOptions(c.inner_iterations, self.accuracy.tolerance, c.acceleration)
        sol = pgd(y, self.A, self.reg, mu, options, x0, tau0)
        bad = (sol.status == int(Status.NON_FINITE)) | ~torch.isfinite(sol.x).flatten(1).all(1)
        reach = 2.0 * norm(x - self.reg.center) + 0.1 * x[0].numel() ** 0.5
        away = (sol.status == int(Status.RUNAWAY)) | (norm(sol.x - self.reg.center) > reach)
        self.counters.add("nonfinite_resets", bad.sum())
        self.counters.add("runaway_resets", (away & ~bad).sum())
        self.counters.add("inner_unconverged", (sol.status != int(Status.CONVERGED)).sum())
        sound = ~(bad | away)
        sol.x = torch.where(expand(sound, cold), sol.x, cold)
        self.store.put("x", rows, sol.x)
        self.store.arrays["visits"][rows] = np.where(sound.numpy(), self.store.arrays["visits"][rows] + 1, 0)
        self.store.put("tau", rows, torch.where(sound, sol.tau, 1.0))
        return sol, sound, cold

    def _implicit_gradient(
        self, rows: np.ndarray, x: torch.Tensor, sol: Solution, sound: torch.Tensor, mu: torch.Tensor
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor, dict[str, Any]]:
        """gamma from its warm start, then the parameter products."""
        c = self.config
        lin = self.reg.linearize(sol.x)
        b = torch.where(expand(sound, x), x - sol.x, 0.0)
        gamma0 = self.store.get("gamma", rows) if c.warm_start else None
        adj = solve_adjoint(lin, self.A, mu, b, self.adjoint, gamma0, 1.0 + self.reg.alpha)
        negative = adj.status == int(Status.NEGATIVE_CURVATURE)
        usable = torch.isfinite(adj.x).flatten(1).all(1) & sound
        gamma = torch.where(expand(usable, x), adj.x, 0.0)
        keep = usable & ~negative
        self.store.put("gamma", rows, torch.where(expand(keep, x), gamma, 0.0))
        self.counters.add("negative_curvature", negative.sum())
        self.counters.add("adjoint_unconverged", (adj.status != int(Status.CONVERGED)).sum())
        theta, log_mu = parameter_gradients(lin, mu, gamma)
        return theta, log_mu, {"adjoint_iterations_mean": float(adj.iterations.double().mean())}

    def _unrolled_gradient(
        self,
        rows: np.ndarray,
        x: torch.Tensor,
        y: torch.Tensor,
        sol: Solution,
        sound: torch.Tensor,
        mu: torch.Tensor,
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor, dict[str, Any]]:
        """Back through `adjoint_iterations` further steps of the sound recoveries."""
        steps = self.config.adjoint_iterations
        good = sound.nonzero()[:, 0]
        theta, log_mu = unrolled_gradients(
            x[good], y[good], self.A, self.reg, mu[good], sol.x[good], sol.tau[good], steps
        )
        return theta, log_mu, {"adjoint_iterations_mean": float(steps)}

    def _penalty(self, rows: np.ndarray, x: torch.Tensor) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Ascend the perturbations; gradient of `xi sum_b relu(beta_hat_b - beta)` where it is active."""
        c = self.config
        if c.beta == 0 or c.xi == 0:
            return {}, {"penalty": 0.0}
        beta = self._beta()
        radius = c.delta_radius * norm(x - self.reg.center).clamp_min(1e-6)
        grad_x = self.reg.value_and_grad(x)[1]
        delta = self._perturbation(rows, x, radius)
        point = beta_hat(self.reg, x, delta, grad_x)
        late = 3 * self.step_done >= 2 * c.steps
        for _ in range(c.delta_steps_late if late else c.delta_steps):
            delta, kept = point.ascend(radius)
            self.counters.add("delta_kept", kept.sum())
            point = beta_hat(self.reg, x, delta, grad_x)
        self.store.put("delta", rows, delta)
        active = point.beta > beta
        grads = point.grad_theta(c.xi * active) if bool(active.any()) else {}
        penalty = float((point.beta - beta).clamp_min(0).sum())
        metrics = {"penalty": penalty, "beta_hat": float(point.beta.mean()), "beta_hat_max": float(point.beta.max())}
        return grads, {**metrics, "beta": beta}

    def _beta(self) -> float:
        """The bound in force: raised linearly from `beta_start` over the first half."""
        c = self.config
        if c.beta_start == 0:
            return c.beta
        return c.beta_start + (c.beta - c.beta_start) * min(1.0, 2.0 * self.step_done / c.steps)

    def _perturbation(self, rows: np.ndarray, x: torch.Tensor, radius: torch.Tensor) -> torch.Tensor:
        """Each sample's kept perturbation, or its own random one at the first visit, on the sphere of its radius."""
        delta = self.store.get("delta", rows)
        fresh = norm(delta) == 0
        for i in np.flatnonzero(fresh.numpy()):
            rng = np.random.Generator(np.random.PCG64([self.config.seed, 3, int(rows[i])]))
            delta[i] = torch.from_numpy(rng.standard_normal(tuple(x.shape[1:]), dtype=np.float32))
        return expand(radius / norm(delta).clamp_min(1e-30), delta) * delta

    def validate(self) -> dict[str, Any]:
        """PSNR and SSIM, and the extreme eigenvalues of `hess s` on the validation images."""
        low, high = spectrum(self.reg, self.validation, steps=12)
        spectral = {"val_lambda_min": float(low.min()), "val_lambda_max": float(high.max())}
        return {**super().validate(), **spectral}

    def extra_state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Warm starts and the inner accuracy."""
        a = self.accuracy
        previous = a.previous if np.isfinite(a.previous) else None
        return self.store.state(), {"accuracy": [a.tolerance, previous, a.total, a.count]}

    def load_extra_state(self, tensors: dict[str, np.ndarray], state: dict[str, Any]) -> None:
        """Warm starts and the inner accuracy."""
        self.store.load(tensors)
        a = self.accuracy
        a.tolerance, previous, a.total, a.count = state["accuracy"]
        a.previous = float("inf") if previous is None else previous
