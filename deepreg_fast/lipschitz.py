"""The Lipschitz constant of `grad s`, held by an adversarial penalty (docs/math.md, M11).

`beta_hat(x, delta) = ||grad s(x) - grad s(x + delta)|| / ||delta||`, one perturbation per image.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from . import checks
from .linsolve.batch import expand, norm
from .linsolve.lanczos import extreme_eigenvalues
from .regularizers.base import Regularizer


@dataclass
class TwoPoint:
    """`beta_hat` `[B]` at `(x, delta)`, with its derivatives.

    `d beta_hat/d delta = -hess s(x + delta) u / ||delta|| - beta_hat delta / ||delta||^2` and
    `d beta_hat/d theta = <u, d/dtheta (grad s(x) - grad s(x + delta))> / ||delta||`,
    `u = (grad s(x) - grad s(x + delta)) / ||...||`.
    """

    reg: Regularizer
    x: torch.Tensor
    delta: torch.Tensor
    grad_x: torch.Tensor

    def __post_init__(self) -> None:
        self._lin = self.reg.linearize(self.x + self.delta)
        # grad s = (1 + alpha)(x - center) - grad r, so the quadratic contributes exactly -(1 + alpha) delta.
        difference = self._lin.grad - self.grad_x - (1.0 + self.reg.alpha) * self.delta
        length = norm(difference)
        self._size = norm(self.delta)
        self.beta = length / self._size.clamp_min(1e-300)
        self.u = difference / expand(length.clamp_min(1e-30), difference)

    def _hess_s(self, v: torch.Tensor) -> torch.Tensor:
        """`hess s(x + delta) v = (1 + alpha) v - hess r(x + delta) v`."""
        return (1.0 + self.reg.alpha) * v - self._lin.hvp(v)

    def grad_delta(self) -> torch.Tensor:
        """`d beta_hat / d delta`, `[B, C, H, W]`."""
        size = self._size.clamp_min(1e-300)
        return -self._hess_s(self.u) / expand(size, self.u) - expand(self.beta / size**2, self.delta) * self.delta

    def grad_theta(self, weights: torch.Tensor) -> dict[str, torch.Tensor]:
        """`sum_b weights_b d beta_hat_b / d theta`, by parameter name."""
        v = expand(weights / self._size.clamp_min(1e-300), self.u) * self.u
        at_delta = self._lin.param_vjp(v)
        at_x = self.reg.linearize(self.x).param_vjp(v)
        return {k: at_delta[k] - at_x[k] for k in at_delta}

    def ascend(self, radius: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A power-type step: `radius * normalize(hess s(x+delta)(grad s(x+delta) - grad s(x)))`.

        Returns the new perturbations `[B, C, H, W]` and a flag `[B]` where the direction vanished (at
        `hess s = 0`, as before the first update) and the old perturbation was kept.
        """
        direction = -self._hess_s(self.u)
        length = norm(direction)
        kept = ~(length > 1e-12) | ~torch.isfinite(length)
        moved = expand(radius / length.clamp_min(1e-300), direction) * direction
        return torch.where(expand(kept, moved), self.delta, moved), kept


def beta_hat(reg: Regularizer, x: torch.Tensor, delta: torch.Tensor, grad_x: torch.Tensor | None = None) -> TwoPoint:
    """`beta_hat` of each image at `(x, delta)`, both `[B, C, H, W]`; delta must not vanish.

    `grad_x`, if at hand, is `grad r(x)`; else it is computed.
    """
    checks.images(x)
    if delta.shape != x.shape:
        raise checks.InputError(f"delta must have the shape {list(x.shape)} of x, but has {list(delta.shape)}.")
    return TwoPoint(reg, x, delta, reg.value_and_grad(x)[1] if grad_x is None else grad_x)


def spectrum(reg: Regularizer, x: torch.Tensor, steps: int = 20, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Lanczos estimates (from inside) of the smallest and largest eigenvalue of `hess s(x_b)`, two tensors `[B]`.

    `max(|.|)` is a lower bound on the local Lipschitz constant of `grad s`; `r` is convex at x where the largest is
    at most `1 + alpha`.
    """
    lin = reg.linearize(x)
    v0 = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(x)
    return extreme_eigenvalues(lambda v: (1.0 + reg.alpha) * v - lin.hvp(v), v0, steps)
