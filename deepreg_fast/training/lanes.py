"""Order of the samples, and the lanes that divide them among the processes of a training (docs/howto/processes.md).

Sample s is in lane `s mod lanes` forever, and a step takes equally many samples of each lane. So order, batches, noise
and warm starts do not depend on the number of processes, and each process keeps the rows of its own lanes only.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from ..errors import InputError


@dataclass(frozen=True)
class Rows:
    """Distinct samples `[B]`: their numbers, and their rows in the tables of this process, on the host and as an index
    on the device."""

    samples: np.ndarray
    local: np.ndarray
    index: torch.Tensor

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, part: slice) -> Rows:
        return Rows(self.samples[part], self.local[part], self.index[part])


@dataclass(frozen=True)
class Batch:
    """The samples of one step that this process computes, lane by lane.

    Attributes
    ----------
    rows : Rows `[B]`
    x : Tensor `[B, C, H, W]`
        Their images.
    positions : ndarray `[B]`
        Their places in the whole batch: random numbers of a step are drawn for the whole batch.
    total : int
        Number of images in the whole batch.
    lanes : tuple of slice
        The images of each lane.
    """

    rows: Rows
    x: torch.Tensor
    positions: np.ndarray
    total: int
    lanes: tuple[slice, ...]

    @property
    def per_lane(self) -> int:
        """Number of images in each lane."""
        return self.lanes[0].stop - self.lanes[0].start

    @property
    def pixels(self) -> int:
        """Number of values in the whole batch."""
        return self.total * self.x[0].numel()

    def split(self) -> list[Batch]:
        """A batch for each lane."""
        return [
            Batch(self.rows[s], self.x[s], self.positions[s], self.total, (slice(0, s.stop - s.start),))
            for s in self.lanes
        ]


class Lanes:
    """The lanes of process `rank` of `world`, and their samples at each step.

    Parameters
    ----------
    count : int
        Number of samples.
    batch : int
        Images per step, a multiple of `lanes`; at most `count` if there is one lane.
    lanes : int
    seed : int
    rank, world : int

    Raises
    ------
    InputError
        If a lane has too few samples for a step.
    """

    def __init__(self, count: int, batch: int, lanes: int, seed: int, rank: int = 0, world: int = 1) -> None:
        if lanes > 1 and count // lanes < batch // lanes:
            raise InputError(
                f"Each of the {lanes} lanes must have at least {batch // lanes} samples for a step, but there are "
                f"{count} samples; lower batch or lanes, or add images."
            )
        self.count, self.lanes, self.seed = count, lanes, seed
        self.per_lane = min(batch, count) // lanes if lanes == 1 else batch // lanes
        self.steps_per_epoch = max(1, count // lanes // self.per_lane)
        self.local_lanes = range(rank, lanes, world)

    @cached_property
    def owned(self) -> np.ndarray:
        """The samples of this process, in ascending order."""
        samples = np.arange(self.count)
        return samples[np.isin(samples % self.lanes, np.array(self.local_lanes))]

    def local(self, samples: np.ndarray) -> np.ndarray:
        """Rows of these samples in the tables of this process."""
        return samples if len(self.owned) == self.count else np.searchsorted(self.owned, samples)

    def samples(self, step: int) -> list[np.ndarray]:
        """The samples of step `step` in each lane of this process: a function of (seed, step, lane), so that a resumed
        run continues unchanged."""
        epoch, position = divmod(step, self.steps_per_epoch)
        return [self._order(epoch, lane)[position * self.per_lane :][: self.per_lane] for lane in self.local_lanes]

    def _order(self, epoch: int, lane: int) -> np.ndarray:
        key = [self.seed, 2, epoch, lane] if self.lanes > 1 else [self.seed, 2, epoch]
        size = len(range(lane, self.count, self.lanes))
        return lane + self.lanes * np.random.Generator(np.random.PCG64(key)).permutation(size)

    def positions(self, per_lane: int) -> np.ndarray:
        """Places of this process's images in a batch with `per_lane` images of each lane."""
        return np.concatenate([np.arange(per_lane) + lane * per_lane for lane in self.local_lanes])

    def epoch(self, step: int) -> float:
        """Number of epochs completed after `step` steps."""
        return step / self.steps_per_epoch
