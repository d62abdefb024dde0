"""The demo: train small, recover held-out images, compare, and write the report."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..data import ImageSet, embedded_images
from ..evaluation import Method, evaluate, run
from ..files import locked
from ..implicit import initial_point
from ..metrics import psnr
from ..operators import SRM
from ..recovery import recover
from ..solvers import PGDOptions, Solution
from ..status import Status
from ..terminal import Pulse
from ..training import BilevelConfig, BilevelTrainer
from ..tuning import tuned_tv
from ..weights import load
from .figures import Line, images_figure, lines_figure, psnr_figure
from .html import Panel, Report

ITERATIONS = 60
SHIPPED = "cs5-beta10"


@dataclass
class Demo:
    """What the demo found: figures per method, and where the report is."""

    results: dict[str, Any]
    report: Path


def settings(out: Path, steps: int, seed: int = 0, device: str = "cpu") -> BilevelConfig:
    """Settings of the demo's training: small crops of the embedded photographs, ratio 1/5."""
    return BilevelConfig(
        out=str(out / "run"),
        crop=32,
        batch=8,
        steps=steps,
        lr=6e-3,
        warmup=min(40, steps // 4),
        beta=5.0,
        beta_start=2.0,
        validation=8,
        validation_crop=64,
        validate_every=max(1, steps // 10),
        inner_iterations=20,
        adjoint_iterations=6,
        delta_steps_late=1,
        seed=seed,
        device=device,
    )


def run_demo(out: Path, steps: int = 600, size: int = 96, progress: bool | None = None, device: str = "cpu") -> Demo:
    """Train, recover the held-out images at ratio 1/5, compare with tuned TV and with shipped weights, write
    `out/report.html`."""
    with locked(out / "demo.lock", f"The demo in {out}"):
        return _run_demo(out, steps, size, progress, device)


def _run_demo(out: Path, steps: int, size: int, progress: bool | None, device: str) -> Demo:
    began = time.perf_counter()
    config = settings(out, steps, device=device)
    # A demo starts anew each time; only its own files of an earlier one are in the way.
    for old in ("last.safetensors", "metrics.jsonl"):
        (out / "run" / old).unlink(missing_ok=True)
    trainer = BilevelTrainer(config, progress=progress)
    reg = trainer.fit()
    trained = time.perf_counter() - began
    train, test = embedded_images(size)
    test = ImageSet(test.names, test.x.to(trainer.device))
    A = SRM((1, size, size), ratio=config.ratio, seed=config.operator_seed).to(trainer.device)
    y = A.A(test.x)
    tuning = train.x[:: max(1, len(train.x) // 6)][:6].to(trainer.device)
    tv = tuned_tv(tuning, A.A(tuning), A)
    shipped, meta = load(SHIPPED)
    methods = [
        *(Method("adjoint"), Method("minimum norm"), tv, Method("bi-level", reg, trainer.mu)),
        Method(f"shipped weights {SHIPPED}", shipped.to(trainer.device), meta["mu"]),
    ]
    # The methods are run three times: for their figures, their curves and their pictures.
    with Pulse("demo", 3 * len(methods), "recoveries") as pulse:
        results = evaluate(methods, test.x, y, A, pulse.done)
        return _reported(out, trainer, trained, methods, results, test, y, A, pulse)


def _reported(  # noqa: PLR0913 - everything that the report tells
    out: Path,
    trainer: BilevelTrainer,
    trained: float,
    methods: list[Method],
    results: dict[str, Any],
    test: ImageSet,
    y: torch.Tensor,
    A: SRM,
    pulse: Pulse,
) -> Demo:
    """Write the report."""
    config, size = trainer.config, test.shape[-1]
    report = Report(
        "deepreg-fast: a regularizer trained bi-level",
        f"{config.steps} training steps on {config.crop} × {config.crop} crops of photographs, then compressive "
        f"sensing of {len(test.x)} held-out images of {size} × {size} from one measurement per five pixels, without "
        "noise.",
    )
    _table(report, results)
    _training(report, trainer, trained)
    pulse.done(len(methods), "curves")
    _convergence(report, methods, test, y, A)
    pulse.done(2 * len(methods), "pictures")
    _pictures(report, methods, test, y, A)
    _statuses(report, results)
    report.section("Settings", "Everything that made this report, as the command line and BilevelConfig take it.")
    changed = {k: v for k, v in json.loads(config.to_json()).items() if k != "out"}
    report.table(("setting", "value"), [(k, str(v)) for k, v in changed.items()])
    path = out / "report.html"
    report.write(path)
    return Demo(results, path)


def _names(results: dict[str, Any]) -> list[str]:
    return [n for n in results if n != "settings"]


def _table(report: Report, results: dict[str, Any]) -> None:
    report.section(
        "Recovery of held-out images",
        "PSNR in dB and SSIM. 'adjoint' is Aᵀy, 'minimum norm' the solution nearest to mid-grey; mu of TV is tuned on "
        f"training photographs, mu of the bi-level regularizers is trained. 'bi-level' was trained for this report, "
        f"'shipped weights {SHIPPED}' come with the package ('deepreg-fast info {SHIPPED}' tells of them).",
    )
    rows = []
    for name in _names(results):
        f = results[name]
        against = f.get("vs_tv")
        rows.append(
            (
                name,
                f"{f['psnr_mean']:.2f}",
                f"{f['psnr_median']:.2f}",
                f"{f['ssim_mean']:.3f}",
                f"{against['mean']:+.2f}" if against else "",
                f"{against['wins']} of {against['images']}" if against else "",
                f"{np.mean(f['gradients']):.0f}",
                f"{f['seconds']:.1f}",
            )
        )
    best = int(np.argmax([results[n]["psnr_mean"] for n in _names(results)]))
    report.table(("method", "mean", "median", "SSIM", "against TV", "wins", "gradients", "seconds"), rows, best)


def _training(report: Report, trainer: BilevelTrainer, seconds: float) -> None:
    lines = [json.loads(t) for t in (trainer.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    loss = [(d["step"], d["mse_loss"]) for d in lines if "mse_loss" in d]
    val = [(d["step"], d["val_psnr"]) for d in lines if "val_psnr" in d]
    report.section("Training", f"{trainer.step_done} steps in {seconds:.0f} s; mu went to {trainer.mu:.2g}.")
    left = lines_figure(
        [Line("", [s for s, _ in loss], [v for _, v in loss], smooth=True)], "step", "1000 × mean squared error", "y"
    )
    right = lines_figure([Line("", [s for s, _ in val], [v for _, v in val])], "step", "validation PSNR (dB)")
    report.panels(
        [
            Panel(left, "Error of the recovered crops at each visit and its running mean.", _last("Error", loss)),
            Panel(right, "Recovery of validation images from a cold start.", _last("Validation PSNR", val)),
        ]
    )
    acted = {k: v for k, v in trainer.counters.values.items() if v}
    report.table(("guard", "times"), [(k, str(v)) for k, v in acted.items()] or [("none acted", "")])


def _last(what: str, curve: list[tuple[int, float]]) -> str:
    return f"{what} against training step; at last {curve[-1][1]:.4g}."


def _convergence(report: Report, methods: list[Method], test: ImageSet, y: torch.Tensor, A: SRM) -> None:
    """Plain PGD, as in the paper, for every method that iterates."""
    curves = {}
    for m in methods:
        if m.reg is None:
            continue
        seen: list[float] = []

        def look(_round: int, x: torch.Tensor, seen: list[float] = seen) -> None:
            seen.append(float(psnr(x, test.x).mean()))

        options = PGDOptions(ITERATIONS, 0.0, tau=m.options.tau)
        recover(y, A, m.reg, m.mu, options=options, observer=look)
        curves[m.name] = (list(range(1, len(seen) + 1)), seen)
    report.section("PSNR against iteration", "Plain proximal gradient descent with backtracking, as in the paper.")
    ends = ", ".join(f"{name} {y[-1]:.2f} dB" for name, (_, y) in curves.items())
    caption = f"Mean over the held-out images, the first {ITERATIONS} gradients."
    report.panels([Panel(psnr_figure(curves), caption, f"{caption} At last: {ends}.")])


def _pictures(report: Report, methods: list[Method], test: ImageSet, y: torch.Tensor, A: SRM) -> None:
    found: dict[str, torch.Tensor] = {}
    for m in methods:
        sol = run(m, y, A)
        if isinstance(sol, Solution):
            found[m.name] = sol.x.cpu()
    back = A.A_adjoint(y).cpu()
    start = initial_point(y, A, methods[-1].reg).cpu()  # type: ignore[arg-type]
    rows = []
    for i in range(0, len(test.x), max(1, len(test.x) // 3)):
        truth = test.x[i].cpu()
        row = [(truth[0].numpy(), test.names[i], "gray"), (back[i, 0].numpy(), "contrast stretched", "auto")]
        for name, image in (("minimum norm", start), *found.items()):
            row.append((image[i, 0].numpy(), f"{float(psnr(image[i : i + 1], truth[None])[0]):.2f} dB", "gray"))
            if name == methods[-1].name:
                row.append(((image[i, 0] - truth[0]).numpy(), "red −0.2, blue +0.2", "error"))
        rows.append(row)
    columns = ["truth", "Aᵀy", "minimum norm", "TV", "bi-level", f"shipped {SHIPPED}", f"error of {SHIPPED}"]
    report.section("Images")
    report.figure(images_figure(columns, rows), "Held-out images; nobody trained or tuned on them.", wide=True)


def _statuses(report: Report, results: dict[str, Any]) -> None:
    report.section("How the recoveries ended")
    rows = []
    for name in _names(results):
        if results[name]["mu"] is not None:
            for status, count in results[name]["status"].items():
                rows.append((name, status, str(count), Status[status.upper()].advice))
    report.table(("method", "status", "images", "meaning"), rows)
