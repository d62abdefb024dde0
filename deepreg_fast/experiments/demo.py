"""The demo: train a regularizer in about a minute, recover held-out images, compare, and write a report."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..data import ImageSet, embedded_images
from ..evaluation.compare import Method, against_tv, figures
from ..evaluation.metrics import psnr
from ..evaluation.tuning import tuned_tv
from ..files import locked
from ..functional.ridge import inverse_softplus
from ..operators import SRM
from ..regularizers import Ridge
from ..solvers import PGDOptions
from ..terminal import Pulse
from ..training import BilevelConfig, BilevelTrainer
from ..weights.io import load

SHIPPED = "cs5-ridge-net"
TRAINED, BEST = "trained here", f"shipped {SHIPPED}"
TUNING = 6
PROFILE = (0.35, 0.6, 0.7, 0.7)
"""`a_k` of the first profile (`functional/ridge.py`)."""


@dataclass(frozen=True)
class Recovery:
    """A method's recovery of the held-out images."""

    method: Method
    images: torch.Tensor
    """`[N, 1, H, W]`."""
    curve: list[float]
    """Mean PSNR in dB at the start and after each gradient; empty for methods without iterations."""


@dataclass(frozen=True)
class Found:
    """The data of the report."""

    config: BilevelConfig
    trainer: BilevelTrainer
    reg: Ridge
    seconds: float
    """Duration of the training."""
    test: ImageSet
    recoveries: dict[str, Recovery]
    results: dict[str, Any]
    """Results of each method, as from `evaluate`."""


@dataclass
class Demo:
    """Result of the demo: results per method, seconds of the training, and path of the report."""

    results: dict[str, Any]
    seconds: float
    report: Path


def settings(out: Path, steps: int, seed: int = 0, device: str = "cpu") -> BilevelConfig:
    """Settings of the demo's training: a weakly convex ridge regularizer on small crops of the embedded photographs,
    from one measurement per five pixels."""
    return BilevelConfig(
        out=str(out / "run"),
        regularizer="ridge",
        convex=False,
        filters=16,
        kernel_size=7,
        crop=32,
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
        validation_crop=64,
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
    reg = Ridge(
        config.filters, config.kernel_size, config.scales, config.convex, center=config.center, seed=config.seed
    )
    with torch.no_grad():
        reg.net.raw.copy_(
            inverse_softplus(torch.tensor(PROFILE, dtype=torch.float32, device="cpu")).expand_as(reg.net.raw)
        )
    return reg


def run_demo(out: Path, steps: int = 250, size: int = 128, progress: bool | None = None, device: str = "cpu") -> Demo:
    """Train, recover the held-out images at ratio 1/5, compare with tuned TV and with shipped weights, and write
    `out/report.html`."""
    with locked(out / "demo.lock", f"The demo in {out}"):
        return _run_demo(out, steps, size, progress, device)


def _run_demo(out: Path, steps: int, size: int, progress: bool | None, device: str) -> Demo:
    from .report.demo import page

    began = time.perf_counter()
    config = settings(out, steps, device=device)
    # A demo always starts from scratch; remove the files of an earlier one.
    for old in ("last.safetensors", "metrics.jsonl"):
        (out / "run" / old).unlink(missing_ok=True)
    reg = start(config)
    trainer = BilevelTrainer(config, reg, progress=progress)
    trainer.fit()
    seconds = time.perf_counter() - began
    train, test = embedded_images(size)
    test = ImageSet(test.names, test.x.to(trainer.device))
    A = SRM((1, size, size), ratio=config.ratio, seed=config.operator_seed).to(trainer.device)
    tuning = train.x[:: max(1, len(train.x) // TUNING)][:TUNING].to(trainer.device)
    with Pulse("demo", 5, "parts") as pulse:
        pulse.begin("tuning tv")
        methods = _methods(reg, trainer.mu, tuned_tv(tuning, A.A(tuning), A), trainer.device)
        results, recoveries = _recovered(methods, test.x, A, lambda name: pulse.done(text=f"recovering by {name}"))
    data = Found(config, trainer, reg, seconds, test, recoveries, results)
    path = out / "report.html"
    page(data).write(path)
    return Demo(results, seconds, path)


def _methods(reg: Ridge, mu: float, tv: Method, device: torch.device) -> list[Method]:
    """The methods, the simplest first."""
    shipped, meta = load(SHIPPED)
    options = meta["card"]["recovery"]
    return [
        Method("minimum norm"),
        tv,
        Method(TRAINED, reg, mu, PGDOptions(tolerance=3e-4, acceleration="anderson", memory=10)),
        Method(BEST, shipped.to(device), meta["mu"], PGDOptions(**options)),
    ]


def _recovered(
    methods: list[Method], x: torch.Tensor, A: SRM, begin: Callable[[str], None]
) -> tuple[dict[str, Any], dict[str, Recovery]]:
    """Results and recovery of each method; `begin(name)` is called before each."""
    y, results, recoveries = A.A(x), {}, {}
    for m in methods:
        begin(m.name)
        curve: list[float] = []

        def look(_round: int, now: torch.Tensor, curve: list[float] = curve) -> None:
            curve.append(float(psnr(now, x).mean()))

        results[m.name], images = figures(m, x, y, A, None if m.reg is None else look)
        recoveries[m.name] = Recovery(m, images.cpu(), curve)
    against_tv(results)
    return results, recoveries
