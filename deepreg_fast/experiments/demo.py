"""The demo: train a regularizer in about a minute, recover held-out images, compare, and write a report."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..data import ImageSet, embedded_images
from ..evaluation.compare import Method, against_tv, figures
from ..evaluation.metrics import psnr
from ..evaluation.tuning import tune_mu, tuned_tv
from ..files import locked
from ..functional.ridge import inverse_softplus
from ..inverse.data_term import add_noise, mu_with_noise
from ..inverse.problem import build_operator
from ..operators import LinearOperator
from ..problem import Problem
from ..regularizers import Ridge, for_channels
from ..solvers import PGDOptions
from ..terminal import Pulse
from ..training import BilevelConfig, BilevelTrainer
from ..weights.io import load

TRAINED = "trained here"
TUNING = 6
TUNING_LIMIT = 300
"""Gradients of a recovery while mu is tuned."""
PROFILE = (0.35, 0.6, 0.7, 0.7)
"""`a_k` of the first profile (`functional/ridge.py`)."""


@dataclass(frozen=True)
class Recovery:
    """A method's recovery of the held-out images."""

    method: Method
    images: torch.Tensor
    """`[N, C, H, W]`."""
    curve: list[float]
    """Mean PSNR in dB at the start and after each gradient; empty for methods without iterations."""


@dataclass(frozen=True)
class Outcome:
    """The data of the report."""

    config: BilevelConfig
    trainer: BilevelTrainer
    reg: Ridge
    seconds: float
    """Duration of the training."""
    test: ImageSet
    y: torch.Tensor
    """Measurements of the held-out images."""
    A: LinearOperator
    recoveries: dict[str, Recovery]
    results: dict[str, Any]
    """Results of each method, as from `evaluate`."""

    @property
    def best(self) -> str:
        """The method of the shipped weights."""
        return f"shipped {shipped_for(self.config)}"


@dataclass
class Demo:
    """Result of the demo: results per method, seconds of the training, and path of the report."""

    results: dict[str, Any]
    seconds: float
    report: Path

    @property
    def best(self) -> str:
        """The method of the shipped weights, which comes last."""
        return list(self.results)[-1]


NOISE = 2.55 / 255
"""Standard deviation of the noise in problems other than "cs"."""


def settings(
    out: Path, steps: int, seed: int = 0, device: str = "cpu", problem: Problem | None = None
) -> BilevelConfig:
    """Settings of the demo's training: a weakly convex ridge regularizer on small crops of the embedded photographs."""
    problem = problem or Problem()
    # Three divides a crop of 36 pixels, as "sr3" requires.
    crop, validation_crop = (32, 64) if problem.problem == "cs" else (36, 60)
    return BilevelConfig(
        **asdict(problem),
        mu0=mu_with_noise(1e-2, problem.sigma),
        out=str(out / "run"),
        regularizer="ridge",
        convex=False,
        filters=16,
        kernel_size=7,
        crop=crop,
        # Without the flips each crop is visited four times as often, so its warm starts are closer to the solution.
        augment=False,
        batch=8,
        steps=steps,
        loss="psnr",
        lr=2e-2,
        warmup=min(20, steps // 4),
        beta=0.0,
        xi=0.0,
        validation=8,
        validation_crop=validation_crop,
        validate_every=max(1, steps // 10),
        inner_iterations=20,
        first_iterations=60,
        adjoint_iterations=8,
        seed=seed,
        device=device,
    )


def start(config: BilevelConfig) -> Ridge:
    """The initial regularizer: DCT filters with one common profile, steep at 0 and flatter at large responses like
    trained profiles. A few hundred steps make more progress from it than from the convex profiles of `Ridge`."""
    options = {"center": config.center, "image_channels": config.image_channels, "seed": config.seed}
    reg = Ridge(config.filters, config.kernel_size, config.scales, config.convex, **options)
    with torch.no_grad():
        reg.net.raw.copy_(
            inverse_softplus(torch.tensor(PROFILE, dtype=torch.float32, device="cpu")).expand_as(reg.net.raw)
        )
    return reg


def run_demo(
    out: Path,
    steps: int = 250,
    size: int = 128,
    progress: bool | None = None,
    device: str = "cpu",
    problem: Problem | None = None,
) -> Demo:
    """Train, recover the held-out images, compare with tuned TV and with shipped weights, and write
    `out/report.html`.

    `problem` is by default compressive sensing at ratio 1/5. Images of other problems are cropped to a multiple of six
    pixels, which every named super-resolution divides.
    """
    with locked(out / "demo.lock", f"The demo in {out}"):
        return _run_demo(settings(out, steps, device=device, problem=problem), out, size, progress)


def _run_demo(config: BilevelConfig, out: Path, size: int, progress: bool | None) -> Demo:
    from .report.demo import page

    began = time.perf_counter()
    # A demo always starts from scratch; remove the files of an earlier one.
    for old in ("last.safetensors", "metrics.jsonl"):
        (out / "run" / old).unlink(missing_ok=True)
    reg = start(config)
    trainer = BilevelTrainer(config, reg, progress=progress)
    trainer.fit()
    seconds = time.perf_counter() - began
    train, test = embedded_images(size if config.problem == "cs" else size // 6 * 6, color=config.color)
    test = ImageSet(test.names, test.x.to(trainer.device))
    A = build_operator(config, test.shape).to(trainer.device)
    y = add_noise(A.A(test.x), config.sigma, seed=1)
    x_tuning = train.x[:: max(1, len(train.x) // TUNING)][:TUNING].to(trainer.device)
    y_tuning = add_noise(A.A(x_tuning), config.sigma, seed=2)
    with Pulse("demo", 6, "parts") as pulse:
        pulse.begin("tuning tv")
        tv = tuned_tv(x_tuning, y_tuning, A)
        pulse.done(text="tuning the shipped weights")
        shipped = _shipped(config, x_tuning, y_tuning, A)
        trained = Method(TRAINED, reg, trainer.mu, PGDOptions(tolerance=3e-4, acceleration="anderson", memory=10))
        methods = [Method(name_of_start(config)), tv, trained, shipped]
        results, recoveries = _recovered(methods, test.x, y, A, lambda name: pulse.done(text=f"recovering by {name}"))
    data = Outcome(config, trainer, reg, seconds, test, y.cpu(), A.to("cpu"), recoveries, results)
    path = out / "report.html"
    page(data).write(path)
    return Demo(results, seconds, path)


def name_of_start(problem: Problem) -> str:
    """The name of the start of a recovery: of an SRM the minimum-norm solution, otherwise Tikhonov's."""
    return "minimum norm" if problem.problem == "cs" else "Tikhonov"


def shipped_for(problem: Problem) -> str:
    """The shipped weights that the demo shows: the best ones, or for another problem than theirs the robust ones, which
    are also faster to tune."""
    return "cs5-ridge-net" if Problem.of(problem) == Problem() else "cs5-ridge-weak"


def _shipped(config: BilevelConfig, x: torch.Tensor, y: torch.Tensor, A: LinearOperator) -> Method:
    """The shipped weights with their own mu in the problem that they were trained for, otherwise with a tuned one."""
    name = shipped_for(config)
    reg, meta = load(name)
    reg = for_channels(reg, config.image_channels).to(x.device)
    method = Method(f"shipped {name}", reg, meta["mu"], PGDOptions(**meta["card"]["recovery"]))
    if name == shipped_for(Problem()):
        return method
    options = replace(method.options, max_iterations=min(method.options.max_iterations, TUNING_LIMIT))
    tuned = tune_mu(replace(method, mu=mu_with_noise(meta["mu"], config.sigma), options=options), x, y, A)
    return replace(tuned, options=method.options)


def _recovered(
    methods: list[Method], x: torch.Tensor, y: torch.Tensor, A: LinearOperator, begin: Callable[[str], None]
) -> tuple[dict[str, Any], dict[str, Recovery]]:
    """Results and recovery of each method; `begin(name)` is called before each."""
    results, recoveries = {}, {}
    for m in methods:
        begin(m.name)
        curve: list[float] = []

        def look(_round: int, now: torch.Tensor, curve: list[float] = curve) -> None:
            curve.append(float(psnr(now, x).mean()))

        results[m.name], images = figures(m, x, y, A, None if m.reg is None else look)
        recoveries[m.name] = Recovery(m, images.cpu(), curve)
    against_tv(results)
    return results, recoveries
