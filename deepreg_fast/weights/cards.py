"""The shipped trained regularizers: weight files with a model card in the header.

`deepreg_fast.load("cs5-beta10")` loads one. `benchmarks/ship_weights.py` creates them from the rows of a reproduction.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import CheckpointError

FOLDER = Path(__file__).parent

FIELDS: dict[str, str] = {
    "name": "the name that loads it",
    "title": "one line for a list",
    "parameters": "trained numbers",
    "data": "what it was trained on: name, training images, test images",
    "split_sha256": "SHA-256 of the file of the split; its test part was never trained or tuned on",
    "operator": "kind, ratio, transform, randomizer, seed and sigma of the training",
    "mu": "weight of the regularizer, for that operator and noise",
    "lam": "the same per variance of larger noise, mu = max(mu, lam sigma^2), tuned on training images; or null",
    "settings": "settings of the training, one object for each stage",
    "recovery": "acceleration, tolerance and most gradients of the recoveries that the figures are of",
    "psnr": "dB on the test images: mean, median, vs_tv (paired difference with tuned TV, its 95 % interval, wins)",
    "ssim": "on the test images: mean, median",
    "lipschitz": "of grad s on the test images: beta_hat by ascent, extreme eigenvalues of hess s by Lanczos",
    "expectations": "measured on other images, operators, ratios, sizes and noise: one object for each",
    "command": "what trained and measured it",
    "commit": "of the sources that did",
    "version": "release that did",
    "licence": "of the numbers",
    "citation": "of the method",
}
"""The fields of a card and their meaning."""

EXPECTATION = ("what", "images", "size", "ratio", "operator_seed", "sigma", "mu", "psnr_mean", "tv_psnr_mean")
"""The fields of every entry of `expectations`: label, number of images, [H, W], the problem, the weight mu of the
recovery, and the mean PSNR in dB of the recovery and of tuned TV. An entry may have more fields."""


def names() -> tuple[str, ...]:
    """Sorted names of the shipped weights."""
    return tuple(sorted(p.stem for p in FOLDER.glob("*.safetensors")))


def find(name: str) -> Path | None:
    """The shipped weight file of this name, or None."""
    return FOLDER / f"{name}.safetensors" if name in names() else None


def card(name: str) -> dict[str, Any]:
    """The model card of shipped weights: `FIELDS`, as JSON values.

    Raises
    ------
    CheckpointError
        If no shipped weights have this name.
    """
    path = find(name)
    if path is None:
        raise CheckpointError(unknown(name))
    # The header is parsed here because safetensors would import torch.
    with path.open("rb") as f:
        header = json.loads(f.read(int.from_bytes(f.read(8), "little")))
    return json.loads(header["__metadata__"]["meta"])["card"]


def card_of(meta: dict[str, Any]) -> dict[str, Any]:
    """The model card in the `meta` of a weight file; empty if there is none."""
    candidate = meta.get("card")
    return candidate if isinstance(candidate, dict) and set(FIELDS) <= set(candidate) else {}


def unknown(name: str) -> str:
    """Error message for a name that is not among the shipped ones."""
    return (
        f"Weights must be a file or one of the shipped {', '.join(names())}, but {name!r} is neither; "
        "'deepreg-fast info' lists what is shipped."
    )
