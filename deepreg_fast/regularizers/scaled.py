"""A regularizer at another contrast: `r(center + scale u)/scale^2`."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch

from .. import checks
from ..ambient import full_precision, outside_inference
from ..backend import Backend, Linearization
from .base import Regularizer, from_description, register

R = TypeVar("R", bound=Regularizer)


@outside_inference
def with_gain(reg: R, scale: float) -> R:
    """A copy of `reg` whose network has `scale` times the input gain. If the energy is homogeneous of degree two in `u`
    and `net(u) = N(gain u)/gain` together, this is `reg.rescaled(scale)` without a wrapper, and keeps fused kernels."""
    out, scale = copy.deepcopy(reg), checks.number(scale, "scale", 0.0, open_low=True)
    out.net.gain *= scale  # type: ignore[union-attr, operator]
    out._description["gain"] *= scale  # type: ignore[index]
    return out


class Scaled(Regularizer):
    """`r_s(x) = r(c + s u)/s^2`, `u = x - c`, with center `c` and scale `s`.

    At `z = c + s u`: `grad r_s(x) = grad r(z)/s`, `hess r_s(x) = hess r(z)`, and
    `d/dtheta <grad r_s(x), v> = d/dtheta <grad r(z), v>/s`. So `alpha` and every bound on the Hessian equal
    those of `r`. The inner regularizer computes the derivatives with its kernels.

    Parameters
    ----------
    reg : Regularizer, or its `describe()`
    scale : float, > 0
    """

    def __init__(self, reg: Regularizer | dict[str, Any], scale: float) -> None:
        super().__init__()
        self.reg = reg if isinstance(reg, Regularizer) else from_description(reg)
        self.scale = checks.number(scale, "scale", 0.0, open_low=True)
        self.alpha = self.reg.alpha
        self.center = self.reg.center
        self.image_channels = self.reg.image_channels

    def _inner(self, x: torch.Tensor) -> torch.Tensor:
        """`z = c + s u`."""
        return self.center + self.scale * (x - self.center)

    @full_precision
    def energy(self, x: torch.Tensor) -> torch.Tensor:
        """`r(c + s u)/s^2`, `[B]`."""
        return self.reg.energy(self._inner(x)) / self.scale**2

    def value_and_grad(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`r(z)/s^2` `[B]` and `grad r(z)/s`."""
        value, grad = self.reg.value_and_grad(self._inner(x))
        return value / self.scale**2, grad / self.scale

    def linearize(self, x: torch.Tensor) -> Linearization:
        """The linearization of the inner regularizer at `z`, scaled."""
        return _ScaledLinearization(self.reg.linearize(self._inner(x)), x, self.scale)

    def backend_for(self, x: torch.Tensor) -> Backend:
        """The backend of the inner regularizer."""
        return self.reg.backend_for(x)

    def rescaled(self, scale: float) -> Regularizer:
        """The inner regularizer, rescaled by the product of both scales."""
        return self.reg.rescaled(self.scale * checks.number(scale, "scale", 0.0, open_low=True))

    def describe(self) -> dict[str, Any]:
        """The scale, and the description of the inner regularizer."""
        return {"kind": "scaled", "reg": self.reg.describe(), "scale": self.scale}


class _ScaledLinearization:
    """The inner linearization at `z`, with the powers of the scale."""

    def __init__(self, inner: Linearization, x: torch.Tensor, scale: float) -> None:
        self._inner, self._scale = inner, scale
        self.x = x.detach()
        self.value = inner.value / scale**2
        self.grad = inner.grad / scale

    def hvp(self, v: torch.Tensor) -> torch.Tensor:
        """`hess r(z_b) v_b`."""
        return self._inner.hvp(v)

    def param_vjp(self, v: torch.Tensor) -> dict[str, torch.Tensor]:
        """`sum_b d/dtheta <grad r(z_b), v_b>/s`, by parameter name."""
        return {f"reg.{k}": g / self._scale for k, g in self._inner.param_vjp(v).items()}


register("scaled", Scaled)
