"""Training: bi-level, and the baselines that it is compared with, on one loop."""

from __future__ import annotations

from .baselines import AdversarialTrainer, BaselineConfig, DenoiserTrainer, GradientStepTrainer
from .bilevel import BilevelTrainer
from .config import BilevelConfig, TrainConfig
from .loop import Trainer

__all__ = [
    "AdversarialTrainer",
    "BaselineConfig",
    "BilevelConfig",
    "BilevelTrainer",
    "DenoiserTrainer",
    "GradientStepTrainer",
    "TrainConfig",
    "Trainer",
]
