"""Tables of a reproduction's report."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from ...report import format as w
from ...report.html import Report
from .record import DIRECT, GROUPS, Record, Row

PAIRS = (
    (("bilevel", 10.0), ("denoiser", None)),
    (("bilevel", 10.0), ("gradient_step", None)),
    (("bilevel", 10.0), ("bilevel", 1.0)),
    (("bilevel", 10.0), ("bilevel", 3.0)),
    (("bilevel", 3.0), ("bilevel", 1.0)),
)
"""Pairs of rows, by method and beta, whose differences are compared with the poster's."""


def summary(record: Record) -> str:
    """The main result in a sentence or two."""
    best = record.best_bilevel()
    if best is None or best.ratio is None:
        return "No bi-level row has a result yet; what there is stands below."
    text = (
        f"At ratio {w.ratio(best.ratio)} the best bi-level row, “{best.label}”, recovers {len(best.psnr)} test images "
        f"at {w.fixed(best.number('psnr_mean'), 2)} dB in the mean and {w.fixed(best.number('psnr_median'), 2)} dB in "
        f"the median{_above_tv(record, best)}."
    )
    papers = record.best_bilevel("paper")
    if papers is not None and papers is not best:
        mean = w.fixed(papers.number("psnr_mean"), 2)
        text += f" The paper's best, “{papers.label}”, has {mean} dB in the mean{_above_tv(record, papers)}."
    return f"{text} {poster_fit(record)}".strip()


def _above_tv(record: Record, row: Row) -> str:
    stats = row.against(record.tv(row.ratio))
    if not stats:
        return ""
    low, high = stats["interval"]
    return (
        f": {w.signed(stats['mean'])} dB against tuned total variation on the same images (95 % bootstrap interval "
        f"{w.signed(low)} to {w.signed(high)}), better than it on {w.wins(stats)}"
    )


def poster_fit(record: Record) -> str:
    """A sentence about the ratio at which our numbers are closest to the poster's, over the rows that have both."""
    distances = {}
    for ratio in record.ratios:
        pairs = [(r.number("psnr_mean"), r.number("poster", "psnr")) for r in record.at(ratio)]
        errors = [abs(a - b) for a, b in pairs if a is not None and b is not None]
        if errors:
            distances[ratio] = (float(np.mean(errors)), len(errors))
    if len(distances) < 2:
        return ""
    nearest = min(distances, key=lambda ratio: distances[ratio][0])
    texts = [f"{d:.1f} dB at ratio {w.ratio(ratio)} ({n} rows)" for ratio, (d, n) in distances.items()]
    return f"The poster's PSNR fits ratio {w.ratio(nearest)}: ours are apart from it by {w.listed(texts)} on average."


def headline(report: Report, record: Record) -> None:
    """Add every row's results next to the poster's, one table per ratio."""
    report.section(
        "The table",
        "PSNR in dB and SSIM on the same test images. The poster's 30 images are unknown, so its numbers stand beside "
        "ours and the comparison is with tuned total variation (TV): the mean paired difference in dB with a 95 % "
        "bootstrap interval, and on how many images a method is better. Gradients and ms are the median and the mean "
        "per image, to convergence by the row's own recovery.",
    )
    head = (
        "method",
        "PSNR mean",
        "PSNR median",
        "SSIM",
        "poster's PSNR / SSIM",
        "against TV",
        "wins",
        "parameters",
        "training",
        "gradients",
        "ms",
        "ended",
    )
    for ratio in record.ratios:
        report.subsection(f"Ratio {w.ratio(ratio)}")
        lines: list[tuple[str, ...] | str] = []
        scores: dict[int, float] = {}
        for group in ("paper", "beyond"):
            rows = record.at(ratio, group)
            if rows and group == "beyond":
                lines.append(GROUPS[group])
            for row in rows:
                scores[len(lines)] = row.number("psnr_mean") or -math.inf
                lines.append(_headline_row(record, row))
        report.table(head, lines, max(scores, key=lambda k: scores[k]) if scores else None)


def _headline_row(record: Record, row: Row) -> tuple[str, ...]:
    tv = record.tv(row.ratio)
    stats = None if row is tv else row.against(tv) or row.table("vs_tv")
    return (
        row.label,
        w.fixed(row.number("psnr_mean"), 2),
        w.fixed(row.number("psnr_median"), 2),
        w.fixed(row.number("ssim_mean"), 3),
        _poster(row),
        w.difference(stats),
        w.wins(stats),
        w.whole(row.number("parameters") or None),
        w.duration(row.number("training", "seconds")),
        w.NONE if row.method in DIRECT else w.whole(w.median(row.numbers("gradients"))),
        w.milliseconds(row.number("seconds"), len(row.psnr)),
        w.NONE if row.method in DIRECT else w.counted(row.table("status")),
    )


def differences(report: Report, record: Record) -> None:
    """Add the poster's differences between rows, next to ours."""
    report.section(
        "The poster's differences",
        "Differences between methods do not move with the draw of the images as means do. Ours are paired, image by "
        "image, with a 95 % bootstrap interval of the mean; the last column is ours minus the poster's, in dB.",
    )
    head = ("difference", "ours", "median", "wins", "poster's", "ours − poster's")
    missing = []
    for ratio in record.ratios:
        lines = []
        for a, b in PAIRS:
            first, second = _pick(record, ratio, *a), _pick(record, ratio, *b)
            if first is None or second is None:
                missing.append(f"{_kind(*a)} − {_kind(*b)} at {w.ratio(ratio)}")
                continue
            stats = first.against(second)
            poster = _minus(first.number("poster", "psnr"), second.number("poster", "psnr"))
            ours = stats["mean"] if stats else None
            name = f"{first.label} − {second.label}"
            median = w.signed(stats["median"] if stats else None)
            excess = w.signed(_minus(ours, poster))
            lines.append((name, w.difference(stats), median, w.wins(stats), w.signed(poster), excess))
        if lines:
            report.subsection(f"Ratio {w.ratio(ratio)}")
            report.table(head, lines)
    report.text(f"Not there, for want of a row: {'; '.join(missing)}." if missing else "")


def convergence(report: Report, record: Record) -> None:
    """Add iterations, gradients and time of every row's recovery."""
    head = (
        "method",
        "acceleration",
        "iterations median",
        "iterations most",
        "gradients median",
        "gradients most",
        "ms per image",
        "converged",
    )
    for ratio in record.ratios:
        lines: list[tuple[str, ...] | str] = []
        for row in (r for r in record.at(ratio, "paper", "beyond") if r.method not in DIRECT):
            steps, gradients = row.numbers("iterations"), row.numbers("gradients")
            ended = row.number("status", "converged") or 0
            lines.append(
                (
                    row.label,
                    row.text("recovery", "acceleration") or w.NONE,
                    w.whole(w.median(steps)),
                    w.whole(w.largest(steps)),
                    w.whole(w.median(gradients)),
                    w.whole(w.largest(gradients)),
                    w.milliseconds(row.number("seconds"), len(row.psnr)),
                    f"{ended:.0f} of {len(row.psnr)}" if row.table("status") else w.NONE,
                )
            )
        if lines:
            report.subsection(f"Ratio {w.ratio(ratio)}")
            report.table(head, lines)


def ledger(report: Report, record: Record) -> None:
    """Add the changes of the PSNR if a setting that the paper does not state changes; nothing without such rows."""
    rows = [r for r in record.rows if r.group == "ledger" and r.text("compare")]
    if not rows:
        return
    report.section(
        "The ledger of unstated settings",
        "Each row differs from the one it is compared with by one setting that the paper leaves open. The change of "
        "the PSNR is paired over the test images, in dB with a 95 % bootstrap interval; the cost is training and "
        "recovery time of the other value over that of ours.",
    )
    head = ("unstated", "our choice", "other value", "change of PSNR", "wins", "training", "recovery", "PSNR")
    lines = []
    for row in sorted(rows, key=lambda r: r.text("unstated")):
        base = record.named(row.text("compare"))
        stats = row.against(base)
        lines.append(
            (
                row.text("unstated") or row.text("setting") or row.label,
                _setting(base, row.text("setting")),
                w.plain(row.get("value")),
                w.difference(stats),
                w.wins(stats),
                w.times(_over(row.number("training", "seconds"), base and base.number("training", "seconds"))),
                w.times(_over(row.number("seconds"), base and base.number("seconds"))),
                w.fixed(row.number("psnr_mean"), 2),
            )
        )
    report.table(head, lines)
    missing = sorted({r.text("compare") for r in rows if record.named(r.text("compare")) is None})
    report.text(f"Not there to compare with: {w.listed(missing)}." if missing else "")


def _pick(record: Record, ratio: float, method: str, beta: float | None) -> Row | None:
    """The paper's row of this method and beta; rows with a number on the poster are preferred."""
    rows = [r for r in record.at(ratio, "paper") if r.method == method and (beta is None or r.number("beta") == beta)]
    return min(rows, key=lambda r: r.number("poster", "psnr") is None, default=None)


def _kind(method: str, beta: float | None) -> str:
    return f"{method.replace('_', '-')}{'' if beta is None else f' β = {beta:g}'}"


def _setting(row: Row | None, name: str) -> str:
    """A row's value of a setting of its training, of its recovery, or of the row itself."""
    if row is None or not name:
        return w.NONE
    sources: Iterable[dict[str, Any]] = (row.config, row.table("recovery"), row.data)
    return next((w.plain(s[name.split(".")[-1]]) for s in sources if name.split(".")[-1] in s), w.NONE)


def _poster(row: Row) -> str:
    psnr, ssim = row.number("poster", "psnr"), row.number("poster", "ssim")
    return w.NONE if psnr is None and ssim is None else f"{w.fixed(psnr, 2)} / {w.fixed(ssim, 2)}"


def _minus(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


def _over(a: float | None, b: float | None) -> float | None:
    return a / b if a is not None and b else None
