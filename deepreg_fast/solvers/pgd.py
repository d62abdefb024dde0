"""Batched proximal gradient descent with per-image backtracking (docs/math.md, M4-M6).

One round costs one gradient of every image still at work. Each image has its own step size, its own
decision and its own end; an image that has ended leaves the batch and costs nothing more.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from .. import backend, checks
from ..linsolve.batch import add, expand, norm, secant
from ..operators.base import LinearOperator
from ..regularizers.base import Regularizer
from ..status import Status
from .acceleration import ACCELERATIONS, Accelerator, make

Observer = Callable[[int, torch.Tensor], None]


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
    record: bool = False

    def __post_init__(self) -> None:
        checks.integer(self.max_iterations, "max_iterations", 1)
        checks.number(self.tolerance, "tolerance", 0.0)
        checks.choice(self.acceleration, "acceleration", ACCELERATIONS)
        checks.number(self.tau, "tau", 0.0, open_low=True)
        checks.number(self.grow, "grow", 1.0)
        checks.number(self.shrink, "shrink", 0.01, 0.99)
        checks.integer(self.memory, "memory", 1, 20)


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


class _Work:
    """The state of all images, and which of them are still at work."""

    def __init__(self, x0: torch.Tensor, tau0: torch.Tensor) -> None:
        batch, device = x0.shape[0], x0.device
        self.x = x0.clone()
        self.tau = tau0.clone()
        self.curvature = torch.zeros(batch, dtype=torch.float64, device=device)
        self.residual = torch.full((batch,), torch.inf, dtype=torch.float64, device=device)
        self.status = torch.full((batch,), int(Status.MAX_ITERATIONS), device=device)
        self.iterations = torch.zeros(batch, dtype=torch.int64, device=device)
        self.gradients = torch.zeros(batch, dtype=torch.int64, device=device)
        self.cautious = torch.zeros(batch, dtype=torch.bool, device=device)
        self.idx = torch.arange(batch, device=device)

    def end(self, rows: torch.Tensor, status: Status) -> None:
        """Give the images of the work list where `rows` is true their status."""
        self.status[self.idx[rows]] = int(status)

    def keep(self, rows: torch.Tensor) -> None:
        self.idx = self.idx[rows]


def pgd(  # noqa: PLR0913 - the problem is these five, the rest is optional
    y: torch.Tensor,
    A: LinearOperator,
    reg: Regularizer,
    mu: torch.Tensor,
    options: PGDOptions,
    x0: torch.Tensor,
    tau0: torch.Tensor | None = None,
    observer: Observer | None = None,
) -> Solution:
    """Minimize `1/2||y - Ax||^2 + mu r(x)` for each image from `x0`.

    `x+ = prox_l2(x - tau grad r(x), y, tau/mu)` is accepted when
    `<grad r(x+) - grad r(x), x+ - x> <= ||x+ - x||^2 / tau` (Becker, Candes, Grant 2011, sec. 5.3: no difference
    of objective values, which would drown in rounding); tau then grows, else it shrinks.

    Parameters
    ----------
    y : `[B, m]` measurements; A, reg : operator and regularizer; mu : `[B]`, > 0.
    x0 : `[B, C, H, W]`, the start; tau0 : `[B]`, float64, optional per-image first step sizes.
    observer : called as `observer(round, x)` with all images after every round.

    An image whose start, measurements or gradient is not finite ends as `NON_FINITE` with its last finite iterate
    and its neighbours' bits do not change.
    """
    w = _Work(torch.where(torch.isfinite(x0), x0, torch.full_like(x0, reg.center)), _first_tau(x0, tau0, options))
    bad = ~(torch.isfinite(y).all(1) & torch.isfinite(x0).flatten(1).all(1))
    w.end(bad, Status.NON_FINITE)
    w.keep(~bad)
    accelerator = make(options.acceleration, w.x, options.memory)
    value, grad = torch.zeros_like(mu), torch.zeros_like(w.x)
    _evaluate(w, reg, value, grad)
    limit = 10.0 * (norm(w.x) + w.x[0].numel() ** 0.5) if len(w.x) else w.residual
    scale = norm(grad)
    rounds: list[torch.Tensor] = []
    if observer is not None:
        observer(0, w.x)
    while len(w.idx):
        step, candidate = _propose(w, y, A, mu, grad, accelerator)
        _judge_residual(w, step, grad, scale, options)
        if options.record:
            rounds.append(w.residual.clone())
        going = (w.status[w.idx] == int(Status.MAX_ITERATIONS)) & (w.gradients[w.idx] < options.max_iterations)
        w.keep(going)
        if len(w.idx):
            _try(w, reg, candidate[going], value, grad, accelerator, options)
            _judge_iterate(w, limit)
        if observer is not None and len(w.idx):
            observer(int(w.gradients.max()) - 1, w.x)
    history = {"residual": torch.stack(rounds)} if rounds else {}
    return Solution(w.x, w.status, w.iterations, w.gradients, w.residual, w.tau, history)


def _first_tau(x0: torch.Tensor, tau0: torch.Tensor | None, options: PGDOptions) -> torch.Tensor:
    if tau0 is None:
        return torch.full((x0.shape[0],), options.tau, dtype=torch.float64, device=x0.device)
    return torch.where(torch.isfinite(tau0) & (tau0 > 0), tau0.double(), options.tau)


def _gradient(reg: Regularizer, x: torch.Tensor, w: _Work) -> tuple[torch.Tensor, torch.Tensor]:
    """`r` and `grad r` at `x`. Unless the backend's bits are the same for any batch, the last image of one is evaluated
    as a pair of itself: torch has other convolution kernels for a single image, and its bits would depend on when its
    neighbours ended."""
    if len(x) == 1 and len(w.x) > 1 and not backend.select(reg, x).batch_invariant:
        v, g = reg.value_and_grad(torch.cat([x, x]))
        return v[:1], g[:1]
    return reg.value_and_grad(x)


def _evaluate(w: _Work, reg: Regularizer, value: torch.Tensor, grad: torch.Tensor) -> None:
    """First gradient of every image; those that are not finite end here."""
    if not len(w.idx):
        return
    v, g = _gradient(reg, w.x[w.idx], w)
    w.gradients[w.idx] += 1
    good = torch.isfinite(g).flatten(1).all(1)
    value[w.idx], grad[w.idx] = v, torch.where(expand(good, g), g, 0.0)
    w.end(~good, Status.NON_FINITE)
    w.keep(good)


def _propose(
    w: _Work,
    y: torch.Tensor,
    A: LinearOperator,
    mu: torch.Tensor,
    grad: torch.Tensor,
    accelerator: Accelerator,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The proximal step of each image at work and the point where its next gradient is taken."""
    i = w.idx
    x, tau = w.x[i], w.tau[i]
    z, _ = add(x, -tau, grad[i], torch.ones_like(i, dtype=torch.bool))
    step = A.prox_l2(z, y[i], (tau / mu[i]).to(x.dtype)) - x
    candidate = accelerator.propose(x, step, i)
    return step, torch.where(expand(w.cautious[i], x), x + step, candidate)


def _judge_residual(w: _Work, step: torch.Tensor, grad: torch.Tensor, scale: torch.Tensor, options: PGDOptions) -> None:
    """Residual at x, from x's own gradient; an image at or below the tolerance has converged at x."""
    i = w.idx
    length = norm(step)
    tau = w.tau[i]
    tested = w.curvature[i] > 0
    safe = torch.where(tested, torch.minimum(tau, 1.0 / w.curvature[i].clamp_min(1e-300)), tau)
    size = torch.maximum(scale[i], norm(grad[i])).clamp_min(1e-300)
    w.residual[i] = length / safe / size
    eps = torch.finfo(step.dtype).eps
    still = length <= 2.0 * eps * norm(w.x[i])
    probed = tested | (w.gradients[i] > 1) | (length == 0)
    w.end((w.residual[i] <= options.tolerance) & probed, Status.CONVERGED)
    w.end((w.residual[i] > options.tolerance) & (still | (tau < 1e-12 * options.tau)), Status.STAGNATED)


def _try(  # noqa: PLR0913 - one round touches all of these
    w: _Work,
    reg: Regularizer,
    candidate: torch.Tensor,
    value: torch.Tensor,
    grad: torch.Tensor,
    accelerator: Accelerator,
    options: PGDOptions,
) -> None:
    """One gradient at the candidate of each image at work; accept it or shrink that image's step."""
    i = w.idx
    v, g = _gradient(reg, candidate, w)
    w.gradients[i] += 1
    dx2, dg2, bend, old2 = secant(i, candidate, g, w.x, grad).unbind(1)
    finite = torch.isfinite(dg2) & torch.isfinite(v)
    # The difference of two gradients carries their rounding; below it the test says nothing.
    slack = 4.0 * torch.finfo(g.dtype).eps * torch.sqrt(old2 * dx2)
    good = finite & (bend <= dx2 / w.tau[i] + slack)
    clear = finite & (dg2 * 1e4 > (torch.finfo(g.dtype).eps ** 2) * old2 * 1e6)
    curvature = torch.sqrt(dg2 / dx2.clamp_min(1e-300))
    w.curvature[i] = torch.where(clear & good, torch.maximum(w.curvature[i], curvature), w.curvature[i])
    rows = i[good]
    w.x[rows], grad[rows], value[rows] = candidate[good], g[good], v[good]
    w.iterations[rows] += 1
    # With an accelerator the step size changes only when its memory is gone anyway.
    plain = torch.full_like(good, options.acceleration == "none") | w.cautious[i]
    cap = torch.where(w.curvature[i] > 0, 10.0 / w.curvature[i].clamp_min(1e-300), torch.inf)
    grown = torch.where(plain, torch.minimum(w.tau[i] * options.grow, cap), w.tau[i])
    refuse = ~good & plain
    w.tau[i] = torch.where(good, grown, torch.where(refuse, w.tau[i] * options.shrink, w.tau[i]))
    w.cautious[i] = ~good & (options.acceleration != "none")
    accelerator.reset(i[~good | (good & plain)])
    w.end(~finite & (w.tau[i] < 1e-6 * options.tau), Status.NON_FINITE)
    w.keep(w.status[i] == int(Status.MAX_ITERATIONS))


def _judge_iterate(w: _Work, limit: torch.Tensor) -> None:
    away = norm(w.x[w.idx]) > limit[w.idx]
    w.end(away, Status.RUNAWAY)
    w.keep(~away)
