"""The state of all images of a PGD run, and which of them are active."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..batched.linalg import expand, gather, scatter
from ..batched.loop import uses_mask
from ..status import Status
from .criteria import PerImageState
from .options import PGDOptions, Solution
from .steps import take


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
        """End the images `rows` `[B]` with the status `NON_FINITE`."""
        self.status = torch.where(rows & self.running, int(Status.NON_FINITE), self.status)
        self.running = self.running & ~rows

    def numbers(self) -> PerImageState:
        """The scalars of the images `idx`."""
        return PerImageState(*(gather(getattr(self, name), self.idx) for name in PerImageState._fields))

    def store_state(self, numbers: PerImageState) -> None:
        """Write the scalars of the images `idx` back."""
        for name, value in numbers._asdict().items():
            setattr(self, name, scatter(getattr(self, name), self.idx, value))

    def compact(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """On the CPU, remove inactive images from `idx` and from these tensors, which are indexed like it."""
        running = gather(self.running, self.idx)
        if uses_mask(running) or bool(running.all()):
            return tensors
        self.idx = self.idx[running]
        return tuple(t[running] for t in tensors)

    def accept(self, good: torch.Tensor, x: torch.Tensor, grad: torch.Tensor) -> None:
        """Store x and its gradient for the images of `idx` for which `good` is true."""
        if uses_mask(x):
            self.x, self.grad = take(good, (self.x, x), (self.grad, grad))
            return
        all_good = bool(good.all())
        rows = self.idx if all_good else self.idx[good]
        for stored, new in ((self.x, x), (self.grad, grad)):
            stored[rows] = new if all_good else new[good]

    def exceeds_best(self, objective: torch.Tensor) -> torch.Tensor:
        """Whether the candidates of the images `idx` exceed the lowest objective so far by more than a margin.

        The margin is far above the objective's rounding, and far below the increase of a diverging step.
        """
        first, best = gather(self.first, self.idx), gather(self.best, self.idx)
        return ~gather(self.plain_next, self.idx) & (objective > best + 1e-4 * (best.abs() + first - best))

    def start_best(self, objective: torch.Tensor) -> None:
        """Store the first objectives of the images `idx`."""
        # Copies: if all images are active, `scatter` returns its argument, and the two would be one tensor.
        self.first = scatter(self.first, self.idx, objective.clone())
        self.best = scatter(self.best, self.idx, objective.clone())

    def update_best(self, good: torch.Tensor, objective: torch.Tensor) -> None:
        """Lower the best objectives of the images of `idx` for which `good` is true."""
        best = gather(self.best, self.idx)
        self.best = scatter(self.best, self.idx, torch.where(good, torch.minimum(best, objective), best))

    def solution(self, rounds: list[torch.Tensor], own: Callable[[torch.Tensor], torch.Tensor]) -> Solution:
        """The current solution; `own` copies its tensors out of shared memory."""
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
    """Store the first gradient of the images `idx`; an image whose gradient is not finite ends."""
    good = torch.isfinite(grad).flatten(1).all(1)
    good_or_inactive = scatter(torch.ones_like(state.running), state.idx, good)
    state.gradients = state.gradients + state.running
    running = gather(state.running, state.idx)
    state.grad = scatter(state.grad, state.idx, torch.where(expand(running & good, grad), grad, 0.0))
    state.end(~good_or_inactive)
