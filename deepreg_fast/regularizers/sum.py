"""Sums of regularizers, such as a ridge and a correcting network."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from ..ambient import full_precision
from ..backend import Backend, Linearization
from ..batched.linalg import ordered_sum
from ..errors import InputError
from .base import Regularizer, backend_of_parts, from_description, register, sum_by_name


class Sum(Regularizer):
    """Sum of regularizers, `r(x) = sum_i r_i(x)`.

    Every derivative is the sum of the parts' derivatives, each computed by its own kernels. Since `r_i = (1+alpha_i)/2
    ||u||^2 - s_i`, the sum has `1 + alpha = sum_i (1 + alpha_i)` and `s = sum_i s_i`. A `RED` with `alpha=-1` adds
    only `-s_i`, which is zero before it is trained.

    Parameters
    ----------
    parts : sequence of Regularizer or of their `describe()` dictionaries
        At least one; all have the same `center`.

    Raises
    ------
    InputError
        If there is no part, or the centers or the channels of their images differ.

    Examples
    --------
    >>> import torch, deepreg_fast as dr
    >>> tv, ridge = dr.TV(), dr.Ridge(filters=2, kernel_size=3)
    >>> x = torch.rand(1, 1, 8, 8)
    >>> torch.allclose(dr.Sum([tv, ridge]).energy(x), tv.energy(x) + ridge.energy(x))
    True
    """

    def __init__(self, parts: Sequence[Regularizer | dict[str, Any]]) -> None:
        super().__init__()
        built = [p if isinstance(p, Regularizer) else from_description(p) for p in parts]
        centers = sorted({p.center for p in built})
        if len(centers) != 1:
            raise InputError(
                f"Sum takes one regularizer or more with the same center, but got {len(built)} with the centers "
                f"{centers}; build them with one center."
            )
        channels = {p.image_channels for p in built if p.image_channels is not None}
        if len(channels) > 1:
            raise InputError(
                f"The parts of a Sum must take the same images, but take images of {sorted(channels)} channels; wrap "
                "those of gray images in PerChannel."
            )
        self.image_channels = next(iter(channels), None)
        self.parts = nn.ModuleList(built)
        self.center = centers[0]
        self.alpha = sum(1.0 + p.alpha for p in built) - 1.0

    def __iter__(self) -> Iterator[Regularizer]:
        yield from self.parts  # type: ignore[misc]

    @full_precision
    def energy(self, x: torch.Tensor) -> torch.Tensor:
        """`sum_i r_i(x_b)`, `[B]`."""
        return torch.stack([p.energy(x) for p in self]).sum(0)

    def value_and_grad(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`r(x_b)` `[B]` and `grad r(x_b)`, as in `Regularizer`."""
        value, grad = zip(*[p.value_and_grad(x) for p in self], strict=True)
        return ordered_sum(value), ordered_sum(grad)

    def linearize(self, x: torch.Tensor) -> Linearization:
        """The linearizations of the parts at `x`."""
        return _SumLinearization(self, [p.linearize(x) for p in self])

    def backend_for(self, x: torch.Tensor) -> Backend:
        """The first of the parts' backends that is not batch-invariant, or the first."""
        return backend_of_parts([p.backend_for(x) for p in self])

    def rescaled(self, scale: float) -> Regularizer:
        """The sum of the rescaled parts."""
        return Sum([p.rescaled(scale) for p in self])

    def describe(self) -> dict[str, Any]:
        """The descriptions of the parts."""
        return {"kind": "sum", "parts": [p.describe() for p in self]}


class _SumLinearization:
    """The parts' linearizations at the same x."""

    def __init__(self, total: Sum, parts: list[Linearization]) -> None:
        self._sum, self._parts = total, parts
        self.x = parts[0].x
        self.value = ordered_sum([p.value for p in parts])
        self.grad = ordered_sum([p.grad for p in parts])

    def hvp(self, v: torch.Tensor) -> torch.Tensor:
        """`hess r(x_b) v_b`."""
        return ordered_sum([p.hvp(v) for p in self._parts])

    def param_vjp(self, v: torch.Tensor) -> dict[str, torch.Tensor]:
        """`sum_b d/dtheta <grad r(x_b), v_b>`, by parameter name."""
        gradients = [lin.param_vjp(v) for lin in self._parts]
        return sum_by_name(self._sum, zip(self._sum, gradients, strict=True))


register("sum", Sum)
