"""Recovery of images from measurements with a regularizer."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from .. import checks
from ..ambient import full_precision
from ..batched.linalg import expand
from ..errors import InputError
from ..operators.base import LinearOperator
from ..regularizers.base import as_regularizer
from ..solvers import PGDOptions, Solution, pgd
from ..solvers.pgd import Observer
from ..status import Status
from .data_term import initial_point, resolve_mu


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
    """Recover `xhat_b = argmin_x 1/2 ||y_b - A x||^2 + mu r(x)` for each image of a batch.

    Proximal gradient descent with a step size per image (docs/math.md, M1-M6).

    Parameters
    ----------
    y : Tensor `[B, *A.measurement_shape]`, float32 or float64
        Measurements made by `A`. An image with non-finite measurements ends as `NON_FINITE` without affecting the
        others; if no image is finite, an error is raised.
    A : LinearOperator
    reg : Regularizer, or an nn.Module that maps images to one energy each
    mu : float or Tensor `[B]`, > 0
        Weight of the regularizer. Alternatively give `lam` and `sigma`.
    lam, sigma : float, optional
        `mu = lam sigma^2`, for noise of standard deviation `sigma` in the units of y.
    options : PGDOptions, optional
        Tolerance, limits, acceleration.
    x0 : Tensor `[B, C, H, W]`, optional
        Initial guess; by default `initial_point` of docs/math.md, M2.
    tau0 : Tensor `[B]`, optional
        Initial step sizes, such as `Solution.tau` of an earlier solve.
    observer : callable, optional
        Called as `observer(round, x)` after every iteration; it makes the loop synchronize with the device.

    Returns
    -------
    Solution
        Without an autograd graph, even if y or x0 require gradients; `hypergradient` differentiates a recovery.

    Raises
    ------
    InputError
        If a shape, dtype or value is invalid.
    OutOfMemory
        If the device's memory is too small; its `partial` is the `Solution` so far.

    Examples
    --------
    >>> import torch, deepreg_fast as dr
    >>> A = dr.SRM((1, 16, 16), ratio=0.5)
    >>> x = torch.linspace(0, 1, 16).expand(1, 1, 16, 16)
    >>> sol = dr.recover(A.A(x), A, dr.TV(), mu=1e-3, options=dr.PGDOptions(acceleration="fista"))
    >>> float(dr.psnr(sol.x, x)) > 30
    True
    """
    reg = as_regularizer(reg)
    options = options or PGDOptions()
    if not isinstance(A, LinearOperator):
        raise InputError(f"A must be a deepreg_fast operator such as SRM or Identity, but is {type(A).__name__}.")
    y = checks.measured(y, A.measurement_shape).detach()
    finite = torch.isfinite(y).flatten(1).all(1)
    if len(y) and not bool(finite.any()):
        raise InputError("y must be finite, but every row holds NaN or infinite measurements; check the data.")
    mu_b = resolve_mu(mu, lam, sigma, like=y)
    if x0 is None:
        x0 = initial_point(torch.where(expand(finite, y), y, 0.0), A, reg)
    else:
        x0 = checks.images(x0, "x0", A.image_shape).detach()
        checks.same_kind(x0, y, "x0 and y")
        if len(x0) != len(y):
            raise InputError(f"x0 must hold one image per row of y, {len(y)}, but holds {len(x0)}.")
    if tau0 is not None and not _is_vector(tau0, len(y)):
        raise InputError(
            f"tau0 must be a float tensor [{len(y)}], one step size per image, but is {checks.describe(tau0)}."
        )
    if len(y) == 0:
        integers, floats = (partial(torch.zeros, 0, dtype=t, device=y.device) for t in (torch.int64, torch.float64))
        backend = reg.backend_for(x0).name
        return Solution(x0, integers(), integers(), integers(), floats(), floats(), backend=backend)
    sol = pgd(y, A, reg, mu_b, options, x0, tau0, observer)
    sol.backend = reg.backend_for(x0).name
    return sol


def _is_vector(t: object, length: int) -> bool:
    return isinstance(t, torch.Tensor) and t.is_floating_point() and t.shape == (length,)


__all__ = ["PGDOptions", "Solution", "Status", "recover"]
