"""Recover color photographs: gray weights per channel and on luma and chroma, beside total variation, with seconds.

    python benchmarks/color.py --out color.json [--data FOLDER] [--problems deblur-gaussian denoise] [--noise 10]

The methods are the start of a recovery, TV of each channel, vectorial TV, and the weights by `PerChannel` and by `Luma`
with chroma weights of 1 and 4. Each weight mu is tuned on other photographs. Without `--data` the photographs are the
five color ones of scikit-image: crops of two are tested, crops of the other three tune. Seconds are CPU seconds of this
process per image. A case that is in the output file is not computed again.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from problem_cases import run_cases

import deepreg_fast as dr
from deepreg_fast.evaluation.compare import Experiment, Method, against_tv, figures, measure
from deepreg_fast.evaluation.tuning import tune_mu, tuned_tv


def case(problem: str, sigma: float, arguments: argparse.Namespace) -> dict[str, Any]:
    """The results of all methods."""
    described = Experiment(
        problem, sigma=sigma, color=True, data=arguments.data, test_crop=arguments.crop, tuning=arguments.tuning
    )
    measured = measure(described, limit=arguments.limit)
    tuning = measured.x_tuning, measured.y_tuning, measured.A
    tv = tuned_tv(*tuning)
    assert tv.reg is not None
    weights, name = dr.load(arguments.weights)[0], arguments.weights
    options = dr.PGDOptions(arguments.iterations, 1e-4, acceleration="fista")
    methods = [Method("start"), tv, tune_mu(replace(tv, name="tv per channel", reg=dr.PerChannel(tv.reg)), *tuning)]
    for label, reg in (
        (f"{name} per channel", dr.PerChannel(weights)),
        (f"{name} luma, chroma 1", dr.Luma(weights)),
        (f"{name} luma, chroma 4", dr.Luma(weights, chroma_weight=4.0)),
    ):
        methods.append(tune_mu(Method(label, reg, 60.0 * sigma**2, options), *tuning))
    results: dict[str, Any] = {}
    for m in methods:
        began = time.process_time()
        results[m.name] = figures(m, measured.x, measured.y, measured.A)[0]
        results[m.name]["cpu_seconds_per_image"] = (time.process_time() - began) / len(measured.x)
    against_tv(results)
    return {"problem": problem, "sigma": sigma, "images": list(measured.names), "results": results}


def main() -> None:
    """Run the cases that are not in the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", default="embedded", help="folder of color images")
    parser.add_argument("--problems", nargs="+", default=["denoise", "deblur-gaussian", "inpaint"])
    parser.add_argument("--noise", nargs="+", type=float, default=[10.0], help="standard deviations in 1/255")
    parser.add_argument("--weights", default="cs5-ridge-weak", help="gray weights")
    parser.add_argument("--crop", type=int, default=96)
    parser.add_argument("--limit", type=int, default=0, help="test images; 0 for all")
    parser.add_argument("--tuning", type=int, default=3, help="images on which mu is tuned")
    parser.add_argument("--iterations", type=int, default=300, help="gradients of a recovery by the weights")
    arguments = parser.parse_args()
    run_cases(case, arguments, ("weights", "crop", "limit", "tuning", "iterations", "data"))


if __name__ == "__main__":
    main()
