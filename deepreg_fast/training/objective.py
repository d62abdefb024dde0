"""What a training minimizes: the part of a training that differs between methods."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

import numpy as np
import torch

from ..regularizers.base import Regularizer
from .checkpoint import Array, Shard
from .config import TrainConfig
from .lanes import Batch

if TYPE_CHECKING:
    from .trainer import Trainer

C = TypeVar("C", bound=TrainConfig)
Stats = Mapping[str, torch.Tensor]
"""Statistics of a step, in float64 on the host: `[images]`, or `[lanes]` for those of `Objective.lane_columns`."""


@dataclass
class LaneGradients:
    """Gradients of a loss in theta, one for each lane, and statistics.

    Attributes
    ----------
    theta : list of dict of Tensor
        For each lane, by parameter name.
    stats : dict of Tensor `[lanes]` or `[images]`
        The columns that the objective names, in float64 on the host.
    """

    theta: list[dict[str, torch.Tensor]]
    stats: dict[str, torch.Tensor]


class Objective(ABC, Generic[C]):
    """A training's loss: builds the regularizer, computes gradients lane by lane, and scores validation images.

    The loss of a step is a sum over the images of the whole batch, of which a process has some lanes. `gradients`
    therefore normalizes by `batch.total`, and its values for one lane depend on no other lane. `observe` receives the
    statistics of the whole batch, the same in every process.
    """

    method: ClassVar[str]
    lane_columns: tuple[str, ...] = ()
    image_columns: tuple[str, ...] = ()

    def __init__(self, config: C) -> None:
        self.config = config

    @abstractmethod
    def build(self) -> Regularizer:
        """Build the regularizer to be trained."""

    def attach(self, run: Trainer) -> None:
        """Receive the training, whose samples, operator and regularizer exist now."""
        self.run = run

    def groups(self, params: list[torch.nn.Parameter]) -> list[dict[str, Any]]:
        """Adam's parameter groups, each with its largest learning rate as `peak`."""
        return [{"params": params, "lr": self.config.lr, "peak": self.config.lr}]

    def begin(self) -> None:
        """Prepare files. The run's folder is locked."""

    @abstractmethod
    def gradients(self, batch: Batch) -> LaneGradients:
        """The gradient of each lane of a batch."""

    @abstractmethod
    def observe(self, stats: Stats) -> dict[str, Any]:
        """Update schedules and guards from the statistics of the whole batch. Returns the logged metrics, with a
        `loss`."""

    def after_update(self) -> None:
        """Constrain the parameters after Adam's step."""

    @abstractmethod
    def validate(self) -> dict[str, Any]:
        """Score the validation images. Returns the logged metrics, with a `val_score`: larger is better."""

    def state(self) -> tuple[Mapping[str, Array], Mapping[str, Shard], dict[str, Any]]:
        """What the checkpoint must hold: tensors, per-sample arrays, JSON values."""
        return {}, {}, {}

    def load_state(self, tensors: dict[str, np.ndarray], state: dict[str, Any]) -> None:
        """Restore what `state` returned."""
