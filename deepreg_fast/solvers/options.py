"""Options and result type of `pgd`."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from .. import checks
from .acceleration import ACCELERATIONS

DATA_STEPS = ("prox", "gradient")


@dataclass(frozen=True)
class PGDOptions:
    """Options of proximal gradient descent (docs/math.md, M4-M6).

    Parameters
    ----------
    max_iterations : int
        Maximum number of gradients per image; rejected steps count.
    tolerance : float
        An image has converged if `||x - prox(x - tau grad r(x))|| / tau <= tolerance * max(||grad r(x0)||, ||grad
        r(x)||)` at the returned x, with tau no longer than the inverse of the largest curvature observed.
    acceleration : "none", "fista" or "anderson"
        "none" is the paper's method.
    tau, grow, shrink : float
        Initial step size, its growth factor after an accepted step (>= 1), and its factor after a rejected one (in (0,
        1)).
    memory : int
        Differences that "anderson" stores per image; they take `2 memory + 2` images.
    monotone : bool
        Reject "anderson" candidates that increase the objective (docs/math.md, M6). If r is not bounded below, images
        may then diverge that would otherwise stay at a stationary point.
    data_step : "prox" or "gradient"
        How a step reduces the misfit: by the operator's proximal map, or by its gradient, `A^T (A x - y) / mu`,
        together with that of r. Use "gradient" for an operator whose proximal map takes many products.
    record : bool
        Store the residual of every image and iteration in `Solution.history`.

    Raises
    ------
    InputError
        If an option is out of range.

    Examples
    --------
    >>> import deepreg_fast as dr
    >>> dr.PGDOptions(tolerance=1e-5, acceleration="fista").max_iterations
    500
    """

    max_iterations: int = 500
    tolerance: float = 1e-4
    acceleration: str = "none"
    tau: float = 1.0
    grow: float = 1.2
    shrink: float = 0.5
    memory: int = 5
    monotone: bool = True
    data_step: str = "prox"
    record: bool = False

    def __post_init__(self) -> None:
        checks.plain_fields(self)
        checks.fields_typed(self)
        checks.integer(self.max_iterations, "max_iterations", 1)
        checks.number(self.tolerance, "tolerance", 0.0)
        checks.choice(self.acceleration, "acceleration", ACCELERATIONS)
        checks.number(self.tau, "tau", 0.0, open_low=True)
        checks.number(self.grow, "grow", 1.0)
        checks.number(self.shrink, "shrink", 0.01, 0.99)
        checks.integer(self.memory, "memory", 1, 20)
        checks.boolean(self.monotone, "monotone")
        checks.choice(self.data_step, "data_step", DATA_STEPS)
        checks.boolean(self.record, "record")


@dataclass
class Solution:
    """Result of a recovery, per image.

    Attributes
    ----------
    x : Tensor `[B, C, H, W]`
        The reconstruction.
    status : Tensor `[B]`
        Values of `Status`.
    iterations, gradients : Tensor `[B]`
        Accepted steps, and evaluations of `grad r`.
    residual : Tensor `[B]`
        Relative residual at `x`.
    tau : Tensor `[B]`
        Last step sizes.
    history : dict of Tensor
        `residual` `[rounds, B]` if recorded.
    backend : str
        The backend that computed it.

    Examples
    --------
    >>> import torch, deepreg_fast as dr
    >>> A = dr.Identity((1, 8, 8))
    >>> sol = dr.recover(A.A(torch.rand(2, 1, 8, 8)), A, dr.TV(0.1), mu=0.01)
    >>> dr.Status(int(sol.status[0])).name
    'CONVERGED'
    """

    x: torch.Tensor
    status: torch.Tensor
    iterations: torch.Tensor
    gradients: torch.Tensor
    residual: torch.Tensor
    tau: torch.Tensor
    history: dict[str, torch.Tensor] = field(default_factory=dict)
    backend: str = "reference"
