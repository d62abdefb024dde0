"""Recover images from other problems than compressive sensing (benchmarks/results/problems).

    python benchmarks/problems.py --data BSD400 --out problems.json [--problems deblur-gaussian sr2 ...] [--steps 150]

For each problem of `deepreg_fast.problem.PROBLEMS` and each noise, the methods are: the start of a recovery
(Tikhonov about mid-gray), tuned TV, the shipped compressive-sensing weights with a tuned mu, and with `--steps` the
same weights trained further, bi-level, for the problem, with a tuned mu. All tuning uses crops of validation images,
and all results are on test images. A case that is in the output file is not computed again.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

from problem_cases import run_cases

import deepreg_fast as dr
from deepreg_fast.data import load_folder, load_split
from deepreg_fast.evaluation.compare import Experiment, Method, evaluate, measure
from deepreg_fast.evaluation.tuning import Tuner, tuned_tv
from deepreg_fast.problem import PROBLEMS
from deepreg_fast.weights.cards import card_of

OPTIONS = dr.PGDOptions(400, 1e-4, acceleration="fista")


def train(problem: str, sigma: float, arguments: argparse.Namespace) -> tuple[dr.Regularizer, float, float]:
    """The weights after bi-level training for the problem, their mu, and the CPU seconds of this process."""
    weights, steps = arguments.weights, arguments.steps
    _, meta = dr.load(weights)
    trained: dict[str, Any] = meta["config"] if "config" in meta else card_of(meta)["settings"][-1]
    keep = ("regularizer", "channels", "depth", "norm", "head", "gain", "filters", "scales", "convex", "kernel_size")
    began = time.process_time()
    with tempfile.TemporaryDirectory() as temporary:
        runs = arguments.runs or Path(temporary)
        config = dr.BilevelConfig(
            out=str(runs / f"{problem}-{sigma * 255:g}"),
            data=arguments.data,
            split="bsd400",
            problem=problem,
            sigma=sigma,
            init=weights,
            init_mu=False,
            mu0=60.0 * sigma**2,
            mu_max=10.0,
            **{k: trained[k] for k in keep},
            loss="psnr",
            beta=0.0,
            crop=60,
            batch=4,
            steps=steps,
            lr=5e-4,
            warmup=10,
            validation=6,
            validate_every=max(1, steps // 3),
            inner_iterations=30,
            first_iterations=80,
            adjoint_iterations=12,
            adjoint_tolerance=0.05,
            tolerance_start=5e-4,
            memory=10,
        )
        trainer = dr.BilevelTrainer(config, progress=False)
        reg = trainer.fit()
        return reg, float(trainer.mu), time.process_time() - began


def case(problem: str, sigma: float, arguments: argparse.Namespace) -> dict[str, Any]:
    """The results of all methods."""
    crop = arguments.crop // 6 * 6
    described = Experiment(
        problem, sigma=sigma, data=arguments.data, split="bsd400", test_crop=crop, tuning=arguments.tuning
    )
    measured = measure(described, limit=arguments.limit)
    tuning = Tuner(measured.x_tuning, measured.y_tuning, measured.A)
    methods = [Method("start"), tuned_tv(measured.x_tuning, measured.y_tuning, measured.A)]
    loaded, _ = dr.load(arguments.weights)
    methods.append(tuning.mu(Method(arguments.weights, loaded, 60.0 * sigma**2, OPTIONS)))
    seconds = 0.0
    if arguments.steps:
        reg, mu, seconds = train(problem, sigma, arguments)
        tuning = Tuner(measured.x_tuning, measured.y_tuning, measured.A)
        methods.append(tuning.mu(Method("trained for it", reg, mu, OPTIONS)))
    results = evaluate(methods, measured.x, measured.y, measured.A)
    return {"problem": problem, "sigma": sigma, "training_cpu_seconds": seconds, "results": results}


def main() -> None:
    """Run the cases that are not in the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of BSD400")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--problems", nargs="+", default=[p for p in PROBLEMS if p != "cs"])
    parser.add_argument("--noise", nargs="+", type=float, default=[2.55, 10.0], help="standard deviations in 1/255")
    parser.add_argument("--weights", default="cs5-ridge-net")
    parser.add_argument("--steps", type=int, default=0, help="of training for the problem; 0 for none")
    parser.add_argument("--runs", type=Path, help="folder in which trainings keep weights, logs and checkpoints")
    parser.add_argument("--crop", type=int, default=180)
    parser.add_argument("--limit", type=int, default=30, help="test images")
    parser.add_argument("--tuning", type=int, default=6, help="validation images")
    arguments = parser.parse_args()
    names = load_split("bsd400")
    load_folder(arguments.data, None, names.test[:1])
    run_cases(case, arguments, ("weights", "steps", "crop", "limit", "tuning"))


if __name__ == "__main__":
    main()
