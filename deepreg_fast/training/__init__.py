"""Bi-level training and the baselines, on a shared training loop.

Names are imported on first use, so the settings do not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

_HOME = {
    "AdversarialTrainer": "baselines",
    "BaselineConfig": "config",
    "BilevelConfig": "config",
    "BilevelTrainer": "bilevel",
    "DenoiserTrainer": "baselines",
    "GradientStepTrainer": "baselines",
    "Objective": "objective",
    "TrainConfig": "config",
    "Trainer": "trainer",
}

__all__ = [  # pyright: ignore[reportUnsupportedDunderAll]
    "AdversarialTrainer",
    "BaselineConfig",
    "BilevelConfig",
    "BilevelTrainer",
    "DenoiserTrainer",
    "GradientStepTrainer",
    "Objective",
    "TrainConfig",
    "Trainer",
]

if TYPE_CHECKING:
    from .baselines import AdversarialTrainer, DenoiserTrainer, GradientStepTrainer
    from .bilevel import BilevelTrainer
    from .config import BaselineConfig, BilevelConfig, TrainConfig
    from .objective import Objective
    from .trainer import Trainer


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value
