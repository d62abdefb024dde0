"""`deepreg-fast info NAME`: the model card of shipped weights, as text or as JSON."""

from __future__ import annotations

import json
import sys
from typing import Any

from ..terminal import facts, table, width
from ..weights import cards


def show(name: str, as_json: bool) -> None:
    """Print the model card of shipped weights."""
    card = cards.card(name)
    if as_json:
        print(json.dumps(card))
        return
    columns = width(sys.stdout)
    print(f"{card['name']}: {card['title']}")
    print(facts(_facts(card).items(), columns))
    print(_expectations(card["expectations"], columns))


def _facts(card: dict[str, Any]) -> dict[str, str]:
    data, psnr, ssim, lip, stages = (card[k] for k in ("data", "psnr", "ssim", "lipschitz", "settings"))
    tv = psnr["vs_tv"]
    noise = "" if card["lam"] is None else f", with noise lam sigma^2 if that is larger, lam = {card['lam']:g}"
    return {
        "parameters": str(card["parameters"]),
        "weight": f"mu = {card['mu']:.3g}{noise}",
        "trained on": f"{data['images']} images of {data['name']}; its {data['test_images']} test images never seen",
        "split": f"SHA-256 {card['split_sha256']}",
        "operator": _pairs(card["operator"]),
        "PSNR": f"mean {psnr['mean']:.2f} dB, median {psnr['median']:.2f} dB",
        "against TV": (
            f"{tv['mean']:+.2f} dB in [{tv['interval'][0]:+.2f}, {tv['interval'][1]:+.2f}] (95 %), median "
            f"{tv['median']:+.2f} dB, wins {tv['wins']} of {tv['images']}"
        ),
        "SSIM": f"mean {ssim['mean']:.3f}, median {ssim['median']:.3f}",
        "Lip(grad s)": (
            f"by ascent {lip['beta_hat']['mean']:.2f} in the mean, {lip['beta_hat']['max']:.2f} at most; by Lanczos "
            f"eigenvalues in [{lip['lambda_min']:.2f}, {lip['lambda_max']:.2f}], on {lip['images']} test images"
        ),
        "recovery": _pairs(card["recovery"]),
        **{f"stage {k} of {len(stages)}": _pairs(s) for k, s in enumerate(stages, 1)},
        **{k: card[k] for k in ("command", "commit", "version", "licence", "citation")},
    }


def _pairs(values: dict[str, Any]) -> str:
    return ", ".join(f"{k} {v}" for k, v in values.items())


def _expectations(rows: list[dict[str, Any]], columns: int | None) -> str:
    head = ("on", "images", "size", "ratio", "seed", "sigma", "mu", "PSNR", "TV")
    lines = [
        (
            r["what"],
            str(r["images"]),
            " × ".join(map(str, r["size"])),
            *(f"{r[k]:g}" for k in ("ratio", "operator_seed", "sigma")),
            f"{r['mu']:.2g}",
            *(f"{r[k]:.2f}" for k in ("psnr_mean", "tv_psnr_mean")),
        )
        for r in rows
    ]
    return table(head, lines, "Measured elsewhere: mean PSNR in dB, beside tuned TV", columns)
