"""A regularizer as a deepinv prior."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

from ...ambient import outside_inference
from ...autograd import energy, grad
from ...inverse.layer import recover
from ...operators import Inpainting
from ...regularizers.base import as_regularizer
from ...solvers import PGDOptions
from ...status import Status, counts
from .package import base
from .physics import step_size

_Prior: Any = base("optim.Prior")
_STAGNATION_TOLERANCE = 1e-3
"""The largest residual of a stagnated proximal map that counts as solved."""


class DeepInvPrior(_Prior):  # pyright: ignore[reportGeneralTypeIssues]
    """A regularizer as a deepinv prior `g(x) = r(x)`, with its gradient and its proximal map.

    `prox(x, gamma) = argmin_u 1/2 ||u - x||^2 + gamma r(u)`, by the solver of `recover`. All three are differentiable
    in x and the parameters of r. Pass `g_first=True` to deepinv's optimizers that support it: their proximal step is
    then that of the data term, as in `recover`.

    Parameters
    ----------
    reg : Regularizer, or an nn.Module that maps images to one energy each
    options : PGDOptions, optional
        Of `prox`; default: at most 500 iterations, tolerance 1e-5, Anderson acceleration.

    Raises
    ------
    InputError
        If deepinv is missing, or `reg` is not a regularizer.

    Warns
    -----
    UserWarning
        If `prox` does not converge for some images.

    Examples
    --------
    >>> import torch, deepreg_fast as dr
    >>> prior, x = dr.DeepInvPrior(dr.TV()), torch.rand(2, 1, 8, 8)
    >>> prior(x).shape, prior.grad(x).shape
    (torch.Size([2]), torch.Size([2, 1, 8, 8]))
    >>> bool((prior.fn(prior.prox(x, gamma=0.1)) < prior.fn(x)).all())
    True
    """

    @outside_inference
    def __init__(self, reg: nn.Module, options: PGDOptions | None = None) -> None:
        super().__init__()
        self.explicit_prior = True
        self.reg = as_regularizer(reg)
        self.options = options or PGDOptions(500, 1e-5, acceleration="anderson")

    def fn(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """`r(x)`, `[B]`; deepinv's further arguments have no effect."""
        return energy(self.reg, x)

    g = fn

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """`r(x)`, `[B]`."""
        return self.fn(x)

    def grad(self, x: torch.Tensor, *args: Any, get_energy: bool = False, **kwargs: Any) -> Any:
        """`grad r(x)`, or `(r(x), grad r(x))` if `get_energy`."""
        return (energy(self.reg, x), grad(self.reg, x)) if get_energy else grad(self.reg, x)

    def prox(self, x: torch.Tensor, *args: Any, gamma: Any = 1.0, **kwargs: Any) -> torch.Tensor:
        """`argmin_u 1/2 ||u - x||^2 + gamma r(u)`, gamma > 0 a number or one per image."""
        mask = torch.ones(x.shape[1:], dtype=torch.bool, device=x.device)
        weight = step_size(gamma)
        if isinstance(weight, torch.Tensor):
            weight = weight.to(x).expand(len(x))
        elif weight == 0.0:
            return x
        u, sol = recover(
            x, Inpainting(mask), self.reg, weight, options=self.options, x0=x.detach(), return_solution=True
        )
        # In float32 an image may stagnate at the rounding of its residual, above the tolerance.
        solved = (sol.status == int(Status.STAGNATED)) & (sol.residual <= _STAGNATION_TOLERANCE)
        failed = (sol.status != int(Status.CONVERGED)) & ~solved
        if bool(failed.any()):
            warnings.warn(
                f"The proximal map of {int(failed.sum())} of {len(x)} images did not converge "
                f"({counts(sol.status[failed])}); give DeepInvPrior other options.",
                stacklevel=2,
            )
        return u
