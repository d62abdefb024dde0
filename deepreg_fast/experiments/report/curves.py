"""Curves of a reproduction's report: recovery, training, Lipschitz constants."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from ...report import format as w
from ...report.figures import Line, Strip, lines_figure, strips_figure
from ...report.html import Panel, Report
from .record import DIRECT, GROUPS, Record, Row

POSTER = (
    "On the poster all curves start near 11 dB; RED peaks near 26.7 dB at iteration 8 and then falls, gradient-step "
    "is flat from iteration 7 and β = 1 from 12; β = 10 is slow, about 21.4 dB at 9 and 25.2 dB at 15, flat from 35."
)
Curve = tuple[np.ndarray, np.ndarray]


def parts(record: Record) -> Iterator[tuple[str, list[tuple[Row, int | None]]]]:
    """Title and rows of each figure: the rows of one ratio and group, with TV as the reference, and their styles."""
    for ratio in record.ratios:
        tv = record.tv(ratio)
        for group in ("paper", "beyond"):
            rows = [r for r in record.at(ratio, group) if r.method not in (*DIRECT, "tv")]
            reference: list[tuple[Row, int | None]] = [(tv, None)] if tv else []
            if rows or (reference and group == "paper"):
                title = f"Ratio {w.ratio(ratio)}, {GROUPS[group][0].lower()}{GROUPS[group][1:]}"
                yield title, [*reference, *((r, i) for i, r in enumerate(rows))]


def recovery(report: Report, record: Record) -> None:
    """Add PSNR against iterations of plain PGD, and against gradients of each row's recovery."""
    report.section(
        "PSNR on the way",
        "Left: plain proximal gradient descent with backtracking, as on the poster, whatever recovery a row has "
        "otherwise. Right: each row's own recovery until it ends, by gradients of r taken. Mean over the test images. "
        + POSTER,
    )
    drawn = False
    for title, rows in parts(record):
        panels = [
            *_panel(rows, lambda r: r.curve("iterations", "psnr_mean", "trajectory"), "iteration", "mean PSNR (dB)"),
            *_panel(
                rows,
                lambda r: r.curve("gradients", "psnr_mean", "converged"),
                "gradients of r (log scale)",
                "mean PSNR (dB)",
                log="x",
            ),
        ]
        if panels:
            drawn = True
            report.subsection(title)
            report.panels(panels)
            _overshoot(report, rows)
    report.text("" if drawn else "No row has recorded its way yet.")


def _overshoot(report: Report, rows: Sequence[tuple[Row, int | None]]) -> None:
    lines = []
    for row, _ in rows:
        x, y = row.curve("iterations", "psnr_mean", "trajectory")
        if len(x):
            top = int(np.argmax(y))
            near = x[int(np.argmax(np.abs(y - y[-1]) <= 0.1))] if (np.abs(y - y[-1]) <= 0.1).any() else None
            gradients = row.numbers("trajectory", "gradients_mean")
            taken = float(gradients[-1]) if len(gradients) and np.isfinite(gradients[-1]) else None
            fall = w.fixed(float(y[top] - y[-1]), 2)
            lines.append(
                (row.label, *(w.fixed(float(v), 2) for v in (y[0], y[top])), w.whole(float(x[top])))
                + (w.fixed(float(y[-1]), 2), fall, w.whole(near), w.whole(taken))
            )
    if lines:
        head = ("plain descent", "first dB", "highest dB", "at iteration", "last dB", "fall", "within 0.1 dB from")
        report.table((*head, "gradients"), lines)


def training(report: Report, record: Record) -> None:
    """Add loss, validation PSNR and mu by step."""
    report.section(
        "Training",
        "Loss at each visit (faint) and its running mean; validation PSNR from a cold start; the weight mu. The loss "
        "of a method that is not bi-level is its own and has no scale in common with the others.",
    )
    drawn = False
    for title, rows in parts(record):
        bilevel = [(r, s) for r, s in rows if r.method == "bilevel"]
        others = [(r, s) for r, s in rows if r.method not in ("bilevel", "tv")]
        panels = [
            *_panel(bilevel, _of_training("loss"), "step", "loss", log="y", smooth=True),
            *_panel(bilevel, _of_training("val_psnr"), "step", "validation PSNR (dB)"),
            *_panel(bilevel, _of_training("mu"), "step", "mu", log="y"),
        ]
        for row, style in others:
            panels += _panel([(row, style)], _of_training("loss"), "step", "loss", log="y", smooth=True)
        if panels:
            drawn = True
            report.subsection(title)
            report.panels(panels)
    report.text("" if drawn else "No row has recorded its training yet.")


def lipschitz(report: Report, record: Record) -> None:
    """Add beta_hat in training and on test images, the extreme eigenvalues of hess s, and where r is convex."""
    report.section(
        "Lipschitz constants",
        "The penalty holds β̂, the largest quotient ‖∇s(x) − ∇s(x+δ)‖ / ‖δ‖ that its δ finds, below β on training "
        "images. On test images β̂ stands beside Lanczos estimates of the smallest and the largest eigenvalue of "
        "∇²s(x). A regularizer is convex at x where λmax ≤ 1 + α. The estimates come from inside the spectrum, so λmax "
        "may be larger than shown and the counts are upper bounds.",
    )
    drawn = False
    for title, rows in parts(record):
        with_spectrum = [r for r, _ in rows if np.isfinite(r.numbers("lipschitz", "lambda_max")).any()]
        panels = [
            *_panel(rows, _of_training("beta_hat"), "step", "β̂ on training images", smooth=True),
            *_spectra(record, with_spectrum),
        ]
        if not panels:
            continue
        drawn = True
        report.subsection(title)
        report.panels(panels)
        if with_spectrum:
            report.text(convexity(record, with_spectrum))
            head = ("method", "β", "β̂ training", "β̂ test median", "β̂ test largest", "λmax median", "λmax largest")
            report.table(
                (*head, "λmin median", "λmin smallest", "convex at"), [_spectrum_row(record, r) for r in with_spectrum]
            )
    report.text("" if drawn else "No row has recorded them yet.")


def convexity(record: Record, rows: Sequence[Row]) -> str:
    """A sentence with the number of test images at which r is convex."""
    counts = {f"“{row.label}”": _convex(record, row) for row in rows}
    convex = [f"{c[0]} of {c[1]} test images for {label}" for label, c in counts.items() if c and c[0]]
    not_convex = [label for label, c in counts.items() if c and not c[0]]
    unknown = [label for label, c in counts.items() if c is None]
    phrases = [f"on {w.listed(convex)}"] if convex else []
    phrases += [f"on none for {w.listed(not_convex)}"] if not_convex else []
    text = f"λmax ≤ 1 + α, so that r is convex as far as the estimates tell, {'; '.join(phrases)}." if phrases else ""
    return text + (f" Not counted, alpha not being recorded: {w.listed(unknown)}." if unknown else "")


def gradients(report: Report, record: Record) -> None:
    """Add the number of gradients to convergence of every image."""
    panels = []
    for title, rows in parts(record):
        strips = {}
        for row, style in rows:
            values = row.numbers("gradients")
            values = values[np.isfinite(values) & (values > 0)]
            if len(values):
                strips[row.label] = [Strip(values, style)]
        if strips:
            alt = "Gradients to the end of the recovery per image. Median: " + _ends(
                {name: w.whole(w.median(np.asarray(s[0].values))) for name, s in strips.items()}
            )
            svg = strips_figure(strips, "gradients of r per image (log scale)", log=True)
            panels.append(Panel(svg, f"{title}: a dot is an image, the stroke their median.", alt))
    report.panels(panels)


def _convex(record: Record, row: Row) -> tuple[int, int] | None:
    alpha = record.alpha(row)
    if alpha is None:
        return None
    largest = row.numbers("lipschitz", "lambda_max")
    largest = largest[np.isfinite(largest)]
    return int((largest <= 1.0 + alpha).sum()), len(largest)


def _spectrum_row(record: Record, row: Row) -> tuple[str, ...]:
    beta, low, high = (row.numbers("lipschitz", k) for k in ("beta_hat", "lambda_min", "lambda_max"))
    convex = _convex(record, row)
    smallest = w.largest(-low)
    bound = row.number("beta")
    return (
        row.label,
        w.NONE if bound is None else f"{bound:g}" if bound else "none",
        w.fixed(row.number("lipschitz", "beta_hat_train"), 2),
        w.fixed(w.median(beta), 2),
        w.fixed(w.largest(beta), 2),
        w.fixed(w.median(high), 2),
        w.fixed(w.largest(high), 2),
        w.fixed(w.median(low), 2),
        w.fixed(None if smallest is None else -smallest, 2),
        w.NONE if convex is None else f"{convex[0]} of {convex[1]}",
    )


def _spectra(record: Record, rows: Sequence[Row]) -> list[Panel]:
    if not rows:
        return []
    kinds = (("lambda_min", "λmin(∇²s)", 1), ("beta_hat", "β̂", 2), ("lambda_max", "λmax(∇²s)", 0))
    strips = {}
    for row in rows:
        series = [(row.numbers("lipschitz", key), style) for key, _, style in kinds]
        strips[row.label] = [Strip(v[np.isfinite(v)], style) for v, style in series if np.isfinite(v).any()]
    alphas = {record.alpha(r) for r in rows}
    alpha = alphas.pop() if len(alphas) == 1 else None
    mark = None if alpha is None else 1.0 + alpha
    caption = "On test images; a dot is an image, the stroke their median."
    if mark is not None:
        caption += f" Dashed: 1 + α = {mark:g}, up to which λmax leaves r convex."
    alt = (
        caption
        + " Medians of λmax: "
        + _ends({r.label: w.fixed(w.median(r.numbers("lipschitz", "lambda_max")), 1) for r in rows})
    )
    legend = [(name, style) for _, name, style in kinds]
    return [Panel(strips_figure(strips, "eigenvalues of ∇²s and β̂", mark=mark, legend=legend), caption, alt)]


def _of_training(key: str) -> Callable[[Row], Curve]:
    return lambda row: row.curve("step", key, "training", "curve")


def _panel(
    rows: Sequence[tuple[Row, int | None]],
    curve: Callable[[Row], Curve],
    xlabel: str,
    ylabel: str,
    log: str = "",
    smooth: bool = False,
) -> list[Panel]:
    """A chart of the rows that have this curve; empty if none has. Negative values force a linear scale."""
    lines = []
    for row, style in rows:
        x, y = curve(row)
        if len(x):
            lines.append(Line(row.label, x, y, style, smooth))
    if not lines:
        return []
    if any(np.min(line.y) < 0 for line in lines):
        log = log.replace("y", "")
    alt = f"Lines: {ylabel} against {xlabel}. Last values: " + _ends({n.name: f"{n.y[-1]:.4g}" for n in lines})
    svg = lines_figure(lines, xlabel, ylabel, log)
    return [Panel(svg, "", alt)]


def _ends(values: dict[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items()) + "."
