"""Operators as deepinv physics."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch

from ...errors import InputError
from ...functional import srm as definition
from ...operators import SRM, LinearOperator
from .package import base

_LinearPhysics: Any = base("physics.LinearPhysics")
_DecomposablePhysics: Any = base("physics.DecomposablePhysics")


def _to_deepinv_shape(A: LinearOperator, y: torch.Tensor) -> torch.Tensor:
    """Measurements as deepinv expects them, with four dimensions: in the shape of images, or `[B, 1, 1, m]`."""
    return y if len(A.measurement_shape) == 3 else y.flatten(1)[:, None, None]


def _from_deepinv_shape(A: LinearOperator, y: torch.Tensor) -> torch.Tensor:
    return y.reshape(len(y), *A.measurement_shape)


def step_size(gamma: Any) -> float | torch.Tensor:
    """deepinv's step size, a number or a tensor `[]`, `[B]` or `[B, 1, 1, 1]`, as a number or `[B]`."""
    return gamma.reshape(-1) if isinstance(gamma, torch.Tensor) else float(gamma)


def _as_images(z: Any, like: torch.Tensor) -> torch.Tensor:
    """deepinv's z, a tensor, a number or None, as images."""
    return z if isinstance(z, torch.Tensor) else torch.full_like(like, 0.0 if z is None else float(z))


class OperatorPhysics(_LinearPhysics):  # pyright: ignore[reportGeneralTypeIssues]
    """The physics of an operator; `to_deepinv` makes it."""

    def __init__(self, A: LinearOperator) -> None:
        super().__init__(img_size=A.image_shape)
        self.operator = A

    def A(self, x: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """`A x`."""
        self.update_parameters(**kwargs)
        return _to_deepinv_shape(self.operator, self.operator.A(x))

    def A_adjoint(self, y: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """`A^T y`."""
        self.update_parameters(**kwargs)
        return self.operator.A_adjoint(_from_deepinv_shape(self.operator, y))

    def A_adjoint_A(self, x: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """`A^T A x`."""
        self.update_parameters(**kwargs)
        return self.operator.normal(x)

    def prox_l2(self, z: Any, y: torch.Tensor, gamma: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """`argmin_x 1/2||x - z||^2 + gamma/2 ||y - A x||^2`, computed by the operator; deepinv's solver options have
        no effect unless autograd must differentiate CG."""
        if self._recorded(z, y, gamma):
            return super().prox_l2(z, y, gamma, *args, **kwargs)
        v = _from_deepinv_shape(self.operator, y)
        start = z if isinstance(z, torch.Tensor) else _as_images(z, self.operator.A_adjoint(v))
        return self.operator.prox_l2(start, v, step_size(gamma))

    def A_dagger(self, y: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The minimum-norm solution, computed by the operator; deepinv's solver options have no effect unless autograd
        must differentiate CG."""
        if self._recorded(y):
            return super().A_dagger(y, *args, **kwargs)
        return self.operator.A_dagger(_from_deepinv_shape(self.operator, y))

    def _recorded(self, *values: Any) -> bool:
        """Whether CG would be needed where autograd records."""
        requires_grad = any(isinstance(t, torch.Tensor) and t.requires_grad for t in values)
        return requires_grad and torch.is_grad_enabled() and not self.operator.has_shifted_inverse


class SRMPhysics(_DecomposablePhysics):  # pyright: ignore[reportGeneralTypeIssues]
    """The physics of an `SRM`, `A = U diag(mask) V^T`; `to_deepinv` makes it.

    The physics registers the SRM's buffers, so that its files contain only tensors; `operator` is an SRM with these
    buffers.
    """

    def __init__(self, A: SRM) -> None:
        d = math.prod(A.image_shape)
        mask = torch.zeros(1, d, dtype=torch.float32, device=A.rows.device)
        mask[0, A.rows] = 1.0
        super().__init__(img_size=A.image_shape, mask=mask, device=A.rows.device)
        self.__dict__["_operator"] = A
        for name in ("rows", "signs", "perm"):
            buffer = getattr(A, name)
            if buffer is not None:
                self.register_buffer(name, buffer)

    @property
    def operator(self) -> SRM:
        """The SRM, on the device of this physics."""
        A: SRM = self.__dict__["_operator"]
        buffers = {n: b for n, b in self._buffers.items() if n in A._buffers}
        if any(A._buffers[n] is not b for n, b in buffers.items()):
            A = copy.copy(A)
            A.__dict__ = dict(A.__dict__)
            A._buffers = {**A._buffers, **buffers}
            self.__dict__["_operator"] = A
        return A

    def update_parameters(self, **kwargs: Any) -> None:
        """Update parameters as in every physics, except the mask, which follows from the rows."""
        if kwargs.get("mask") is not None:
            raise InputError("The mask of an SRM belongs to its rows and cannot be changed; build another SRM.")
        super().update_parameters(**kwargs)

    def A(self, x: torch.Tensor, mask: Any = None, **kwargs: Any) -> torch.Tensor:
        """`A x`."""
        self.update_parameters(mask=mask, **kwargs)
        return _to_deepinv_shape(self.operator, self.operator.A(x))

    def A_adjoint(self, y: torch.Tensor, mask: Any = None, **kwargs: Any) -> torch.Tensor:
        """`A^T y`."""
        self.update_parameters(mask=mask, **kwargs)
        return self.operator.A_adjoint(_from_deepinv_shape(self.operator, y))

    def A_adjoint_A(self, x: torch.Tensor, mask: Any = None, **kwargs: Any) -> torch.Tensor:
        """`A^T A x`."""
        self.update_parameters(mask=mask, **kwargs)
        return self.operator.normal(x)

    def A_A_adjoint(self, y: torch.Tensor, mask: Any = None, **kwargs: Any) -> torch.Tensor:
        """`A A^T y = y`."""
        return self.A(self.A_adjoint(y, mask, **kwargs))

    def V_adjoint(self, x: torch.Tensor) -> torch.Tensor:
        """`F R x`, `[B, d]`."""
        A, v = self.operator, x.flatten(1)
        v = v if A.perm is None else v[:, A.perm]
        return definition.transform(A, v if A.signs is None else v * A.signs.to(v.dtype))

    def V(self, x: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """`(F R)^T c`, images."""
        A = self.operator
        v = definition.inverse(A, x)
        v = v if A.signs is None else v * A.signs.to(v.dtype)
        v = v if A.perm is None else torch.zeros_like(v).index_copy(1, A.perm, v)
        return v.reshape(-1, *A.image_shape)

    def U(self, x: torch.Tensor) -> torch.Tensor:
        """The coefficients of the rows, `[B, 1, 1, m]`."""
        return x[:, self.operator.rows][:, None, None]

    def U_adjoint(self, x: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Measurements at their rows, zero elsewhere, `[B, d]`."""
        rows = self.operator.rows
        return x.new_zeros(len(x), math.prod(self.operator.image_shape)).index_copy(1, rows, x.flatten(1))

    def prox_l2(self, z: Any, y: torch.Tensor, gamma: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """`z + gamma/(1 + gamma) A^T (y - A z)`."""
        v = _from_deepinv_shape(self.operator, y)
        start = z if isinstance(z, torch.Tensor) else _as_images(z, self.operator.A_adjoint(v))
        return self.operator.prox_l2(start, v, step_size(gamma))

    def A_dagger(self, y: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """`A^T y`."""
        return self.operator.A_adjoint(_from_deepinv_shape(self.operator, y))
