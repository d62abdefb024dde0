"""The priors of LearnedRegularizers on compressive sensing of BSD400 (benchmarks/results/peer_weights).

    python benchmarks/peer_weights.py --checkout LearnedRegularizers --prior WCRR --data BSD400 --out wcrr.json

The checkout is the user's (`git clone https://github.com/johertrich/LearnedRegularizers`); none of it is part of this
repository. Its weights were trained bi-level for denoising. The prior's gradient is first checked against differences
of its energy. Its weight mu is tuned on validation images, like TV's. `--scales` also tunes s in `r(s x)/s^2`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch

import deepreg_fast as dr
from deepreg_fast.bench.machine import describe
from deepreg_fast.data import ImageSet, carve_validation, center_crop, load_folder, load_split
from deepreg_fast.evaluation.compare import Method, evaluate, paired, run
from deepreg_fast.evaluation.metrics import psnr
from deepreg_fast.evaluation.tuning import tuned_tv
from deepreg_fast.files import write_atomically
from deepreg_fast.operators import SRM
from deepreg_fast.regularizers import Regularizer, Scaled
from deepreg_fast.solvers import ACCELERATIONS, PGDOptions

WEIGHTS = "weights/bilevel_Denoising/{}_bilevel_{}_for_Denoising.pt"
TRAINED = {"CRR": "IFT", "WCRR": "IFT", "TDV": "JFB"}
"""Prior -> the variant of their bi-level training."""
VALIDATION = 12
"""Number of validation images, the same images as in the trainings of benchmarks/results/bsd400_cs5."""


def load_prior(checkout: Path, name: str) -> Regularizer:
    """The prior with their weights, in float32."""
    weights = checkout / WEIGHTS.format(name, TRAINED[name])
    if not weights.is_file():
        sys.exit(f"--checkout must be a clone of LearnedRegularizers, but has no {weights.relative_to(checkout)}.")
    return dr.load_peer(weights, name)[0].requires_grad_(False)


def gradient_error(reg: Regularizer, x: torch.Tensor) -> float:
    """Largest relative difference between `<grad r(x), v>` and central differences of r, in float64, over three v: two
    random directions and the gradient's."""
    g = reg.value_and_grad(x)[1]
    generator = torch.Generator().manual_seed(0)
    directions = [torch.randn(x.shape, generator=generator, dtype=x.dtype) for _ in range(2)] + [g]
    worst = 0.0
    for v in directions:
        v = v / v.norm()
        ahead, behind = reg.energy(x + 1e-5 * v), reg.energy(x - 1e-5 * v)
        measured, claimed = float((ahead - behind).sum()) / 2e-5, float((g * v).sum())
        worst = max(worst, abs(measured - claimed) / abs(claimed))
    return worst


def checked_prior(checkout: Path, name: str, x: torch.Tensor) -> tuple[Regularizer, float]:
    """The prior and the error of its gradient at an image `x`. Exits if the error exceeds 1e-4."""
    prior = load_prior(checkout, name).double()
    noisy = x.double() + 0.05 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    error = gradient_error(prior, noisy)
    if not error < 1e-4:
        sys.exit(f"The gradient of {name} must be that of its energy, but differs from differences by {error:.1e}.")
    return prior.float(), error


def tuned(name: str, prior: Regularizer, options: argparse.Namespace, x: torch.Tensor) -> tuple[Method, float]:
    """The method with the mu and s that give the best mean PSNR on the images `x`, and that PSNR."""
    A = SRM((1, *x.shape[-2:]), 0.2)
    y = A.A(x)
    solver = PGDOptions(options.max_iterations, 1e-4, options.acceleration)
    scored: list[tuple[float, Method]] = []
    for scale, mu in itertools.product(options.scales, options.mus):
        method = Method(name.lower(), prior.rescaled(scale), mu, solver)
        score = float(psnr(run(method, y, A).x, x).mean())  # type: ignore[union-attr]
        print(f"{name}: s = {scale:g}, mu = {mu:g}: {score:.3f} dB on the validation images", flush=True)
        scored.append((score, method))
    score, best = max(scored, key=lambda pair: pair[0])
    return best, score


def images(options: argparse.Namespace) -> tuple[ImageSet, torch.Tensor]:
    """The full test images, every fifth of them first, so that early results cover all kinds; and crops of the first
    `--tune-on` validation images."""
    split = load_split("bsd400")
    validation = carve_validation(split.train, VALIDATION, 0)[1][: options.tune_on]
    order = [name for k in range(5) for name in split.test[k::5]][: options.limit]
    return load_folder(options.data, names=order), center_crop(load_folder(options.data, names=validation).x, 96)


def timed(method: Method, x: torch.Tensor, A: SRM) -> dict[str, Any]:
    """Results of `evaluate`, with `cpu_seconds`, the process's CPU time, which is independent of the machine's load."""
    began = time.process_time()
    results = evaluate([method], x, A.A(x), A)
    results[method.name]["cpu_seconds"] = time.process_time() - began
    return results


def joined(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Combine results of `evaluate` on parts of the images."""
    results: dict[str, Any] = {}
    for name in parts[0]:
        rows = [p[name] for p in parts]
        figures = {k: [v for r in rows for v in r[k]] for k in ("psnr", "ssim", "iterations", "gradients")}
        status = sum((Counter(r["status"]) for r in rows), Counter())
        results[name] = {
            "psnr_mean": float(np.mean(figures["psnr"])),
            "psnr_median": float(np.median(figures["psnr"])),
            "ssim_mean": float(np.mean(figures["ssim"])),
            **figures,
            "status": dict(status),
            "mu": rows[0]["mu"],
            "seconds": sum(r["seconds"] for r in rows),
            "cpu_seconds": sum(r["cpu_seconds"] for r in rows),
        }
        results[name]["seconds_per_image"] = results[name]["cpu_seconds"] / len(figures["psnr"])
        if name != "tv":
            results[name]["vs_tv"] = paired(np.array(figures["psnr"]), np.array(results["tv"]["psnr"]))
    return results


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkout", type=Path, required=True, help="clone of johertrich/LearnedRegularizers")
    parser.add_argument("--prior", choices=[*TRAINED], default="WCRR")
    parser.add_argument("--data", type=Path, required=True, help="folder of BSD400")
    parser.add_argument("--out", type=Path, required=True, help="JSON file, written anew after every two images")
    parser.add_argument("--limit", type=int, default=30, help="test images, every fifth of the 30 first")
    parser.add_argument("--tune-on", type=int, default=VALIDATION, help="validation images, cropped to 96 x 96")
    parser.add_argument("--mus", type=float, nargs="+", default=[1e-4, 1e-3, 1e-2, 1e-1], help="weights to try")
    parser.add_argument("--scales", type=float, nargs="+", default=[1.0], help="values of s in r(s x)/s^2 to try")
    parser.add_argument("--acceleration", choices=[*ACCELERATIONS], default="fista")
    parser.add_argument("--max-iterations", type=int, default=500, help="gradients per image")
    return parser.parse_args()


def main() -> None:
    """Tune, recover, and write one JSON file like `deepreg-fast evaluate`'s."""
    options = arguments()
    torch.set_num_threads(1)
    test, tuning = images(options)
    prior, error = checked_prior(options.checkout, options.prior, tuning[:1, :, :48, :48])
    method, score = tuned(options.prior, prior, options, tuning)
    A_tuning, A = SRM((1, *tuning.shape[-2:]), 0.2), SRM((1, *test.x.shape[-2:]), 0.2)
    tv = tuned_tv(tuning, A_tuning.A(tuning), A_tuning)
    details = {
        "scale": method.reg.scale if isinstance(method.reg, Scaled) else 1.0,
        "validation_psnr": score,
        "gradient_error": error,
        "parameters": sum(p.numel() for p in prior.parameters()),
        "weights": WEIGHTS.format(options.prior, TRAINED[options.prior]),
    }
    settings = {k: v for k, v in vars(options).items() if k not in ("checkout", "data", "out")}
    parts = []
    for i in range(0, len(test), 2):
        x = test.x[i : i + 2]
        parts.append({**timed(tv, x, A), **timed(method, x, A)})
        result = joined(parts)
        result[method.name] |= details
        done = list(test.names[: i + 2])
        result["settings"] = {**settings, "images": done, "operator": A.describe()}
        result["machine"] = describe(options.checkout)
        write_atomically(options.out, (json.dumps(result, indent=1) + "\n").encode())
        print(told(method.name, result[method.name]), flush=True)


def told(name: str, f: dict[str, Any]) -> str:
    """The results so far as one line of text."""
    vs_tv = f["vs_tv"]
    return (
        f"{name}, {vs_tv['images']} images: {f['psnr_mean']:.2f} dB, {vs_tv['mean']:+.2f} dB against TV, "
        f"{vs_tv['wins']} wins, {f['status']}, {f['seconds_per_image']:.1f} s of CPU per image"
    )


if __name__ == "__main__":
    main()
