"""Report of the demo: images first, then results, curves, filters and settings."""

from __future__ import annotations

import json

import numpy as np
import torch

from ...problem import Problem
from ...report import format as w
from ...report.figures import Line, lines_figure
from ...report.html import Panel, Picture, Report
from ...status import Status
from ..demo import TRAINED, TUNING, Outcome
from .pictures import png


def _labels(data: Outcome) -> dict[str, str]:
    """The shown methods and their labels."""
    return {"tv": "Total variation", TRAINED: "Trained here", data.best: data.best.capitalize()}


def page(data: Outcome) -> Report:
    """Build the report."""
    results, (_, _, height, width) = data.results, data.test.x.shape
    gain, best = (results[name]["vs_tv"] for name in (TRAINED, data.best))
    report = Report(
        "deepreg-fast: regularizers learned for recovery",
        f"Photographs of {height} × {width} pixels are recovered{_from(data)}. A regularizer trained here in "
        f"{data.seconds:.0f} s reaches {results[TRAINED]['psnr_mean']:.2f} dB, {w.signed(gain['mean'])} dB against "
        f"tuned total variation; the shipped weights reach {results[data.best]['psnr_mean']:.2f} dB, "
        f"{w.signed(best['mean'])} dB.",
    )
    order = _by_gain(data)
    _first(report, data, order[len(order) // 2])
    _table(report, data)
    _curves(report, data)
    _others(report, data, order)
    _filters(report, data)
    _statuses(report, data)
    report.section("Settings", "Everything that made this report, as the command line and BilevelConfig take it.")
    changed = {k: v for k, v in json.loads(data.config.to_json()).items() if k != "out"}
    report.table(("setting", "value"), [(k, str(v)) for k, v in changed.items()])
    return report


def _from(data: Outcome) -> str:
    """The problem, as the end of a sentence."""
    problem = Problem.of(data.config)
    if problem == Problem():
        return " from one measurement per five pixels"
    return f". The problem is {problem.describe()}"


def _is_cs(data: Outcome) -> bool:
    return data.config.problem == "cs"


# -- pictures ----------------------------------------------------------------------------------------------------------


def _by_gain(data: Outcome) -> list[int]:
    """The held-out images sorted by the gain of the trained regularizer over TV, smallest first."""
    gain = np.array(data.results[TRAINED]["psnr"]) - np.array(data.results["tv"]["psnr"])
    return [int(i) for i in np.argsort(gain, kind="stable")]


def _first(report: Report, data: Outcome, i: int) -> None:
    """Add one image by all methods, and a detail of each."""
    name = data.test.names[i]
    report.section("Original and recoveries")
    _pictures(report, data, i)
    top, left, side = _detail(data, i)
    window = ..., slice(top, top + side), slice(left, left + side)
    truth = _truth(data, i)
    details = [Picture(png(truth[window], "gray"), f"Detail of {name}", "Detail: original")]
    for method, label in _labels(data).items():
        x = _image(data, method, i)
        error = float(np.sqrt(np.square(x[window] - truth[window]).mean()))
        text = f"RMS error {255 * error:.1f} of 255"
        alt = f"Detail of {name} by {method}, {text}"
        details.append(Picture(png(x[window], "gray"), alt, f"Detail: {label}", text))
    report.pictures(details, "four", sharp=True)
    report.text(
        f"{name} is the held-out image whose gain over total variation is in the middle; nothing was trained or tuned "
        f"on its photograph. The detail of {side} × {side} pixels is the one with the most contrast."
    )


def _pictures(report: Report, data: Outcome, i: int) -> None:
    row = _row(data, i)
    report.pictures(row, "four" if len(row) == 4 else "five")


def _row(data: Outcome, i: int) -> list[Picture]:
    """The original, the measurements unless they are of an SRM, and each shown method's recovery, with its PSNR."""
    name, truth = data.test.names[i], _truth(data, i)
    row = [Picture(png(truth, "gray"), f"{name}, the original", "Original", name)]
    if not _is_cs(data):
        y = data.A.select(torch.tensor([i], dtype=torch.int64, device="cpu")).as_image(data.y[i : i + 1])[0]
        size = " × ".join(str(n) for n in y.shape[-2:])
        row.append(Picture(png(y, "stretched"), f"{name}, measured", "Measured", f"{size} pixels"))
    reference = data.results["tv"]["psnr"][i]
    for method, label in _labels(data).items():
        value = data.results[method]["psnr"][i]
        caption = f"{value:.2f} dB" + ("" if method == "tv" else f", {w.signed(value - reference)} against TV")
        row.append(Picture(png(_image(data, method, i), "gray"), f"{name} by {method}", label, caption))
    return row


def _truth(data: Outcome, i: int) -> np.ndarray:
    return data.test.x[i].cpu().numpy()


def _image(data: Outcome, method: str, i: int) -> np.ndarray:
    return data.recoveries[method].images[i].numpy()


def _detail(data: Outcome, i: int) -> tuple[int, int, int]:
    """Top, left and side of the detail with the most contrast: a square with a third of the image's shorter side."""
    truth = _truth(data, i).mean(0)
    side = min(truth.shape) // 3
    step = max(1, side // 8)
    places = [
        (top, left)
        for top in range(0, truth.shape[0] - side + 1, step)
        for left in range(0, truth.shape[1] - side + 1, step)
    ]
    top, left = max(places, key=lambda p: float(truth[p[0] : p[0] + side, p[1] : p[1] + side].std()))
    return top, left, side


def _others(report: Report, data: Outcome, order: list[int]) -> None:
    """Add the other held-out images, by their gain."""
    report.section("The other held-out images", "The one with the smallest gain over total variation comes first.")
    middle = order[len(order) // 2]
    for i in order:
        if i != middle:
            _pictures(report, data, i)


# -- figures -----------------------------------------------------------------------------------------------------------


def _table(report: Report, data: Outcome) -> None:
    results = data.results
    if _is_cs(data):
        start = "'minimum norm' is the solution of A x = y nearest to mid-gray. The weight mu of TV is"
    else:
        start = f"'Tikhonov' is the start of the recoveries. The weights mu of TV and of '{data.best}' are"
    report.section(
        "All methods",
        f"PSNR in dB and SSIM on {len(data.test.x)} held-out images. {start} tuned on {TUNING} training images; the "
        f"other ones are trained. '{TRAINED}' began with DCT filters and one profile for all, not with shipped "
        f"weights. '{data.best}' was trained on other photographs (BSD400) for compressive sensing; 'deepreg-fast info "
        f"{data.best.removeprefix('shipped ')}' prints its card.",
    )
    rows = []
    for name, f in results.items():
        vs_tv = f.get("vs_tv")
        rows.append(
            (
                name,
                f"{f['psnr_mean']:.2f}",
                f"{f['psnr_median']:.2f}",
                f"{f['ssim_mean']:.3f}",
                w.signed(vs_tv["mean"]) if vs_tv else "",
                w.wins(vs_tv) if vs_tv else "",
                f"{np.mean(f['gradients']):.0f}",
                f"{f['seconds']:.1f}",
            )
        )
    best = int(np.argmax([f["psnr_mean"] for f in results.values()]))
    report.table(("method", "mean", "median", "SSIM", "against TV", "wins", "gradients", "seconds"), rows, best)


def _curves(report: Report, data: Outcome) -> None:
    """Add the curves of the recoveries and of the training."""
    curves = {label: data.recoveries[n].curve for n, label in _labels(data).items()}
    lines = [Line(name, np.arange(1, len(c) + 1), np.array(c), style) for style, (name, c) in enumerate(curves.items())]
    ends = ", ".join(f"{name} {c[-1]:.2f} dB after {len(c)}" for name, c in curves.items())
    recovery = "Mean PSNR of the held-out images in the recoveries of the table."
    report.section(
        "Recovery and training",
        f"The training took {data.trainer.step_done} steps in {data.seconds:.0f} s on crops of {data.config.crop} × "
        f"{data.config.crop} pixels; mu went from {data.config.mu0:.2g} to {data.trainer.mu:.2g}.",
    )
    report.panels(
        [
            Panel(
                lines_figure(lines, "gradients of r (logarithmic)", "mean PSNR (dB)", "x"),
                recovery,
                f"{recovery} {ends}.",
            ),
            *_training(data),
        ]
    )
    active_guards = {k: v for k, v in data.trainer.counters.values.items() if v}
    report.table(("guard", "times"), [(k, str(v)) for k, v in active_guards.items()] or [("none acted", "")])


def _training(data: Outcome) -> list[Panel]:
    path = data.trainer.folder / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    panels = []
    for key, axis, caption, smooth in (
        ("val_psnr", "validation PSNR (dB)", "Validation images, recovered from a cold start.", False),
        (
            "mse_loss",
            "1000 × mean squared error",
            "Recovered training crops at each visit, and the running mean.",
            True,
        ),
    ):
        steps, values = zip(*((d["step"], d[key]) for d in lines if key in d), strict=True)
        svg = lines_figure([Line("", steps, values, smooth=smooth)], "step", axis, "y" if smooth else "")
        panels.append(Panel(svg, caption, f"{caption} At last {values[-1]:.4g}."))
    return panels


def _filters(report: Report, data: Outcome) -> None:
    """Add the trained filters, sorted by their strength at small responses."""
    with torch.no_grad():
        filters, coefficients = data.reg.net.numbers()
    strength = coefficients.sum(1) * filters.square().sum((1, 2, 3))
    order = torch.argsort(strength, descending=True, stable=True)
    report.section(
        "What was learned",
        f"The regularizer is a sum of {len(filters)} smooth profiles of filter responses, with "
        f"{sum(p.numel() for p in data.reg.parameters())} trained numbers in all. These are the filters, the one with "
        "the largest curvature at zero first; gray is 0.",
    )
    report.pictures([Picture(_filter(filters[i]), f"Filter {int(i)}") for i in order.cpu()], "small", sharp=True)


def _filter(w: torch.Tensor) -> str:
    end = float(w.abs().max()) or 1.0
    return png(0.5 + 0.5 * w.cpu() / end, "gray")


def _statuses(report: Report, data: Outcome) -> None:
    report.section("How the recoveries ended")
    rows = [
        (name, status, str(count), Status[status.upper()].advice)
        for name, f in data.results.items()
        if f["mu"] is not None
        for status, count in f["status"].items()
    ]
    report.table(("method", "status", "images", "meaning"), rows)
