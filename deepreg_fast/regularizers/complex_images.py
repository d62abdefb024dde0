"""Gray regularizers on complex images, whose two channels are the real and the imaginary part."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .. import checks
from ..ambient import full_precision
from ..backend import Backend, Linearization
from ..backend.reference import ParameterGuard
from .base import Regularizer, register
from .channels import PerChannel, fold, gray_regularizer


class RealImag(PerChannel):
    """A gray regularizer on the real and the imaginary part, `r(x) = reg(c + Re x) + reg(c + Im x)`.

    The parts of a complex image vary about 0 and not about mid-gray, so each is shifted to the center `c` of `reg`, and
    the center of this regularizer is 0.

    Parameters
    ----------
    reg : Regularizer, or its `describe()`, or an nn.Module that maps images to one energy each
        Takes gray images `[B, 1, H, W]`.

    Raises
    ------
    InputError
        If `reg` takes images of several channels.

    Examples
    --------
    >>> import torch, deepreg_fast as dr
    >>> gray, x = dr.Ridge(filters=2, kernel_size=3), torch.rand(2, 2, 8, 8) - 0.5
    >>> whole = dr.RealImag(gray).energy(x)
    >>> torch.allclose(whole, gray.energy(x[:, :1] + 0.5) + gray.energy(x[:, 1:] + 0.5))
    True
    """

    image_channels = 2

    def __init__(self, reg: nn.Module | dict[str, Any]) -> None:
        super().__init__(reg)
        self.center = 0.0

    def _planes(self, x: torch.Tensor) -> torch.Tensor:
        return fold(x) + self.reg.center

    def describe(self) -> dict[str, Any]:
        """The description of the gray regularizer."""
        return {"kind": "real_imag", "reg": self.reg.describe()}


class Magnitude(Regularizer):
    """A gray regularizer on the magnitude of complex images, `r(x) = reg(m)`, `m = sqrt(Re^2 + Im^2 + eps^2)`.

    It does not depend on the phase. For magnitudes in the range of the images that `reg` was trained on, [0, 1].
    `alpha` is that of `reg`, but bounds on its Hessian do not carry over.

    Parameters
    ----------
    reg : Regularizer, or its `describe()`, or an nn.Module that maps images to one energy each
        Takes gray images `[B, 1, H, W]`.
    eps : float > 0
        Smoothing of the magnitude at 0, in gray values.

    Raises
    ------
    InputError
        If `reg` takes images of several channels, or `eps` is not positive.

    Examples
    --------
    >>> import torch, deepreg_fast as dr
    >>> reg, x = dr.Magnitude(dr.TV()), torch.rand(1, 2, 8, 8)
    >>> turned = torch.stack([-x[:, 1], x[:, 0]], 1)  # times the imaginary unit
    >>> torch.allclose(reg.energy(x), reg.energy(turned))
    True
    """

    image_channels = 2
    center = 0.0

    def __init__(self, reg: nn.Module | dict[str, Any], eps: float = 1e-3) -> None:
        super().__init__()
        self.reg = gray_regularizer(reg, "Magnitude")
        self.eps = checks.number(eps, "eps", 0.0, open_low=True)
        self.alpha = self.reg.alpha

    def _magnitude(self, x: torch.Tensor) -> torch.Tensor:
        """m, `[B, 1, H, W]`."""
        real, imaginary = x[:, :1], x[:, 1:]
        return torch.sqrt(real * real + imaginary * imaginary + self.eps**2)

    @full_precision
    def energy(self, x: torch.Tensor) -> torch.Tensor:
        """`reg(m_b)`, `[B]`."""
        return self.reg.energy(self._magnitude(x))

    def value_and_grad(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`r(x_b)` `[B]` and `grad r(x_b)`, as in `Regularizer`."""
        self._check(x)
        m = self._magnitude(x)
        value, grad = self.reg.value_and_grad(m)
        return value, grad * (x / m)

    def linearize(self, x: torch.Tensor) -> Linearization:
        """The linearization of `reg` at the magnitude."""
        self._check(x)
        m = self._magnitude(x)
        return _MagnitudeLinearization(self.reg.linearize(m), x.detach(), m.detach(), self.eps)

    def backend_for(self, x: torch.Tensor) -> Backend:
        """The backend of `reg` for the magnitude."""
        return self.reg.backend_for(self._magnitude(x))

    def describe(self) -> dict[str, Any]:
        """The description of the gray regularizer, and the smoothing."""
        return {"kind": "magnitude", "reg": self.reg.describe(), "eps": self.eps}


class _MagnitudeLinearization:
    """The gray regularizer's linearization at m, with the first two derivatives of m.

    With `q = x/m`: `dm = <q, v>`, and the derivative of `g q` along v is `q (H dm) + g (v - q <q, v>)/m`. As
    `1 - |q|^2 = (eps/m)^2`, `v - q <q, v> = (eps/m)^2 v + p <p, v>` with `p = (q_im, -q_re)`, in which nothing cancels.
    """

    def __init__(self, inner: Linearization, x: torch.Tensor, m: torch.Tensor, eps: float) -> None:
        self._inner, self._m, self._q = inner, m, x / m
        self._flat = (eps / m) * (eps / m)
        self._guard = ParameterGuard([])
        self.x, self.value, self.grad = x, inner.value, inner.grad * self._q

    def _along(self, v: torch.Tensor) -> torch.Tensor:
        """`<q, v>`, `[B, 1, H, W]`."""
        self._guard.check(v, self.x)
        return self._q[:, :1] * v[:, :1] + self._q[:, 1:] * v[:, 1:]

    def hvp(self, v: torch.Tensor) -> torch.Tensor:
        """`hess r(x_b) v_b`."""
        curved = self._q * self._inner.hvp(self._along(v))
        across = torch.cat([self._q[:, 1:], -self._q[:, :1]], 1)
        turn = across[:, :1] * v[:, :1] + across[:, 1:] * v[:, 1:]
        return curved + (self._inner.grad / self._m) * (self._flat * v + across * turn)

    def param_vjp(self, v: torch.Tensor) -> dict[str, torch.Tensor]:
        """`sum_b d/dtheta <grad r(x_b), v_b>`, by parameter name."""
        return {f"reg.{k}": g for k, g in self._inner.param_vjp(self._along(v)).items()}


register("real_imag", RealImag)
register("magnitude", Magnitude)
