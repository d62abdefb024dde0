"""Generalization of trained regularizers to unseen problems (benchmarks/results/generalize).

    python benchmarks/generalize.py --weights bilevel.safetensors --data BSD400 --out generalize.json

The cases vary images and sizes, seeds of the operator, ratios, transforms, randomizers, and noise. Each changes one
part of the training's problem. The weights keep their trained mu; with noise they are also run with the mu of the
library's rule (`default_mu`, as in `recover` and `evaluate`) and with a tuned mu. TV is tuned in each case. All tuning
uses crops of BSD400's validation images, and all results are on other images. The output has one row for each weight
file, case and mu: what, images, size, ratio, operator_seed, transform, randomizer, sigma, mu, how mu was chosen, PSNR
and SSIM, those of TV and the minimum-norm solution, the worst difference to TV, and the number of converged images.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch

import deepreg_fast as dr
from deepreg_fast.bench.machine import describe
from deepreg_fast.cli.options import default_mu
from deepreg_fast.data import carve_validation, center_crop, load_folder, load_image, load_split
from deepreg_fast.evaluation.compare import Method, evaluate
from deepreg_fast.evaluation.tuning import tune_mu, tuned_tv
from deepreg_fast.files import write_atomically
from deepreg_fast.inverse.data_term import add_noise

PHOTOGRAPHS = ("astronaut.png", "camera.png", "coffee.png", "rocket.jpg", "motorcycle_left.png", "moon.png")
"""Photographs of scikit-image with at least 321 x 481 pixels in one of the two orientations."""
SIZES = ((96, 96), (128, 160), (180, 180), (256, 256), (321, 481))
NOISES = (5, 10, 25)
"""Standard deviations in 1/255."""
VALIDATION = 12
ACCELERATION = "fista"
"""FISTA, because it converges in cases where Anderson acceleration does not: at ratio 0.1 and with noise."""


@dataclass(frozen=True)
class Case:
    """One problem: `what` differs from the training's problem, the images, the operator and the noise."""

    what: str
    images: str = "bsd400"
    size: tuple[int, int] = (180, 180)
    ratio: float = 0.2
    operator_seed: int = 0
    transform: str = "dct"
    randomizer: str = "sign"
    sigma: float = 0.0

    def operator(self, size: tuple[int, int]) -> dr.SRM:
        """The case's operator for images of size `size`."""
        options = {"transform": self.transform, "randomizer": self.randomizer, "seed": self.operator_seed}
        return dr.SRM((1, *size), self.ratio, **options)  # type: ignore[arg-type]


def cases() -> Iterator[Case]:
    """All cases, with the training's problem first."""
    base = Case("as trained")
    yield base
    for ratio in (0.1, 0.3, 0.4, 0.5):
        yield replace(base, what="ratio", ratio=ratio)
    for seed in (1, 2, 3):
        yield replace(base, what="operator seed", operator_seed=seed)
    for transform in ("hadamard", "walsh"):
        yield replace(base, what="transform", transform=transform)
    for randomizer in ("permutation", "both"):
        yield replace(base, what="randomizer", randomizer=randomizer)
    for noise in NOISES:
        yield replace(base, what="noise", sigma=noise / 255)
    yield replace(base, what="noise, ratio", sigma=10 / 255, ratio=0.5)
    for size in SIZES:
        yield replace(base, what="photographs", images="scikit-image", size=size)


def photographs(size: tuple[int, int], count: int) -> torch.Tensor:
    """Center crops of scikit-image's photographs, halved by averaging 2 x 2 pixels if they are large enough."""
    crops = []
    for name in PHOTOGRAPHS[:count]:
        image = load_image(Path(str(files("skimage"))) / "data" / name)
        if image.shape[-2] // 2 >= size[0] and image.shape[-1] // 2 >= size[1]:
            image = torch.nn.functional.avg_pool2d(image[None], 2)[0]
        crops.append(center_crop(image, size))
    return torch.stack(crops)


class Images:
    """The images of the cases, and the validation crops."""

    def __init__(self, folder: Path, count: int, tune_on: int) -> None:
        split = load_split("bsd400")
        self.count = count
        self.test = load_folder(folder, names=split.test[:: -(-len(split.test) // count)]).x
        validation = carve_validation(split.train, VALIDATION, 0)[1][:: -(-VALIDATION // tune_on)]
        self.validation = center_crop(load_folder(folder, names=validation).x, 96)

    def of(self, case: Case) -> torch.Tensor:
        """The case's images `[N, 1, H, W]`."""
        return self.test if case.images == "bsd400" else photographs(case.size, self.count)


def methods(name: str, path: str, case: Case, y: torch.Tensor, x: torch.Tensor, A: dr.SRM) -> list[Method]:
    """The weights with each mu of the case; the name says how mu was chosen. `x` are validation images."""
    reg, meta = dr.load(path)
    trained = Method(f"{name} trained", reg, float(meta["mu"]), dr.PGDOptions(500, 1e-4, ACCELERATION))
    if case.sigma == 0:
        return [trained]
    by_rule = replace(trained, name=f"{name} rule", mu=default_mu(meta, case.sigma))
    tuned = tune_mu(replace(trained, name=f"{name} tuned"), x, y, A, 1e-3, 10.0)
    return [trained, by_rule, tuned]


def run_case(case: Case, weights: dict[str, str], images: Images) -> list[dict[str, Any]]:
    """The rows of one case."""
    x, tuning = images.of(case), images.validation
    A, A_tuning = case.operator(case.size), case.operator((tuning.shape[-2], tuning.shape[-1]))
    y = add_noise(A.A(x), case.sigma, seed=1)
    y_tuning = add_noise(A_tuning.A(tuning), case.sigma, seed=2)
    ours = [m for n, path in weights.items() for m in methods(n, path, case, y_tuning, tuning, A_tuning)]
    result = evaluate([Method("minimum_norm"), tuned_tv(tuning, y_tuning, A_tuning), *ours], x, y, A)
    tv = result["tv"]
    rows = []
    for method in ours:
        name, _, how = method.name.rpartition(" ")
        f = result[method.name]
        rows.append(
            {
                **asdict(case),
                "weights": name,
                "mu": method.mu,
                "mu_from": how,
                "tuned": how == "tuned",
                **{k: f[k] for k in ("psnr_mean", "psnr_median", "ssim_mean")},
                "tv_psnr_mean": tv["psnr_mean"],
                "tv_ssim_mean": tv["ssim_mean"],
                "tv_mu": tv["mu"],
                "minimum_norm_psnr_mean": result["minimum_norm"]["psnr_mean"],
                "vs_tv_worst": float(np.min(np.array(f["psnr"]) - np.array(tv["psnr"]))),
                "converged": f["status"].get("converged", 0),
                "gradients_mean": float(np.mean(f["gradients"])),
                "count": len(x),
            }
        )
    return rows


def told(row: dict[str, Any]) -> str:
    """A row as one line of text."""
    kind = f"{row['size'][0]}x{row['size'][1]} {row['ratio']:g} {row['transform']} {row['randomizer']}"
    return (
        f"{row['weights']:12} {row['what']:14} {kind:28} seed {row['operator_seed']} sigma {255 * row['sigma']:4.1f} "
        f"mu {row['mu']:.1e} {row['mu_from']:8} {row['psnr_mean']:6.2f} dB, TV {row['tv_psnr_mean']:6.2f}, worst "
        f"{row['vs_tv_worst']:+6.2f}, SSIM {row['ssim_mean']:.3f}, {row['converged']}/{row['count']} converged"
    )


def main() -> None:
    """Run all cases, or those selected by `--only`, and write one JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", nargs="+", required=True, help="weight files, or names of shipped weights")
    parser.add_argument("--data", type=Path, required=True, help="folder of BSD400")
    parser.add_argument("--out", type=Path, default=Path("generalize.json"))
    parser.add_argument("--images", type=int, default=6, help="images of each case")
    parser.add_argument("--tune-on", type=int, default=3, help="validation images")
    parser.add_argument("--only", nargs="*", help="cases whose 'what' begins with one of these words")
    options = parser.parse_args()
    torch.set_num_threads(1)
    images = Images(options.data, options.images, options.tune_on)
    weights = {Path(w).stem: w for w in options.weights}
    began, rows = time.perf_counter(), []
    for case in cases():
        if options.only and not any(case.what.startswith(word) for word in options.only):
            continue
        for row in run_case(case, weights, images):
            print(told(row), flush=True)
            rows.append(row)
        result = {"rows": rows, "seconds": time.perf_counter() - began, "machine": describe()}
        write_atomically(options.out, (json.dumps(result, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
