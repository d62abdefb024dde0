"""What `pgd` takes and gives."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from .. import checks
from .acceleration import ACCELERATIONS


@dataclass(frozen=True)
class PGDOptions:
    """Options of `pgd`.

    Attributes
    ----------
    max_iterations : int
        Limit on the gradients of each image (an accepted step costs one, a refused one too).
    tolerance : float
        `converged` means `||x - prox(x - tau grad r(x))|| / tau <= tolerance * max(||grad r(x0)||, ||grad r(x)||)`
        at the returned x, with a tau no longer than the inverse of the largest curvature met.
    acceleration : "none", "fista" or "anderson"
        "none" is the paper's method.
    tau, grow, shrink : float
        First step size, its growth on success (>= 1) and its factor on failure (in (0, 1)).
    memory : int
        Differences that "anderson" keeps for each image; its memory is `2 memory + 2` images.
    monotone : bool
        Refuse candidates of "anderson" that climb (docs/math.md, M6). Where r is not bounded below, images then run
        away that would else stay at a stationary point.
    record : bool
        Keep the residual of every image and round in `Solution.history`.
    """

    max_iterations: int = 500
    tolerance: float = 1e-4
    acceleration: str = "none"
    tau: float = 1.0
    grow: float = 1.2
    shrink: float = 0.5
    memory: int = 5
    monotone: bool = True
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
        checks.boolean(self.record, "record")


@dataclass
class Solution:
    """What a recovery gives, per image.

    `x` `[B, C, H, W]`; `status` `[B]` (see `deepreg_fast.Status`); `iterations` accepted steps and `gradients`
    evaluations of `grad r`, `[B]`; `residual` `[B]`, relative, at `x`; `tau` `[B]`, the last step sizes;
    `history` a dictionary of tensors, `residual` `[rounds, B]` when recorded; `backend`, the one that ran.
    """

    x: torch.Tensor
    status: torch.Tensor
    iterations: torch.Tensor
    gradients: torch.Tensor
    residual: torch.Tensor
    tau: torch.Tensor
    history: dict[str, torch.Tensor] = field(default_factory=dict)
    backend: str = "reference"
