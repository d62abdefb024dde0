"""Quotients of an adversarial penalty on the variation of `grad s` (docs/math.md, M11), one perturbation per image.

`beta_hat(x, delta) = ||grad s(x) - grad s(x + delta)|| / ||delta||` bounds the Lipschitz constant of `grad s`;
`kappa(x, delta) = <delta, grad s(x + delta) - grad s(x)> / ||delta||^2` bounds the curvature of s only from above.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .. import checks
from ..batched.linalg import dot, expand, hypot, norm
from ..solvers.lanczos import extreme_eigenvalues
from .base import Regularizer


@dataclass
class LipschitzQuotient:
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
        self.x, self.delta, self.grad_x = (t.detach() for t in (self.x, self.delta, self.grad_x))
        self._lin = self.reg.linearize(self.x + self.delta)
        self._size = norm(self.delta).clamp_min(1e-300)
        # grad s = (1 + alpha)(x - center) - grad r, so the quadratic contributes exactly -(1 + alpha) delta.
        self._measure(self._lin.grad - self.grad_x - (1.0 + self.reg.alpha) * self.delta)

    def _measure(self, difference: torch.Tensor) -> None:
        """Set `beta` and the unit vector `u` with `beta = <u, difference> / ||delta||`."""
        length = norm(difference)
        self.beta = length / self._size
        self.u = difference / expand(length.clamp_min(1e-30), difference)

    def _hess_s(self, v: torch.Tensor) -> torch.Tensor:
        """`hess s(x + delta) v = (1 + alpha) v - hess r(x + delta) v`."""
        return (1.0 + self.reg.alpha) * v - self._lin.hvp(v)

    def grad_delta(self) -> torch.Tensor:
        """`d beta_hat / d delta`, `[B, C, H, W]`."""
        size = self._size
        return -self._hess_s(self.u) / expand(size, self.u) - expand(self.beta / size**2, self.delta) * self.delta

    def grad_theta(self, weights: torch.Tensor) -> dict[str, torch.Tensor]:
        """`sum_b weights_b d beta_hat_b / d theta`, by parameter name."""
        v = expand(weights / self._size, self.u) * self.u
        at_delta = self._lin.param_vjp(v)
        at_x = self.reg.linearize(self.x).param_vjp(v)
        return {k: at_delta[k] - at_x[k] for k in at_delta}

    def power_step(self, radius: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A power-type step: `radius * normalize(hess s(x+delta)(grad s(x+delta) - grad s(x)))`.

        Returns the new perturbations `[B, C, H, W]` and a flag `[B]` that is true if the direction vanished
        (`hess s = 0`, as before the first update) and the perturbation is unchanged.
        """
        direction = -self._hess_s(self.u)
        length = norm(direction)
        unchanged = ~(length > 1e-12) | ~torch.isfinite(length)
        moved = expand(radius / length.clamp_min(1e-300), direction) * direction
        return torch.where(expand(unchanged, moved), self.delta, moved), unchanged

    def gradient_step(self, radius: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A step of length `radius / 4` along `d beta/d delta`, without normalization; otherwise as `power_step`.

        Perturbations shorter than `radius / 100`, which rounding would dominate, are rejected.
        """
        direction = self.grad_delta()
        length = norm(direction)
        moved = self.delta + expand(0.25 * radius / length.clamp_min(1e-300), direction) * direction
        unchanged = ~(length > 1e-12) | ~torch.isfinite(length) | (norm(moved) < 0.01 * radius)
        return torch.where(expand(unchanged, moved), self.delta, moved), unchanged


class CurvatureQuotient(LipschitzQuotient):
    """`kappa` `[B]` at `(x, delta)`, stored as `beta`: the mean of `<e, hess s e>`, `e = delta / ||delta||`, from x to
    x + delta.

    With `u = -e`, `beta_hat`'s formula for `d beta_hat/d theta` gives `d kappa/d theta`; `d kappa/d delta` has the
    additional term `(grad s(x + delta) - grad s(x) - kappa delta) / ||delta||^2`. r is convex if and only if
    `kappa <= 1 + alpha` for all x and delta. The negative curvature of s, which makes r sharp, is not limited.
    """

    def _measure(self, difference: torch.Tensor) -> None:
        """Set `kappa`, and the part of `grad s(x + delta) - grad s(x)` that is orthogonal to delta."""
        self.u = -self.delta / expand(self._size, self.delta)
        self.beta = dot(self.u, difference) / self._size
        self._rest = -difference - expand(self.beta, self.delta) * self.delta

    def grad_delta(self) -> torch.Tensor:
        """`d kappa / d delta`, `[B, C, H, W]`."""
        return super().grad_delta() + self._rest / expand(self._size**2, self.delta)

    def power_step(self, radius: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A Rayleigh-Ritz step towards the largest eigenvalue of `hess s`, with one Hessian product.

        In the orthonormal basis `e = delta / ||delta||`, `p` = normalized `grad s(x + delta) - grad s(x) - kappa delta`
        the Hessian is `[[kappa, b], [b, <p, hess s(x + delta) p>]]`, `b = ||..|| / ||delta||`. The new perturbation is
        the eigenvector of its largest eigenvalue, of length `radius`. Unlike a power iteration, it needs no shift
        against large negative eigenvalues, and `kappa` does not decrease if s is quadratic. If `b` is only rounding,
        the perturbation is unchanged and flagged `[B]`.
        """
        length = norm(self._rest)
        coupling = length / self._size
        p = self._rest / expand(length.clamp_min(1e-30), self._rest)
        p_curvature = dot(p, self._hess_s(p))
        # Half the angle with tangent 2 coupling / gap, by square roots: atan2 has different bits at the end of a batch.
        gap = self.beta - p_curvature
        hypotenuse = hypot(2.0 * coupling, gap)
        major = torch.sqrt(0.5 + 0.5 * gap.abs() / hypotenuse)
        minor = coupling / (hypotenuse * major)
        cos, sin = torch.where(gap > 0, major, minor), torch.where(gap > 0, minor, major)
        unchanged = ~(coupling > 100 * torch.finfo(p.dtype).eps) | ~torch.isfinite(cos + sin)
        moved = expand(radius * sin, p) * p - expand(radius * cos, p) * self.u
        return torch.where(expand(unchanged, moved), self.delta, moved), unchanged


def beta_hat(
    reg: Regularizer, x: torch.Tensor, delta: torch.Tensor, grad_x: torch.Tensor | None = None
) -> LipschitzQuotient:
    """Lipschitz quotient `||grad s(x + delta) - grad s(x)|| / ||delta||` of each image (docs/math.md, M11).

    Parameters
    ----------
    reg : Regularizer
    x : Tensor `[B, C, H, W]`
    delta : Tensor `[B, C, H, W]`
        Nonzero perturbation of each image.
    grad_x : Tensor `[B, C, H, W]`, optional
        `grad r(x)`, if it is known already.

    Returns
    -------
    LipschitzQuotient
        `.beta` `[B]` and its gradients; `.power_step(radius)` returns a perturbation with a larger quotient.

    Examples
    --------
    >>> import torch, deepreg_fast as dr
    >>> x = torch.rand(2, 1, 8, 8)
    >>> float(dr.beta_hat(dr.Ridge(filters=2, kernel_size=3), x, 0.1 * torch.randn_like(x)).beta.max()) <= 1.01
    True
    """
    return LipschitzQuotient(reg, x, delta, _gradient(reg, x, delta, grad_x))


def curvature(
    reg: Regularizer, x: torch.Tensor, delta: torch.Tensor, grad_x: torch.Tensor | None = None
) -> CurvatureQuotient:
    """`kappa` of each image at `(x, delta)`, both `[B, C, H, W]`; arguments as for `beta_hat`."""
    return CurvatureQuotient(reg, x, delta, _gradient(reg, x, delta, grad_x))


def _gradient(reg: Regularizer, x: torch.Tensor, delta: torch.Tensor, grad_x: torch.Tensor | None) -> torch.Tensor:
    checks.images(x)
    if delta.shape != x.shape:
        raise checks.InputError(f"delta must have the shape {list(x.shape)} of x, but has {list(delta.shape)}.")
    return reg.value_and_grad(x)[1] if grad_x is None else grad_x


PENALTIES: dict[str, Callable[..., LipschitzQuotient]] = {"lipschitz": beta_hat, "curvature": curvature}


def spectrum(reg: Regularizer, x: torch.Tensor, steps: int = 20, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Lanczos estimates of the smallest and largest eigenvalue of `hess s(x_b)` (docs/math.md, M14).

    Both lie inside the spectrum: the larger absolute value is a lower bound of the local Lipschitz constant of `grad
    s`. r is convex at x if the largest eigenvalue is at most `1 + alpha`.

    Parameters
    ----------
    reg : Regularizer
    x : Tensor `[B, C, H, W]`
    steps : int
        Hessian-vector products.
    seed : int
        Seed of the starting vector.

    Returns
    -------
    (Tensor `[B]`, Tensor `[B]`)

    Raises
    ------
    InputError
        If x does not fit the regularizer.

    Examples
    --------
    >>> import torch, deepreg_fast as dr
    >>> low, high = dr.spectrum(dr.TV(0.1), torch.rand(2, 1, 8, 8), steps=10)
    >>> bool((low <= high).all() and (high <= 1.001).all())
    True
    """
    lin = reg.linearize(x)
    g = torch.Generator().manual_seed(checks.integer(seed, "seed", 0))
    v0 = torch.randn(x.shape, generator=g, dtype=torch.float64, device="cpu").to(x)
    return extreme_eigenvalues(lambda v: (1.0 + reg.alpha) * v - lin.hvp(v), v0, steps)
