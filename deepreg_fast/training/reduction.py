"""Sums of the lanes' gradients over all processes, in float64 and in the order of the lanes.

One exchange per step carries everything: gradients, statistics, and what the processes must agree on. float64 sums in a
fixed order have the same bits whatever the number of processes; a float32 all-reduce does not.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from ..batched.linalg import ordered_sum
from ..errors import ProcessLost
from .lanes import Lanes
from .objective import LaneGradients, Objective
from .world import World

# Steps between two comparisons of the processes' weights.
_COMPARE_EVERY = 100


class Reduction:
    """Sets `.grad` to the sum over the lanes of all processes, and collects the statistics of the whole batch."""

    def __init__(
        self,
        world: World,
        lanes: Lanes,
        names: Sequence[str],
        params: Sequence[nn.Parameter],
        objective: Objective[Any],
    ) -> None:
        self.world, self.lanes = world, lanes
        self.names, self.params = names, params
        self.lane_columns, self.image_columns = objective.lane_columns, objective.image_columns
        self._steps, self._wait = 0, 0.0
        self._wishes = self._agreed = (False, False)

    def wish(self, stop: bool, save: bool) -> None:
        """What this process asks of all at the next exchange: to stop after the step, or to save a checkpoint."""
        self._wishes = (stop, save)

    def agreed_to_stop(self, local: bool) -> bool:
        """Whether all processes stop after this step. A process alone decides by itself, later than `wish`."""
        return local if self.world.size == 1 else self._agreed[0]

    def agreed_to_save(self, local: bool) -> bool:
        """Whether all processes save a checkpoint after this step."""
        return local if self.world.size == 1 else self._agreed[1]

    def metrics(self) -> dict[str, float]:
        """Seconds that this process waited for the others in the last step, if there are any."""
        return {} if self.world.size == 1 else {"waiting": self._wait}

    def __call__(self, compute: Callable[[], list[LaneGradients]], images: int) -> dict[str, torch.Tensor]:
        """Set `.grad` from what `compute` returns in each process, for `images` images in each lane. Returns the
        statistics of the whole batch.

        Raises
        ------
        ProcessLost
            If `compute` raised in another process, or if the processes have different weights.
        """
        error, parts = None, []
        try:
            parts = compute()
        except Exception as raised:
            if self.world.size == 1:
                raise
            error = raised
        if self.world.size == 1:
            vectors = torch.stack([self._vector(theta) for part in parts for theta in part.theta])
            stats = self._columns(parts, images)
        else:
            vectors, stats = self._exchange(parts, images, error)
        whole = ordered_sum(vectors.unbind(0))
        for p, g in zip(self.params, whole.split([p.numel() for p in self.params]), strict=True):
            p.grad = g.reshape(p.shape).to(p)
        return self._unpack(stats, images)

    def _vector(self, theta: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.cat([theta[name].detach().double().flatten() for name in self.names])

    def _columns(self, parts: list[LaneGradients], images: int) -> torch.Tensor:
        """`[lanes, columns]`: the numbers of each lane, then those of its images. What was not computed is 0."""
        lanes, out = len(self.lanes.local_lanes), []
        for names, width in ((self.lane_columns, 1), (self.image_columns, images)):
            for name in names:
                values = [p.stats[name].double().reshape(-1) for p in parts if name in p.stats]
                column = torch.cat(values) if values else torch.zeros(lanes * width, dtype=torch.float64, device="cpu")
                out.append(column.reshape(lanes, -1))
        return torch.cat(out, 1)

    def _unpack(self, stats: torch.Tensor, images: int) -> dict[str, torch.Tensor]:
        sizes = [1] * len(self.lane_columns) + [images] * len(self.image_columns)
        names = (*self.lane_columns, *self.image_columns)
        return {name: t.flatten() for name, t in zip(names, stats.split(sizes, 1), strict=True)}

    def _exchange(
        self, parts: list[LaneGradients], images: int, error: Exception | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The gradients `[lanes, P]` and columns of all lanes, in the order of the lanes."""
        size = sum(p.numel() for p in self.params)
        width = len(self.lane_columns) + images * len(self.image_columns)
        flags = [float(error is not None), *map(float, self._wishes), self._digest()]
        packed = torch.zeros(len(self.lanes.local_lanes), size + width + len(flags), dtype=torch.float64, device="cpu")
        packed[:, -len(flags) :] = torch.tensor(flags, dtype=torch.float64, device="cpu")
        if error is None:
            packed[:, :size] = torch.stack([self._vector(theta) for part in parts for theta in part.theta])
            packed[:, size : size + width] = self._columns(parts, images)
        began = time.perf_counter()
        whole = self.world.interleave(packed, self.lanes.lanes)
        self._wait = time.perf_counter() - began
        self._steps += 1
        failed, stop, save, digest = whole[:, -len(flags) :].cpu().unbind(1)
        if bool(failed.any()):
            self.world.check(error)
        if bool((digest != digest[0]).any()):
            raise ProcessLost(
                "All processes of a training must have the same weights, but they differ; resume from the last "
                "checkpoint, on machines with the same processor and the same versions of the libraries."
            )
        self._agreed = bool(stop.any()), bool(save.any())
        return whole[:, :size].to(self.params[0].device), whole[:, size : size + width].cpu()

    def _digest(self) -> float:
        """48 bits of the weights' SHA-256 every `_COMPARE_EVERY` steps, otherwise 0."""
        if self._steps % _COMPARE_EVERY:
            return 0.0
        digest = hashlib.sha256(b"".join(p.detach().cpu().numpy().tobytes() for p in self.params))
        return float(int.from_bytes(digest.digest()[:6], "big"))
