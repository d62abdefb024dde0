"""A gray regularizer on color images in an orthonormal opponent color space."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .. import checks
from ..ambient import full_precision
from ..backend import Backend, Linearization
from ..backend.reference import ParameterGuard
from .base import Regularizer, backend_of_parts, register, sum_by_name
from .channels import active_channels, channel_sum, fold, gray_regularizer

LUMA = 1.0 / math.sqrt(3.0)


def opponent(u: torch.Tensor) -> torch.Tensor:
    """`[(R+G+B)/sqrt 3, (R-B)/sqrt 2, (R-2G+B)/sqrt 6]` of `u` `[B, 3, H, W]`: an orthonormal transform."""
    r, g, b = u.unbind(1)
    sides = r + b
    return torch.stack([LUMA * (sides + g), math.sqrt(0.5) * (r - b), math.sqrt(1 / 6) * (sides - 2.0 * g)], 1)


def opponent_adjoint(z: torch.Tensor) -> torch.Tensor:
    """The transpose of `opponent`, which is its inverse."""
    luma, difference, green = z.unbind(1)
    luma, difference, green = LUMA * luma, math.sqrt(0.5) * difference, math.sqrt(1 / 6) * green
    sides = luma + green
    return torch.stack([sides + difference, luma - 2.0 * green, sides - difference], 1)


@dataclass(frozen=True)
class _Part:
    """`weight/scale^2 sum_i reg(center + scale z_i)` over the channels `i` of z from `first` to before `last`."""

    reg: Regularizer
    first: int
    last: int
    scale: float
    weight: float

    def planes(self, z: torch.Tensor) -> torch.Tensor:
        """The gray images that `reg` takes, from the centered image in the color space."""
        return fold(self.reg.center + self.scale * z[:, self.first : self.last])

    def direction(self, z: torch.Tensor) -> torch.Tensor:
        """A direction in these channels, folded."""
        return fold(z[:, self.first : self.last])

    def value(self, value: torch.Tensor) -> torch.Tensor:
        """The part's energy `[B]` from those of its planes."""
        return (self.weight / self.scale**2) * channel_sum(value, self.last - self.first)

    def unfold(self, planes: torch.Tensor, factor: float) -> torch.Tensor:
        """`factor` times the planes, as channels."""
        return factor * planes.reshape(-1, self.last - self.first, *planes.shape[2:])


class Luma(Regularizer):
    """A gray regularizer on the luma and the chroma of color images, in an orthonormal opponent color space.

    With `m = (R+G+B)/3`, `o_1 = (R-B)/sqrt 2`, `o_2 = (R-2G+B)/sqrt 6` and `c = center`,

        `r(x) = 3 reg(m) + chroma_weight (chroma(c + o_1) + chroma(c + o_2))`.

    `3 reg(m)` is `reg` rescaled to the contrast of the orthonormal luma, `sqrt 3 m`, with the same Hessians. So `Luma`
    and `PerChannel` agree on gray images. Noise of the same variance in each color has it in each of the three, but
    the chroma of photographs is smaller and smoother: a larger `chroma_weight` removes more of its noise.

    Parameters
    ----------
    reg : Regularizer, or its `describe()`, or an nn.Module that maps images to one energy each
        Takes gray images.
    chroma : the same, optional
        For the chroma; the default is `reg`.
    chroma_weight : float >= 0
        Weight of the chroma's energy.

    Raises
    ------
    InputError
        If a regularizer takes images of several channels, or the weight is negative.

    Examples
    --------
    >>> import torch, deepreg_fast as dr
    >>> gray, x = dr.TV(), torch.rand(2, 1, 8, 8)
    >>> luma = dr.Luma(gray, chroma_weight=2.0).energy(x.expand(2, 3, 8, 8))
    >>> torch.allclose(luma, 3 * gray.energy(x))
    True
    """

    image_channels = 3

    def __init__(
        self,
        reg: nn.Module | dict[str, Any],
        chroma: nn.Module | dict[str, Any] | None = None,
        chroma_weight: float = 1.0,
    ) -> None:
        super().__init__()
        self.reg = gray_regularizer(reg, "Luma")
        self.chroma = None if chroma is None else gray_regularizer(chroma, "Luma")
        self.chroma_weight = checks.number(chroma_weight, "chroma_weight", 0.0)
        self.alpha, self.center = self.reg.alpha, self.reg.center

    def _parts(self) -> tuple[_Part, _Part]:
        chroma = self.reg if self.chroma is None else self.chroma
        return _Part(self.reg, 0, 1, LUMA, 1.0), _Part(chroma, 1, 3, 1.0, self.chroma_weight)

    def _centered(self, x: torch.Tensor) -> torch.Tensor:
        """`x - center` in the color space."""
        return opponent(x - self.center)

    @full_precision
    def energy(self, x: torch.Tensor) -> torch.Tensor:
        """`r(x_b)`, `[B]`."""
        z = self._centered(x)
        luma, chroma = (p.value(p.reg.energy(p.planes(z))) for p in self._parts())
        return luma + chroma

    def value_and_grad(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`r(x_b)` `[B]` and `grad r(x_b)`, as in `Regularizer`."""
        self._check(x)
        z, parts = self._centered(x), self._parts()
        values, grads = [], []
        for p in parts:
            with active_channels(z[:, p.first : p.last]):
                value, grad = p.reg.value_and_grad(p.planes(z))
            values.append(p.value(value))
            grads.append(p.unfold(grad, p.weight / p.scale))
        return values[0] + values[1], opponent_adjoint(torch.cat(grads, 1))

    def linearize(self, x: torch.Tensor) -> Linearization:
        """The linearizations of both parts."""
        self._check(x)
        z, parts = self._centered(x), self._parts()
        lins = []
        for p in parts:
            with active_channels(z[:, p.first : p.last]):
                lins.append(p.reg.linearize(p.planes(z)))
        return _LumaLinearization(self, parts, lins, x)

    def backend_for(self, x: torch.Tensor) -> Backend:
        """The backend of luma and chroma, as in `Sum`."""
        return backend_of_parts([p.reg.backend_for(p.direction(x)) for p in self._parts()])

    def describe(self) -> dict[str, Any]:
        """The descriptions of both regularizers, and the weight."""
        chroma = None if self.chroma is None else self.chroma.describe()
        return {"kind": "luma", "reg": self.reg.describe(), "chroma": chroma, "chroma_weight": self.chroma_weight}


class _LumaLinearization:
    """The linearizations of luma and chroma."""

    def __init__(self, whole: Luma, parts: Sequence[_Part], lins: Sequence[Linearization], x: torch.Tensor) -> None:
        self._whole, self._parts, self._lins = whole, parts, lins
        self._guard = ParameterGuard([])
        self.x = x.detach()
        luma, chroma = (p.value(lin.value) for p, lin in zip(parts, lins, strict=True))
        self.value = luma + chroma
        grads = [p.unfold(lin.grad, p.weight / p.scale) for p, lin in zip(parts, lins, strict=True)]
        self.grad = opponent_adjoint(torch.cat(grads, 1))

    def hvp(self, v: torch.Tensor) -> torch.Tensor:
        """`hess r(x_b) v_b`."""
        self._guard.check(v, self.x)
        z, products = opponent(v), []
        for p, lin in zip(self._parts, self._lins, strict=True):
            with active_channels(z[:, p.first : p.last]):
                products.append(p.unfold(lin.hvp(p.direction(z)), p.weight))
        return opponent_adjoint(torch.cat(products, 1))

    def param_vjp(self, v: torch.Tensor) -> dict[str, torch.Tensor]:
        """`sum_b d/dtheta <grad r(x_b), v_b>`, by parameter name."""
        self._guard.check(v, self.x)
        z, gradients = opponent(v), []
        for p, lin in zip(self._parts, self._lins, strict=True):
            by_name = lin.param_vjp(p.direction(z))
            gradients.append((p.reg, {k: (p.weight / p.scale) * g for k, g in by_name.items()}))
        return sum_by_name(self._whole, gradients)


register("luma", Luma)
