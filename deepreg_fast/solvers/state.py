"""The state of all images of a PGD run, and which of them are still at work."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..batched import fused
from ..batched.linalg import expand, gather, scatter
from ..batched.loop import uses_mask
from ..status import Status
from .criteria import PerImageState
from .options import PGDOptions, Solution


class State:
    """Iterates and gradients `[B, ...]` and the `PerImageState` of all images.

    `idx` `[b]` are the indices of the images in the next iteration's batch: the active ones on the CPU, all images on a
    device. `first` and `best` are the first and the smallest objective so far, `[B]`, if they are tracked.
    """

    def __init__(self, x0: torch.Tensor, tau0: torch.Tensor | None, options: PGDOptions, center: float) -> None:
        batch, device = x0.shape[0], x0.device
        finite = torch.isfinite(x0)
        self.x = torch.where(finite, x0, center).contiguous()
        self.grad = torch.zeros_like(self.x)
        self.tau = torch.full((batch,), options.tau, dtype=torch.float64, device=device)
        if tau0 is not None:
            self.tau = torch.where(torch.isfinite(tau0) & (tau0 > 0), tau0.double(), options.tau)
        self.lipschitz_estimate = torch.zeros_like(self.tau)
        self.residual = torch.full_like(self.tau, torch.inf)
        self.plain_next = torch.zeros(batch, dtype=torch.bool, device=device)
        self.gradients = torch.zeros(batch, dtype=torch.int64, device=device)
        self.iterations = torch.zeros_like(self.gradients)
        self.status = torch.full_like(self.gradients, int(Status.MAX_ITERATIONS))
        self.running = torch.ones_like(self.plain_next)
        self.best = torch.full_like(self.tau, torch.inf)
        self.first = torch.zeros_like(self.tau)
        self.idx = torch.arange(batch, dtype=torch.int64, device=device)
        self.end(~finite.flatten(1).all(1))

    def end(self, rows: torch.Tensor) -> None:
        """The images where `rows` `[B]` end as not finite."""
        self.status = torch.where(rows & self.running, int(Status.NON_FINITE), self.status)
        self.running = self.running & ~rows

    def numbers(self) -> PerImageState:
        """Those of the images `idx`."""
        return PerImageState(*(gather(getattr(self, name), self.idx) for name in PerImageState._fields))

    def store_state(self, numbers: PerImageState) -> None:
        """Put the numbers of the images `idx` back."""
        for name, value in numbers._asdict().items():
            setattr(self, name, scatter(getattr(self, name), self.idx, value))

    def compact(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """On the CPU take the images that have ended out of `idx` and of these tensors, which belong to it."""
        running = gather(self.running, self.idx)
        if uses_mask(running) or bool(running.all()):
            return tensors
        self.idx = self.idx[running]
        return tuple(t[running] for t in tensors)

    def accept(self, good: torch.Tensor, x: torch.Tensor, grad: torch.Tensor) -> None:
        """Make x and its gradient those of the images of `idx` where `good`."""
        if uses_mask(x):
            self.x, self.grad = fused.take(good, (self.x, x), (self.grad, grad))
            return
        everyone = bool(good.all())
        rows = self.idx if everyone else self.idx[good]
        for mine, new in ((self.x, x), (self.grad, grad)):
            mine[rows] = new if everyone else new[good]

    def exceeds_best(self, objective: torch.Tensor) -> torch.Tensor:
        """Where the candidates of the images `idx` lie visibly above the lowest objective met. The margin is far above
        the rounding of the objective, and far below what a step astray climbs."""
        first, best = gather(self.first, self.idx), gather(self.best, self.idx)
        return ~gather(self.plain_next, self.idx) & (objective > best + 1e-4 * (best.abs() + first - best))

    def start_best(self, objective: torch.Tensor) -> None:
        """Take the first objectives of the images `idx`."""
        self.first, self.best = scatter(self.first, self.idx, objective), scatter(self.best, self.idx, objective)

    def update_best(self, good: torch.Tensor, objective: torch.Tensor) -> None:
        """Take the objectives of the images of `idx` where `good`."""
        best = gather(self.best, self.idx)
        self.best = scatter(self.best, self.idx, torch.where(good, torch.minimum(best, objective), best))

    def solution(self, rounds: list[torch.Tensor], own: Callable[[torch.Tensor], torch.Tensor]) -> Solution:
        """What there is so far, in memory that `own` gives."""
        history = {"residual": torch.stack(rounds)} if rounds else {}
        return Solution(
            own(self.x),
            own(self.status),
            own(self.iterations),
            own(self.gradients),
            own(self.residual),
            own(self.tau),
            history,
        )


def set_first_gradient(state: State, grad: torch.Tensor) -> None:
    """Take the first gradient of the images `idx`; those where it is not finite end."""
    good = torch.isfinite(grad).flatten(1).all(1)
    good_or_ended = scatter(torch.ones_like(state.running), state.idx, good)
    state.gradients = state.gradients + state.running
    running = gather(state.running, state.idx)
    state.grad = scatter(state.grad, state.idx, torch.where(expand(running & good, grad), grad, 0.0))
    state.end(~good_or_ended)
