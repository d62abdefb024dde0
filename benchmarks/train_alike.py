"""Compare trainings on the reference backend and on the cpu backend (benchmarks/results/alike).

    python benchmarks/train_alike.py --out alike.json --setting convex --seeds 5

For every seed there is one training on each backend, and as a control a third on the reference with a relative change
of the initial weights by 1e-7. If the backends differ no more than the control does, rounding explains the difference
and no gradient is wrong. The images are small crops of scikit-image's photographs.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import deepreg_fast as dr
from deepreg_fast.data import embedded_images
from deepreg_fast.training.guards import Counters

SIDE = 24
SMALL: dict[str, Any] = {"crop": SIDE, "channels": 8, "validation": 8, "validation_crop": SIDE, "threads": 1}
TIGHT: dict[str, Any] = {
    **{"tolerance_start": 1e-4, "tolerance_end": 1e-4, "inner_iterations": 100},
    **{"adjoint_tolerance": 1e-3, "adjoint_iterations": 50},
}
WHOLE: dict[str, Any] = {"augment": False, "batch": 8, "lr": 5e-4, "final_lr": 0.0, "warmup": 50}
CONVEX: dict[str, Any] = {"beta": 0.9, "xi": 10.0, "delta_steps": 3}
# "convex" is the recipe; the others omit one part of it, or all.
SETTINGS: dict[str, dict[str, Any]] = {
    "convex": {"steps": 140, "validate_every": 35, **WHOLE, **TIGHT, **CONVEX},
    "convex-loose": {"steps": 140, "validate_every": 35, **WHOLE, **CONVEX},
    "convex-minibatch": {"steps": 140, "validate_every": 35, **WHOLE, **TIGHT, **CONVEX, "augment": True},
    "nonconvex": {"steps": 140, "validate_every": 35, **WHOLE, **TIGHT},
    "default": {"steps": 300, "validate_every": 75},
}


def natural_crops(folder: Path, count: int) -> None:
    """Write center crops of `count` evenly spaced embedded training images to `folder`."""
    images = embedded_images(96).train.x
    top = (images.shape[-1] - SIDE) // 2
    for k, i in enumerate(np.linspace(0, len(images) - 1, count).round().astype(int)):
        crop = images[i, 0, top : top + SIDE, top : top + SIDE].numpy()
        Image.fromarray((255.0 * crop).round().astype(np.uint8)).save(folder / f"{k:02d}.png")


def train(backend: str, setting: dict[str, Any], moved: float = 0.0) -> dict[str, Any]:
    """Losses, validation scores and guards of one training; `moved` is the relative change of the initial weights."""
    with tempfile.TemporaryDirectory() as out:
        trainer = dr.BilevelTrainer(dr.BilevelConfig(out=out, **setting), progress=False)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for p in trainer.params:
                p.mul_(1.0 + moved * torch.randn(p.shape, generator=generator))
        with dr.use_backend(backend):
            trainer.fit()
        lines = [json.loads(t) for t in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    steps = [d for d in lines if "mse_loss" in d]
    return {
        "loss": [d["mse_loss"] for d in steps],
        "val_psnr": {str(d["step"]): d["val_psnr"] for d in lines if "val_psnr" in d},
        "guards": {name: steps[-1][name] for name in Counters.NAMES},
    }


def gaps(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    """Differences of `b` from `a`: in dB at the validations, and relative in the losses."""
    loss = np.abs(np.array(b["loss"]) / np.array(a["loss"]) - 1.0)
    decibel = {k: b["val_psnr"][k] - v for k, v in a["val_psnr"].items()}
    return {
        "end_db": list(decibel.values())[-1],
        "largest_db": max(map(abs, decibel.values())),
        "first_20_losses": float(loss[:20].max()),
        "all_losses": float(loss.max()),
        "first_step_above_1e-4": int(np.argmax(loss > 1e-4)) if (loss > 1e-4).any() else None,
    }


def compare(name: str, seeds: int, images: int) -> dict[str, Any]:
    """Run all trainings of one setting."""
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        natural_crops(Path(folder), images)
        for seed in range(seeds):
            setting = {**SMALL, **SETTINGS[name], "data": folder, "seed": seed}
            reference = train("reference", setting)
            cpu = train("cpu", setting)
            control = train("reference", setting, 1e-7)
            run = {
                "seed": seed,
                "cpu": gaps(reference, cpu),
                "control": gaps(reference, control),
                "val_psnr": reference["val_psnr"],
                "guards": reference["guards"],
            }
            print(json.dumps(run), flush=True)
            runs.append(run)
    return {
        "setting": {**SMALL, **SETTINGS[name]},
        "images": images,
        "largest_end_db": {k: max(abs(r[k]["end_db"]) for r in runs) for k in ("cpu", "control")},
        "runs": runs,
    }


def main() -> None:
    """Run one setting and add its results to the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("alike.json"), help="JSON file; other settings in it are kept")
    parser.add_argument("--setting", choices=[*SETTINGS], default="convex")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--images", type=int, default=16, help="crops in all; 8 of them validate")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = json.loads(options.out.read_text()) if options.out.exists() else {}
    results["machine"] = {
        "machine": platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    results[options.setting] = compare(options.setting, options.seeds, options.images)
    print(options.setting, results[options.setting]["largest_end_db"])
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
