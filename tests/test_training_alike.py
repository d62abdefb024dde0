"""A whole training ends alike on either backend."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import deepreg_fast as dr
from deepreg_fast.data import embedded_images

from .helpers import log_lines


@pytest.fixture(name="crops")
def _crops(tmp_path: Path) -> Path:
    """16 natural crops of 24 x 24."""
    folder = tmp_path / "crops"
    folder.mkdir()
    images = embedded_images(96).train.x
    for k, i in enumerate(np.linspace(0, len(images) - 1, 16).round().astype(int)):
        Image.fromarray((255.0 * images[i, 0, 36:60, 36:60].numpy()).round().astype(np.uint8)).save(
            folder / f"{k:02d}.png"
        )
    return folder


@pytest.mark.parametrize(
    ("steps", "look", "warmup"), [(100, 25, 20), pytest.param(140, 35, 50, marks=pytest.mark.long)]
)
def test_a_whole_training_ends_alike_on_either_backend(
    crops: Path, tmp_path: Path, steps: int, look: int, warmup: int
) -> None:
    """From one seed, until the learning rate is 0: the validation PSNR within 0.05 dB at every look.

    Where r is not convex, a recovery that runs away or ends at another minimum turns rounding into a gap of percents
    (benchmarks/results/alike), so beta is held below 1 and every image is in every step. Then nothing amplifies: the
    losses stay together too, to ten times the tolerance of the solves, which 0.05 dB alone would not see.
    """
    if (missing := dr.backends()["cpu"]) is not None:
        pytest.skip(missing)
    lines: dict[str, list[dict[str, float]]] = {}
    for name in ("cpu", "reference"):
        c = dr.BilevelConfig(
            data=str(crops),
            out=str(tmp_path / name),
            crop=24,
            channels=8,
            validation=8,
            validation_crop=24,
            validate_every=look,
            augment=False,
            batch=8,
            steps=steps,
            warmup=warmup,
            lr=5e-4,
            final_lr=0.0,
            beta=0.9,
            xi=10.0,
            delta_steps=3,
            inner_iterations=100,
            tolerance_start=1e-4,
            tolerance_end=1e-4,
            adjoint_iterations=50,
            adjoint_tolerance=1e-3,
            threads=1,
        )
        with dr.use_backend(name):
            dr.BilevelTrainer(c, progress=False).fit()
        lines[name] = log_lines(tmp_path / name)
    score = {k: [d["val_psnr"] for d in v if "val_psnr" in d] for k, v in lines.items()}
    loss = {k: [d["mse_loss"] for d in v if "mse_loss" in d] for k, v in lines.items()}
    assert len(score["cpu"]) == 4 and len(loss["cpu"]) == steps
    assert score["reference"][-1] > score["reference"][0] + 1.0 and loss["reference"][-1] < 0.5 * loss["reference"][0]
    np.testing.assert_allclose(score["cpu"], score["reference"], rtol=0, atol=0.05)
    np.testing.assert_allclose(loss["cpu"], loss["reference"], rtol=1e-3)
