"""Operators made of others: `A @ B`, `c * A`, `Stack([A, B])`."""

from __future__ import annotations

import math
from functools import reduce
from operator import add
from typing import Any

import torch

from .. import checks
from ..errors import InputError
from .base import LinearOperator, from_description, register


class Composition(LinearOperator):
    """`(A B) x = A (B x)`, also written `A @ B`. The measurements of B are the images of A.

    If `B B^T = g I`, then `(A B)(A B)^T = g A A^T`, so the closed form of A remains; otherwise CG solves the systems.

    Parameters
    ----------
    outer, inner : LinearOperator
        A and B.

    Raises
    ------
    InputError
        If the shapes do not fit.

    Examples
    --------
    >>> import torch, deepreg_fast as dr
    >>> A = dr.Inpainting(torch.rand(1, 8, 8) < 0.7) @ dr.Blur((1, 8, 8), torch.full((3, 3), 1 / 9))
    >>> A.A(torch.rand(2, 1, 8, 8)).shape
    torch.Size([2, 1, 8, 8])
    """

    def __init__(self, outer: LinearOperator, inner: LinearOperator) -> None:
        for A in (outer, inner):
            _check_operator(A)
        if inner.measurement_shape != outer.image_shape:
            raise InputError(
                f"A @ B needs measurements of B like the images of A, {list(outer.image_shape)}, but they are "
                f"{list(inner.measurement_shape)}."
            )
        super().__init__(inner.image_shape, outer.measurement_shape)
        self.outer, self.inner = outer, inner
        self.batch = _common_batch([outer, inner])
        self.gram_scale = None
        if outer.gram_scale is not None and inner.gram_scale is not None:
            self.gram_scale = outer.gram_scale * inner.gram_scale

    def _forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.outer._forward(self.inner._forward(x))

    def _adjoint(self, y: torch.Tensor) -> torch.Tensor:
        return self.inner._adjoint(self.outer._adjoint(y))

    def _normal(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner._adjoint(self.outer._normal(self.inner._forward(x)))

    @property
    def has_shifted_inverse(self) -> bool:
        """Whether A has a closed form and `B B^T = g I`."""
        return self.gram_scale is not None or (self.inner.gram_scale is not None and self.outer.has_shifted_inverse)

    @property
    def preconditioned(self) -> bool:
        """Whether there is a closed form."""
        return self.has_shifted_inverse

    def _gram_solve(self, r: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        if self.gram_scale is not None:
            return super()._gram_solve(r, c)
        g = self.inner.gram_scale
        assert g is not None
        return self.outer._gram_solve(r, c / g) / g

    def describe(self) -> dict[str, Any]:
        """Constructor arguments."""
        return {"kind": "composition", "outer": self.outer.describe(), "inner": self.inner.describe()}


class Scaled(LinearOperator):
    """`factor A`, also written `factor * A`.

    Parameters
    ----------
    A : LinearOperator
    factor : float, not zero

    Raises
    ------
    InputError
        If the factor is not a number, or zero.

    Examples
    --------
    >>> import deepreg_fast as dr
    >>> (2.0 * dr.Identity((1, 4, 4))).sqnorm()
    4.0
    """

    def __init__(self, A: LinearOperator, factor: float) -> None:
        _check_operator(A)
        factor = checks.number(factor, "factor", -math.inf)
        if factor == 0:
            raise InputError("factor must not be zero, since the measurements would not depend on the image.")
        super().__init__(A.image_shape, A.measurement_shape)
        self.inner, self.factor = A, factor
        self.batch = A.batch
        self.gram_scale = None if A.gram_scale is None else A.gram_scale * factor**2

    def _forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.factor * self.inner._forward(x)

    def _adjoint(self, y: torch.Tensor) -> torch.Tensor:
        return self.factor * self.inner._adjoint(y)

    def _normal(self, x: torch.Tensor) -> torch.Tensor:
        return self.factor**2 * self.inner._normal(x)

    @property
    def has_shifted_inverse(self) -> bool:
        """As for A."""
        return self.inner.has_shifted_inverse

    @property
    def preconditioned(self) -> bool:
        """As for A."""
        return self.inner.preconditioned

    def _gram_solve(self, r: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        s = self.factor**2
        return self.inner._gram_solve(r, c / s) / s

    def _shifted_inverse(self, v: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        s = self.factor**2
        return self.inner._shifted_inverse(v, c / s) / s

    def _prox(self, z: torch.Tensor, y: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
        return self.inner._prox(z, y / self.factor, gamma * self.factor**2)

    def _precondition(self, v: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        s = self.factor**2
        return self.inner._precondition(v, c / s) / s

    def _square_norms(self, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        return self.factor**2 * self.inner._square_norms(device, dtype)

    def as_image(self, y: torch.Tensor) -> torch.Tensor:
        """As for A."""
        return self.inner.as_image(self._measured(y, "y") / self.factor)

    def describe(self) -> dict[str, Any]:
        """Constructor arguments."""
        return {"kind": "scaled", "A": self.inner.describe(), "factor": self.factor}


class Stack(LinearOperator):
    """The measurements of several operators of one image, one after the other: `[B, m_1 + m_2 + ...]`.

    CG solves the systems. `split` separates the measurements.

    Parameters
    ----------
    operators : list of LinearOperator
        For images of one shape.

    Raises
    ------
    InputError
        If the list is empty or the images differ.

    Examples
    --------
    >>> import torch, deepreg_fast as dr
    >>> A = dr.Stack([dr.Identity((1, 4, 4)), dr.SRM((1, 4, 4), ratio=0.5)])
    >>> [y.shape[1] for y in A.split(A.A(torch.rand(2, 1, 4, 4)))]
    [16, 8]
    """

    def __init__(self, operators: list[LinearOperator] | tuple[LinearOperator, ...]) -> None:
        parts = list(operators) if isinstance(operators, (list, tuple)) else []
        if not parts:
            raise InputError("operators must be a list of at least one operator, but is empty or not a list.")
        parts = [from_description(A) if isinstance(A, dict) else A for A in parts]
        for A in parts:
            _check_operator(A)
        shapes = {A.image_shape for A in parts}
        if len(shapes) > 1:
            raise InputError(f"The operators of a stack must be for images of one shape, but are for {sorted(shapes)}.")
        super().__init__(parts[0].image_shape, sum(A.measurements for A in parts))
        self.parts = torch.nn.ModuleList(parts)
        self.batch = _common_batch(parts)

    def _list(self) -> list[LinearOperator]:
        return list(self.parts)  # type: ignore[arg-type]

    def split(self, y: torch.Tensor) -> list[torch.Tensor]:
        """The measurements of each operator, in its own shape."""
        self._measured(y, "y")
        return self._split(y)

    def _split(self, y: torch.Tensor) -> list[torch.Tensor]:
        pieces = y.split([A.measurements for A in self._list()], 1)
        return [p.reshape(len(y), *A.measurement_shape) for A, p in zip(self._list(), pieces, strict=True)]

    def _forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([A._forward(x).flatten(1) for A in self._list()], 1)

    def _adjoint(self, y: torch.Tensor) -> torch.Tensor:
        return reduce(add, [A._adjoint(p) for A, p in zip(self._list(), self._split(y), strict=True)])

    def _normal(self, x: torch.Tensor) -> torch.Tensor:
        return reduce(add, [A._normal(x) for A in self._list()])

    def select(self, idx: torch.Tensor) -> LinearOperator:
        """The operator of the images `idx`."""
        return self if self.batch is None else Stack([A.select(idx) for A in self._list()])

    def describe(self) -> dict[str, Any]:
        """Constructor arguments."""
        return {"kind": "stack", "operators": [A.describe() for A in self._list()]}


def _check_operator(A: object) -> None:
    if not isinstance(A, LinearOperator):
        raise InputError(f"An operator must be a deepreg_fast operator, but is {type(A).__name__}.")


def _common_batch(operators: list[LinearOperator]) -> int | None:
    sizes = {A.batch for A in operators if A.batch is not None}
    if len(sizes) > 1:
        raise InputError(f"The operators must have parameters for one number of images, but have {sorted(sizes)}.")
    return sizes.pop() if sizes else None


def _composition(outer: dict[str, Any], inner: dict[str, Any]) -> Composition:
    return Composition(from_description(outer), from_description(inner))


def _scaled(A: dict[str, Any], factor: float) -> Scaled:
    return Scaled(from_description(A), factor)


register("composition", _composition)
register("scaled", _scaled)
register("stack", Stack)
