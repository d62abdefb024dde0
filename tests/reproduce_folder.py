"""A made-up folder of `deepreg-fast reproduce`, for its report: numbers of the right shape and size, none measured."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deepreg_fast.data import ImageSet
from deepreg_fast.evaluation.compare import paired

POSTER = {"red": (25.63, 0.69), "gs": (25.98, 0.68), "beta1": (26.34, 0.71), "beta3": (27.42, 0.75)}
POSTER["beta10"] = (28.33, 0.79)

# suffix: label, group, method, beta, dB above TV, gradients, top of the trajectory above its end, parameters
PLAN: dict[str, tuple[str, str, str, float | None, float, int, float, int]] = {
    "adjoint": ("Aᵀy", "paper", "adjoint", None, -22.0, 0, 0.0, 0),
    "minimum-norm": ("minimum norm", "paper", "minimum_norm", None, -13.5, 0, 0.0, 0),
    "tv": ("TV, tuned", "paper", "tv", None, 0.0, 260, 0.0, 0),
    "red": ("RED", "paper", "denoiser", None, -2.6, 34, 1.1, 3057),
    "gs": ("gradient-step", "paper", "gradient_step", None, -1.9, 36, 0.2, 3057),
    "adversarial": ("adversarial input-convex", "paper", "adversarial", None, -1.2, 88, 0.0, 4210),
    "beta1": ("bi-level, β = 1", "paper", "bilevel", 1.0, -0.7, 60, 0.0, 3057),
    "beta3": ("bi-level, β = 3", "paper", "bilevel", 3.0, 0.35, 84, 0.0, 3057),
    "beta10": ("bi-level, β = 10", "paper", "bilevel", 10.0, 1.1, 138, 0.0, 3057),
    "none": ("bi-level, no penalty", "paper", "bilevel", 0.0, 1.2, 190, 0.0, 3057),
    "full": ("3×16, full-size images", "beyond", "bilevel", 10.0, 1.7, 140, 0.0, 2929),
    "wide": ("7×32, 5×5 filters", "beyond", "bilevel", 10.0, 2.8, 205, 0.0, 130145),
    "ridge": ("weakly convex ridge", "beyond", "bilevel", 0.0, 2.3, 120, 0.0, 13610),
    "fast": ("β = 10, Anderson", "beyond", "bilevel", 10.0, 1.1, 41, 0.0, 3057),
    "norm-image": ("LayerNorm over the image", "ledger", "bilevel", 10.0, 0.6, 150, 0.0, 3057),
    "cold": ("cold starts", "ledger", "bilevel", 10.0, 0.4, 140, 0.0, 3057),
}
LEDGER = {"norm-image": ("LayerNorm's axes", "norm", "image"), "cold": ("warm or cold start", "warm_start", False)}


def write(
    folder: Path,
    test: ImageSet,
    problem: Mapping[str, Any],
    ratios: tuple[float, ...] = (0.2, 0.5),
    names: Sequence[str] | None = None,
) -> None:
    """Fill the folder as a finished run would, with all rows or those of these suffixes; `problem` tells `data` and
    `split` of the test images."""
    rng = np.random.default_rng(0)
    problem = {
        "transform": "dct",
        "randomizer": "sign",
        "operator_seed": 0,
        "sigma": 0.0,
        "ratio": ratios[0],
        "test_crop": 0,
        "tuning": 12,
        **problem,
    }
    machine = {"cpu": "Example CPU", "cores": 2, "torch": "2.13.0", "device": "cpu"}
    rows = []
    plan = PLAN if names is None else {k: PLAN[k] for k in names}
    for ratio in ratios:
        level = 27.8 + 9.0 * (ratio - 0.2) / 0.3 + 3.0 * rng.standard_normal(len(test))
        for suffix in plan:
            if plan[suffix][1] == "ledger" and ratio != ratios[0]:
                continue
            rows.append(_row(folder, suffix, ratio, level, test, rng))
    tv = {r["ratio"]: np.array(r["psnr"]) for r in rows if r["method"] == "tv"}
    for row in rows:
        if row["method"] != "tv":
            row["vs_tv"] = paired(np.array(row["psnr"]), tv[row["ratio"]])
        row["machine"] = machine
        (folder / "rows" / row["name"] / "result.json").write_text(json.dumps(row))
    declared = [{k: r[k] for k in ("name", "label", "group", "method")} for r in rows]
    for row in declared:
        row["problem"] = {**problem, "ratio": next(r["ratio"] for r in rows if r["name"] == row["name"])}
        if row["name"].endswith("fast"):
            row["weights"] = row["name"].replace("fast", "beta10")
    (folder / "settings.json").write_text(json.dumps({"rows": declared}))
    results = {"rows": rows, "problem": problem, "machine": machine, "images": list(test.names)}
    (folder / "results.json").write_text(json.dumps(results))


def _row(
    folder: Path, suffix: str, ratio: float, level: np.ndarray, test: ImageSet, rng: np.random.Generator
) -> dict[str, Any]:
    label, group, method, beta, above, gradients, fall, parameters = PLAN[suffix]
    prefix = f"cs{round(1 / ratio)}"
    place = folder / "rows" / f"{prefix}-{suffix}"
    place.mkdir(parents=True)
    psnr = level + above * (1.0 + 0.25 * rng.standard_normal(len(level)))
    np.savez(place / "images.npz", x=_recovered(test, psnr, rng).astype(np.float16))
    taken = np.round(gradients * np.exp(0.25 * rng.standard_normal(len(level))))
    late = int((taken > 300).sum())
    direct = method in ("adjoint", "minimum_norm")
    trained = method not in ("adjoint", "minimum_norm", "tv") and suffix != "fast"
    poster = POSTER.get(suffix)
    unstated, setting, value = LEDGER.get(suffix, (None, None, None))
    ssim = np.clip(0.78 + (psnr - 28) / 60, 0, 0.99)
    return {
        "name": place.name,
        "label": label,
        "group": group,
        "method": method,
        "ratio": ratio,
        "beta": beta,
        "poster": {"psnr": poster[0], "ssim": poster[1]} if poster else None,
        "parameters": parameters,
        "mu": None if direct else 1.27e-3,
        "scale": None,
        "chosen": {"noise_level": 0.06} if suffix == "red" else None,
        "psnr_mean": float(psnr.mean()),
        "psnr_median": float(np.median(psnr)),
        "ssim_mean": float(ssim.mean()),
        "psnr": psnr.tolist(),
        "ssim": ssim.tolist(),
        "iterations": np.round(taken * 0.8).tolist(),
        "gradients": taken.tolist(),
        "status": {"converged": len(level) - late, "max_iterations": late},
        "seconds": 0.004 * gradients * len(level) + 0.01,
        "images": list(test.names),
        "vs_tv": None,
        "trajectory": None if direct else _trajectory(gradients, float(psnr.mean()), fall),
        "converged": None if direct else _converged(gradients, float(psnr.mean())),
        "lipschitz": _lipschitz(beta, len(level), rng) if trained or suffix == "fast" else None,
        "training": _training(suffix, beta, method, float(psnr.mean()), rng) if trained else None,
        "compare": f"{prefix}-beta10" if setting else None,
        "setting": setting,
        "value": value,
        "unstated": unstated,
        "recovery": {} if direct else {"acceleration": "anderson", "max_iterations": 500, "tolerance": 1e-4},
        "seeds": {"training": 0, "operator": 0},
        "machine": {},
        "version": "0.3.0",
        "command": f"deepreg-fast reproduce --row {place.name}",
    }


def _recovered(test: ImageSet, psnr: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The test images with errors along their edges of just the size that gives this PSNR."""
    x = test.x[:, 0].double().numpy()
    errors = np.stack([np.gradient(i, axis=0) + np.gradient(i, axis=1) for i in x])
    errors = errors * (1 + 0.5 * rng.standard_normal(x.shape)) + 0.01 * rng.standard_normal(x.shape)
    size = np.sqrt((errors**2).mean((1, 2), keepdims=True))
    return (x + errors / size * 10 ** (-psnr / 20)[:, None, None])[:, None]


def _trajectory(gradients: int, end: float, fall: float) -> dict[str, Any]:
    k = np.arange(51)
    pace = gradients / 14.0
    y = 11.0 + (end + fall - 11.0) * (1 - np.exp(-k / pace)) - fall * (1 - np.exp(-np.maximum(k - 8, 0) / 12.0))
    return {
        "iterations": k.tolist(),
        "psnr_mean": y.tolist(),
        "psnr_median": (y - 0.4).tolist(),
        "gradients_mean": (1.15 * k + 1).tolist(),
    }


def _converged(gradients: int, end: float) -> dict[str, Any]:
    k = np.unique(np.round(np.geomspace(1, 2.2 * gradients, 60)))
    return {"gradients": k.tolist(), "psnr_mean": (end - (end - 11.0) * np.exp(-k / (gradients / 7.0))).tolist()}


def _lipschitz(beta: float | None, count: int, rng: np.random.Generator) -> dict[str, Any]:
    held = beta or 16.0
    seen = held * (1.1 + 0.12 * rng.standard_normal(count))
    return {
        "beta_hat_train": held * 1.01,
        "beta_hat": seen.tolist(),
        "lambda_min": (-seen * 1.15).tolist(),
        "lambda_max": (1.0 + 0.09 * (held - 1) + 0.08 * rng.standard_normal(count)).tolist(),
    }


def _training(suffix: str, beta: float | None, method: str, end: float, rng: np.random.Generator) -> dict[str, Any]:
    step = np.arange(20, 12001, 20)
    loss = (4 + 60 * np.exp(-step / 700)) * np.exp(0.35 * rng.standard_normal(len(step)))
    val = end - 8 * np.exp(-step / 1500) + 0.1 * rng.standard_normal(len(step))
    bilevel = method == "bilevel"
    config = {
        "channels": 16,
        "depth": 3,
        "norm": "image" if suffix == "norm-image" else "pixel",
        "alpha": 0.0,
        "beta": beta,
        "steps": 12000,
        "batch": 8,
        "crop": 64,
        "lr": 2e-3,
        "seed": 0,
        "warm_start": suffix != "cold",
    }
    held = (beta or 16.0) * np.minimum(1.0, 0.1 + step / 6000)
    return {
        "seconds": 9120.0 * (1.4 if suffix in LEDGER else 1.0),
        "seconds_all": 27360.0 if suffix == "red" else 9120.0,
        "steps": 12000,
        "images_per_second": 10.5,
        "stages": [{"folder": "stage-1", "steps": 12000, "seconds": 9120.0, "config": config}],
        "curve": {
            "step": step.tolist(),
            "loss": loss.tolist(),
            "val_psnr": [float(v) if i % 10 == 9 else None for i, v in enumerate(val)],
            "beta_hat": (held * (1 + 0.04 * rng.standard_normal(len(step)))).tolist() if bilevel else None,
            "mu": (1.3e-3 + 8.7e-3 * np.exp(-step / 2500)).tolist() if bilevel else None,
        },
    }
