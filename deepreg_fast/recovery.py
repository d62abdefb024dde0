"""Recovery of images from measurements with a regularizer."""

from __future__ import annotations

import torch
from torch import nn

from . import checks
from .ambient import full_precision
from .errors import InputError
from .fidelity import resolve_mu
from .implicit import initial_point
from .operators.base import LinearOperator
from .regularizers.base import as_regularizer
from .solvers import PGDOptions, Solution, pgd
from .solvers.pgd import Observer
from .status import Status


@full_precision
@torch.no_grad()
def recover(  # noqa: PLR0913 - the problem, then what is optional
    y: torch.Tensor,
    A: LinearOperator,
    reg: nn.Module,
    mu: float | torch.Tensor | None = None,
    *,
    lam: float | None = None,
    sigma: float | None = None,
    options: PGDOptions | None = None,
    x0: torch.Tensor | None = None,
    tau0: torch.Tensor | None = None,
    observer: Observer | None = None,
) -> Solution:
    """`xhat_b = argmin_x 1/2 ||y_b - A x||^2 + mu r(x)` for each image of the batch.

    Parameters
    ----------
    y : Tensor `[B, m]`, float32 or float64
        Measurements made by `A`. An image whose measurements are not finite ends as `NON_FINITE` beside its
        unharmed neighbours; if none is finite, that is an error.
    A : LinearOperator
    reg : Regularizer, or any nn.Module that maps images to one energy each
    mu : float or Tensor `[B]`, > 0
        Weight of the regularizer; or give `lam` and `sigma`, then `mu = lam sigma^2`.
    options : PGDOptions
        Tolerance, limits, acceleration.
    x0 : Tensor `[B, C, H, W]`, optional
        Start; by default the minimum-norm solution about the regularizer's centre.
    tau0 : Tensor `[B]`, optional
        First step sizes, such as `Solution.tau` of an earlier solve.
    observer : called as `observer(round, x)` after every round.

    Returns
    -------
    Solution
        `x`, `status`, `iterations`, `gradients`, `residual`, `tau`, `history`, `backend`; without a graph of autograd,
        whatever follows y or x0: `hypergradient` is the derivative of a recovery.

    Raises
    ------
    InputError
        If a shape, dtype or value does not fit.
    """
    reg = as_regularizer(reg)
    options = options or PGDOptions()
    if not isinstance(A, LinearOperator):
        raise InputError(f"A must be a deepreg_fast operator such as SRM or Identity, but is {type(A).__name__}.")
    y = checks.vectors(y, A.measurements).detach()
    if len(y) and not bool(torch.isfinite(y).all(1).any()):
        raise InputError("y must be finite, but every row holds NaN or infinite measurements; check the data.")
    mu_b = resolve_mu(mu, lam, sigma, like=y)
    if x0 is None:
        x0 = initial_point(torch.where(torch.isfinite(y).all(1)[:, None], y, torch.zeros_like(y)), A, reg)
    else:
        x0 = checks.images(x0, "x0", A.image_shape).detach()
        checks.same_kind(x0, y, "x0 and y")
        if len(x0) != len(y):
            raise InputError(f"x0 must hold one image per row of y, {len(y)}, but holds {len(x0)}.")
    if len(y) == 0:
        none = torch.zeros(0, dtype=torch.int64, device=y.device)
        empty = torch.zeros(0, dtype=torch.float64, device=y.device)
        return Solution(x0, none, none, none, empty, empty)
    sol = pgd(y, A, reg, mu_b, options, x0, tau0, observer)
    sol.backend = reg.served_by(x0).name
    return sol


__all__ = ["PGDOptions", "Solution", "Status", "recover"]
