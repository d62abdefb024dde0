"""The recovery as a deepinv reconstructor."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from ... import checks
from ...ambient import outside_inference
from ...errors import InputError
from ...inverse.adjoint import ImplicitAdjoint, JacobianFree
from ...inverse.layer import recover
from ...operators import LinearOperator
from ...regularizers.base import as_regularizer
from ...solvers import PGDOptions
from .conversion import from_deepinv
from .package import base, flatten
from .parameters import tensors
from .physics import OperatorPhysics, SRMPhysics

_Reconstructor: Any = base("models.Reconstructor")
_MAX_OPERATORS = 4
"""Operators that a `RecoverModel` stores."""


class RecoverModel(_Reconstructor):  # pyright: ignore[reportGeneralTypeIssues]
    """The recovery as a deepinv reconstructor, `model(y, physics) = argmin_x 1/2 ||y - A x||^2 + mu r(x)`.

    It is differentiable in y, the parameters of r, and mu (`dr.ops.recover`), so that deepinv's `Trainer` and its
    losses, with or without true images, train the regularizer. mu is a parameter through its logarithm, `log_mu`.

    Parameters
    ----------
    reg : Regularizer, or an nn.Module that maps images to one energy each
    mu : float, > 0
    options : PGDOptions, optional
        Of the recovery.
    adjoint : ImplicitAdjoint or JacobianFree, optional
        How the gradient passes through the recovery.
    trainable_mu : bool
        Whether `log_mu` is a parameter; otherwise it is a buffer.

    Raises
    ------
    InputError
        If deepinv is missing or an argument is invalid. A call also raises it in every case of `from_deepinv`.

    Examples
    --------
    >>> import torch, deepreg_fast as dr
    >>> physics, x = dr.to_deepinv(dr.SRM((1, 8, 8), ratio=0.5)), torch.rand(2, 1, 8, 8)
    >>> model = dr.RecoverModel(dr.Ridge(filters=2, kernel_size=3), mu=0.05)
    >>> (model(physics(x), physics) - x).square().mean().backward()
    >>> bool(model.log_mu.grad != 0)
    True
    """

    @outside_inference
    def __init__(
        self,
        reg: nn.Module,
        mu: float,
        options: PGDOptions | None = None,
        adjoint: ImplicitAdjoint | JacobianFree | None = None,
        trainable_mu: bool = True,
    ) -> None:
        super().__init__()
        self.reg = as_regularizer(reg)
        self.options, self.adjoint = options, adjoint
        value = torch.tensor(math.log(checks.number(mu, "mu", 0.0, open_low=True)), dtype=torch.float32, device="cpu")
        self.log_mu: torch.Tensor
        if checks.boolean(trainable_mu, "trainable_mu"):
            self.log_mu = nn.Parameter(value)
        else:
            self.register_buffer("log_mu", value)
        self.__dict__["_operators"] = []

    @property
    def mu(self) -> torch.Tensor:
        """The weight, `exp(log_mu)`."""
        return self.log_mu.exp()

    def forward(self, y: Any, physics: Any, **kwargs: Any) -> torch.Tensor:
        """Recover the images from deepinv's measurements `y` of `physics`; further arguments have no effect."""
        A = self._operator(y, physics)
        measurements = flatten(y)
        measurements = measurements.reshape(len(measurements), *A.measurement_shape)
        return recover(measurements, A, self.reg, self.mu, options=self.options, adjoint=self.adjoint)

    @torch.no_grad()
    def _operator(self, y: Any, physics: Any) -> LinearOperator:
        """The operator of a physics, stored until a parameter of the physics or the shape of its images changes."""
        named = tensors(physics) if isinstance(physics, nn.Module) else {}
        state = tuple((n, t, 0 if t.is_inference() else t._version) for n, t in named.items())
        shape = _shape_of_images(y, physics)
        stored: list[tuple[Any, ...]] = self.__dict__["_operators"]
        for stored_physics, stored_shape, stored_state, A in stored:
            # The tensors themselves are stored and compared: a new tensor may have the address of a deleted one.
            if stored_physics is physics and stored_shape == shape and len(stored_state) == len(state):
                pairs = zip(stored_state, state, strict=True)
                if all(a[0] == b[0] and a[1] is b[1] and a[2] == b[2] for a, b in pairs):
                    return A
        A = from_deepinv(physics, shape)
        stored.insert(0, (physics, shape, state, A))
        del stored[_MAX_OPERATORS:]
        return A

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_operators": []}


def _shape_of_images(y: Any, physics: Any) -> tuple[int, ...]:
    if isinstance(physics, (SRMPhysics, OperatorPhysics)):
        return physics.operator.image_shape
    if not hasattr(physics, "A_adjoint"):
        raise InputError(
            f"physics must be a deepinv LinearPhysics, but is {type(physics).__name__}; the recovery is for linear A."
        )
    return tuple(physics.A_adjoint(y).shape[1:])
