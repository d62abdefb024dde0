"""Report of the demo: images first, then results, curves, filters and settings."""

from __future__ import annotations

import json

import numpy as np
import torch

from ...report import format as w
from ...report.figures import Line, lines_figure
from ...report.html import Panel, Picture, Report
from ...status import Status
from ..demo import BEST, TRAINED, TUNING, Found
from .pictures import png

_LABELS = {"tv": "Total variation", TRAINED: "Trained here", BEST: BEST.capitalize()}
_SHOWN = tuple(_LABELS)


def page(found: Found) -> Report:
    """Build the report."""
    results, (_, _, height, width) = found.results, found.test.x.shape
    gain, best = (results[name]["vs_tv"] for name in (TRAINED, BEST))
    report = Report(
        "deepreg-fast: regularizers learned for recovery",
        f"Photographs of {height} × {width} pixels are recovered from one measurement per five pixels. A regularizer "
        f"trained here in {found.seconds:.0f} s reaches {results[TRAINED]['psnr_mean']:.2f} dB, "
        f"{w.signed(gain['mean'])} dB against tuned total variation; the best shipped weights reach "
        f"{results[BEST]['psnr_mean']:.2f} dB, {w.signed(best['mean'])} dB.",
    )
    order = _by_gain(found)
    _first(report, found, order[len(order) // 2])
    _table(report, found)
    _curves(report, found)
    _others(report, found, order)
    _filters(report, found)
    _statuses(report, found)
    report.section("Settings", "Everything that made this report, as the command line and BilevelConfig take it.")
    changed = {k: v for k, v in json.loads(found.config.to_json()).items() if k != "out"}
    report.table(("setting", "value"), [(k, str(v)) for k, v in changed.items()])
    return report


# -- pictures ----------------------------------------------------------------------------------------------------------


def _by_gain(found: Found) -> list[int]:
    """The held-out images sorted by the gain of the trained regularizer over TV, smallest first."""
    gain = np.array(found.results[TRAINED]["psnr"]) - np.array(found.results["tv"]["psnr"])
    return [int(i) for i in np.argsort(gain, kind="stable")]


def _first(report: Report, found: Found, i: int) -> None:
    """Add one image by all methods, and a detail of each."""
    name = found.test.names[i]
    report.section("Original and recoveries")
    report.pictures(_row(found, i), "four")
    top, left, side = _detail(found, i)
    window = slice(top, top + side), slice(left, left + side)
    truth = _truth(found, i)
    details = [Picture(png(truth[window], "gray"), f"Detail of {name}", "Detail: original")]
    for method in _SHOWN:
        x = _image(found, method, i)
        error = float(np.sqrt(np.square(x[window] - truth[window]).mean()))
        text = f"RMS error {255 * error:.1f} of 255"
        alt = f"Detail of {name} by {method}, {text}"
        details.append(Picture(png(x[window], "gray"), alt, f"Detail: {_LABELS[method]}", text))
    report.pictures(details, "four", sharp=True)
    report.text(
        f"{name} is the held-out image whose gain over total variation is in the middle; nothing was trained or tuned "
        f"on its photograph. The detail of {side} × {side} pixels is the one with the most contrast."
    )


def _row(found: Found, i: int) -> list[Picture]:
    """The original and each shown method's recovery, with its PSNR."""
    name, truth = found.test.names[i], _truth(found, i)
    row = [Picture(png(truth, "gray"), f"{name}, the original", "Original", name)]
    reference = found.results["tv"]["psnr"][i]
    for method in _SHOWN:
        value = found.results[method]["psnr"][i]
        caption = f"{value:.2f} dB" + ("" if method == "tv" else f", {w.signed(value - reference)} against TV")
        row.append(Picture(png(_image(found, method, i), "gray"), f"{name} by {method}", _LABELS[method], caption))
    return row


def _truth(found: Found, i: int) -> np.ndarray:
    return found.test.x[i, 0].cpu().numpy()


def _image(found: Found, method: str, i: int) -> np.ndarray:
    return found.recoveries[method].images[i, 0].numpy()


def _detail(found: Found, i: int) -> tuple[int, int, int]:
    """Top, left and side of the detail with the most contrast: a square with a third of the image's shorter side."""
    truth = _truth(found, i)
    side = min(truth.shape) // 3
    step = max(1, side // 8)
    places = [
        (top, left)
        for top in range(0, truth.shape[0] - side + 1, step)
        for left in range(0, truth.shape[1] - side + 1, step)
    ]
    top, left = max(places, key=lambda p: float(truth[p[0] : p[0] + side, p[1] : p[1] + side].std()))
    return top, left, side


def _others(report: Report, found: Found, order: list[int]) -> None:
    """Add the other held-out images, by their gain."""
    report.section("The other held-out images", "The one with the smallest gain over total variation comes first.")
    middle = order[len(order) // 2]
    for i in order:
        if i != middle:
            report.pictures(_row(found, i), "four")


# -- figures -----------------------------------------------------------------------------------------------------------


def _table(report: Report, found: Found) -> None:
    results = found.results
    report.section(
        "All methods",
        f"PSNR in dB and SSIM on {len(found.test.x)} held-out images. 'minimum norm' is the solution of A x = y "
        f"nearest to mid-gray. The weight mu of TV is tuned on {TUNING} training images; the other ones are trained. "
        f"'{TRAINED}' began with DCT filters and one profile for all, not with shipped weights. '{BEST}' was trained "
        f"on other photographs (BSD400); 'deepreg-fast info {BEST.removeprefix('shipped ')}' prints its card.",
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


def _curves(report: Report, found: Found) -> None:
    """Add the curves of the recoveries and of the training."""
    curves = {_LABELS[n]: found.recoveries[n].curve for n in _SHOWN}
    lines = [Line(name, np.arange(1, len(c) + 1), np.array(c), style) for style, (name, c) in enumerate(curves.items())]
    ends = ", ".join(f"{name} {c[-1]:.2f} dB after {len(c)}" for name, c in curves.items())
    recovery = "Mean PSNR of the held-out images in the recoveries of the table."
    report.section(
        "Recovery and training",
        f"The training took {found.trainer.step_done} steps in {found.seconds:.0f} s on crops of {found.config.crop} × "
        f"{found.config.crop} pixels; mu went from {found.config.mu0:.2g} to {found.trainer.mu:.2g}.",
    )
    report.panels(
        [
            Panel(
                lines_figure(lines, "gradients of r (logarithmic)", "mean PSNR (dB)", "x"),
                recovery,
                f"{recovery} {ends}.",
            ),
            *_training(found),
        ]
    )
    active_guards = {k: v for k, v in found.trainer.counters.values.items() if v}
    report.table(("guard", "times"), [(k, str(v)) for k, v in active_guards.items()] or [("none acted", "")])


def _training(found: Found) -> list[Panel]:
    path = found.trainer.folder / "metrics.jsonl"
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


def _filters(report: Report, found: Found) -> None:
    """Add the trained filters, sorted by their strength at small responses."""
    with torch.no_grad():
        filters, coefficients = found.reg.net.numbers()
    strength = coefficients.sum(1) * filters.square().sum((1, 2, 3))
    order = torch.argsort(strength, descending=True, stable=True)
    report.section(
        "What was learned",
        f"The regularizer is a sum of {len(filters)} smooth profiles of filter responses, with "
        f"{sum(p.numel() for p in found.reg.parameters())} trained numbers in all. These are the filters, the one with "
        "the largest curvature at zero first; gray is 0.",
    )
    report.pictures([Picture(_filter(filters[i, 0]), f"Filter {int(i)}") for i in order.cpu()], "small", sharp=True)


def _filter(w: torch.Tensor) -> str:
    end = float(w.abs().max()) or 1.0
    return png(0.5 + 0.5 * w.cpu() / end, "gray")


def _statuses(report: Report, found: Found) -> None:
    report.section("How the recoveries ended")
    rows = [
        (name, status, str(count), Status[status.upper()].advice)
        for name, f in found.results.items()
        if f["mu"] is not None
        for status, count in f["status"].items()
    ]
    report.table(("method", "status", "images", "meaning"), rows)
