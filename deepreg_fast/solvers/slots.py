"""Continuous batching of PGD: an image that has ended leaves its slot of the batch to the next one.

A batch of `pgd` ends with its slowest image, and until then ever fewer images share the cost of a round. Here the batch
stays full. PGD's state is per image, so a new image is started in a batch of its own and moved into its slot. Its bits
are those of `pgd`, whatever the other slots hold.
"""

from __future__ import annotations

import torch

from ..ambient import full_precision
from ..batched.loop import attach_partial_result, uses_mask
from ..errors import InputError
from .options import PGDOptions, Solution
from .pgd import _Run
from .protocols import DataTerm, SmoothTerm


class Slots:
    """`size` slots, each of which is free or holds an image that is being recovered or has ended.

    Parameters
    ----------
    A, reg : operator and regularizer, the same for all images.
    options : PGDOptions, without `record`.
    y_like, x_like : Tensor `[1, ...]`
        Measurements and image whose shape, dtype and device those of every slot will have.
    size : int

    Memory per slot is that of an image in `pgd`. CUDA graphs are not used.
    """

    def __init__(
        self,
        A: DataTerm,
        reg: SmoothTerm,
        options: PGDOptions,
        y_like: torch.Tensor,
        x_like: torch.Tensor,
        size: int,
    ) -> None:
        if options.record:
            raise InputError("record must be off where images leave and enter the batch, but is on; use recover.")
        x0 = x_like.new_full((size, *x_like.shape[1:]), reg.center)
        self._run = _Run(y_like.new_zeros(size, *y_like.shape[1:]), A, reg, x0.new_ones(size), options, x0, None)
        state = self._run.state
        state.running = torch.zeros_like(state.running)
        self._run.limit, self._run.scale = torch.zeros_like(state.tau), torch.zeros_like(state.tau)
        self._find_active()
        self._occupied = [False] * size

    def free(self) -> list[int]:
        """The slots without an image."""
        return [row for row, occupied in enumerate(self._occupied) if not occupied]

    def ended(self) -> list[int]:
        """The slots whose image has ended. On a device this synchronizes."""
        running = self._run.state.running.tolist()
        return [row for row, occupied in enumerate(self._occupied) if occupied and not running[row]]

    @full_precision
    @torch.no_grad()
    def refill(self, rows: list[int], y: torch.Tensor, mu: torch.Tensor, x0: torch.Tensor) -> None:
        """Start the images of `y`, `mu` `[k]` and `x0` in the free slots `rows`, which may be fewer than are free."""
        run, count = self._run, len(rows)
        reg = run.reg
        if count == 1 and len(run.y) > 1 and not reg.backend_for(x0).batch_invariant:
            # As in pgd: PyTorch computes a lone image in another order.
            y, mu, x0 = (torch.cat([t, t]) for t in (y, mu, x0))
        fresh = _Run(y, run.A, reg, mu, run.options, x0, None)
        with attach_partial_result(run.solution):
            fresh.begin()
        index = torch.tensor(rows, dtype=torch.int64, device=run.y.device)
        for name in ("y", "mu", "limit", "scale"):
            getattr(run, name)[index] = getattr(fresh, name)[:count]
        for part, source in ((run.state, fresh.state), (run.accelerator, fresh.accelerator)):
            for name, value in vars(part).items():
                # Every other tensor has one row per image.
                if isinstance(value, torch.Tensor) and name != "idx":
                    value[index] = getattr(source, name)[:count]
        if run.correction is not None:
            run.correction[index] = 0.0
        self._find_active()
        for row in rows:
            self._occupied[row] = True

    @full_precision
    @torch.no_grad()
    def round(self) -> None:
        """One gradient of each image that is active."""
        with attach_partial_result(self._run.solution):
            if len(self._run.state.idx):
                self._run.round()

    @torch.no_grad()
    def take(self, rows: list[int]) -> Solution:
        """The solutions of these slots, which are free afterwards."""
        index = torch.tensor(rows, dtype=torch.int64, device=self._run.y.device)
        for row in rows:
            self._occupied[row] = False
        return self._run.state.solution([], lambda t: t[index])

    def _find_active(self) -> None:
        state = self._run.state
        if not uses_mask(state.x):
            state.idx = state.running.nonzero()[:, 0]
