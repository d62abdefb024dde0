"""Add the weights of a reproduction's row to the package, with a model card.

    python benchmarks/ship_weights.py reproduction/rows/cs5-beta10 --title "bi-level, 3 x 16, beta = 10"

The row's folder contains `weights.safetensors` and `result.json`. The entries of `generalization.json`, there or at
`--generalization`, become the card's `expectations`. The fields are those of `deepreg_fast.weights.cards`. Paths are
reduced to their last part.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import numpy as np

import deepreg_fast as dr
from deepreg_fast.data import load_split, split_sha256
from deepreg_fast.errors import InputError
from deepreg_fast.weights import cards

LICENCE = "MIT; trained on images of the Berkeley Segmentation Dataset, which are for research use"
CITATION = "Nair & Schniter, Deep Regularization via Bi-Level Optimization (Asilomar 2022); trained by deepreg-fast"
# Settings that contain a path on the machine of the training.
PLACES = ("out", "data", "split", "init")


def ship(row: Path, name: str, title: str, lam: float | None = None, generalization: Path | None = None) -> Path:
    """Write the shipped file of a row; return its path.

    Raises
    ------
    InputError
        If a file is missing or lacks a field, the name is invalid, or the row's regularizer was rescaled.
    """
    if re.fullmatch(r"[a-z0-9-]+", name) is None:
        raise InputError(f"A name must be made of a-z, 0-9 and '-', but is {name!r}.")
    result = _read(row / "result.json")
    expectations = _read(generalization or row / "generalization.json")
    reg, meta = dr.load(row / "weights.safetensors")
    if result.get("scale") not in (None, 1.0):
        raise InputError(
            f"{row} must hold weights to be used as they are, but its figures are of the scale {result['scale']}; "
            "ship the row that was rescaled."
        )
    try:
        card = _card(result, sum(p.numel() for p in reg.parameters()))
    except KeyError as error:
        raise InputError(f"{row / 'result.json'} must tell {error}, but does not; evaluate the row again.") from error
    card |= {"name": name, "title": title, "lam": lam, "expectations": _expectations(expectations)}
    card = {k: without_folders(card[k]) for k in cards.FIELDS}
    path = cards.FOLDER / f"{name}.safetensors"
    dr.save(reg, path, {"method": meta["method"], "mu": card["mu"], "step": meta["step"], "card": card})
    return path


def _card(result: dict[str, Any], parameters: int) -> dict[str, Any]:
    """The fields that come from a row's result."""
    stages = [_settings(s["config"]) for s in result["training"]["stages"]]
    last, raw = stages[-1], result["training"]["stages"][-1]["config"]
    split = load_split(raw["split"])
    return {
        "parameters": parameters,
        "data": {
            "name": Path(result["problem"]["data"]).name,
            "images": len(split.train),
            "test_images": len(split.test),
        },
        "split_sha256": split_sha256(raw["split"]),
        "operator": {
            "kind": "srm",
            **{k: last[k] for k in ("ratio", "transform", "randomizer")},
            "seed": last["operator_seed"],
            "sigma": last["sigma"],
        },
        "mu": result["mu"],
        "settings": stages,
        "recovery": result["recovery"],
        "psnr": {
            "mean": round(result["psnr_mean"], 4),
            "median": round(result["psnr_median"], 4),
            "vs_tv": _rounded(result["vs_tv"]),
        },
        "ssim": {"mean": round(result["ssim_mean"], 4), "median": round(float(np.median(result["ssim"])), 4)},
        "lipschitz": _lipschitz(result["lipschitz"]),
        "command": result["command"],
        "commit": result.get("commit") or _commit(),
        "version": result["version"],
        "licence": LICENCE,
        "citation": CITATION,
    }


def _settings(config: dict[str, Any]) -> dict[str, Any]:
    return {k: Path(v).name if k in PLACES else v for k, v in config.items()}


def _lipschitz(found: dict[str, Any]) -> dict[str, Any]:
    beta = found["beta_hat"]
    return _rounded(
        {
            "beta_hat_train": found["beta_hat_train"],
            "beta_hat": {"mean": float(np.mean(beta)), "max": max(beta)},
            "lambda_min": min(found["lambda_min"]),
            "lambda_max": max(found["lambda_max"]),
            "images": len(beta),
        }
    )


def _expectations(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    for row in rows:
        missing = [k for k in cards.EXPECTATION if k not in row]
        if missing:
            raise InputError(f"Every entry of generalization.json must tell {missing}, but {row} does not.")
    return [_rounded(r) for r in rows]


def _rounded(value: Any) -> Any:
    """The value with every float rounded to four decimals, or to four significant digits below 1."""
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_rounded(v) for v in value]
    if isinstance(value, float):
        return float(f"{value:.4g}") if abs(value) < 1 else round(value, 4)
    return value


def without_folders(value: Any) -> Any:
    """The value with every absolute path in its strings reduced to its last part."""
    if isinstance(value, dict):
        return {k: without_folders(v) for k, v in value.items()}
    if isinstance(value, list):
        return [without_folders(v) for v in value]
    if isinstance(value, str):
        return re.sub(r"(?<![\w./:])(?:[A-Za-z]:\\|~?/)(?:[\w.@+-]+[/\\])*([\w.@+-]+)", r"\1", value)
    return value


def _commit() -> str:
    """The commit of the sources."""
    done = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} must be a JSON file, but cannot be read ({error}).") from error


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("row", type=Path, help="the row's folder")
    parser.add_argument("--name", help="the name that loads the weights; the folder's by default")
    parser.add_argument("--title", required=True, help="one line for the list")
    parser.add_argument("--lam", type=float, help="weight per variance of noise, tuned on training images")
    parser.add_argument("--generalization", type=Path, help="generalization.json, where it is not in the folder")
    given = parser.parse_args()
    print(ship(given.row, given.name or given.row.name, given.title, given.lam, given.generalization))
