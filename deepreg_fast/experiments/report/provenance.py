"""Status of a reproduction's recoveries, and provenance of its numbers: settings, seeds, machine."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from ...report import format as w
from ...report.html import Report
from ...status import Status
from .record import DIRECT, GROUPS, Record, Row

_NETWORK = ("channels", "depth", "kernel_size", "norm", "head", "gain", "alpha")
_TRAINING = ("xi", "adjoint", "steps", "batch", "crop", "lr", "mu0", "seed", "init")


def statuses(report: Report, record: Record) -> None:
    """Add the statuses of the recoveries by row, their meaning, and the missing files of the run."""
    report.section("How the recoveries ended", "Images by the status of their recovery; an empty cell is none.")
    solved = [r for r in record.rows if r.method not in DIRECT]
    names = [s.name.lower() for s in Status]
    present = [n for n in names if any(r.number("status", n) for r in solved)]
    non_finite = [int((~np.isfinite(r.psnr)).sum()) for r in solved]
    head = ["method", "ratio", *(n.replace("_", " ") for n in present), "PSNR not finite"]
    lines: list[tuple[str, ...] | str] = []
    group = "paper"
    for row, failed in zip(solved, non_finite, strict=True):
        if row.group != group:
            group = row.group
            lines.append(GROUPS.get(group, group))
        counts = [row.number("status", n) for n in present]
        ratio = w.NONE if row.ratio is None else w.ratio(row.ratio)
        lines.append((row.label, ratio, *(f"{c:.0f}" if c else "" for c in counts), str(failed) if failed else ""))
    report.table(head, lines)
    meanings = [(n.replace("_", " "), Status[n.upper()].advice) for n in present]
    if meanings:
        report.table(("status", "meaning"), meanings)
    if record.missing:
        report.text(f"Missing of this run: {'; '.join(record.missing)}.")


def settings(report: Report, record: Record) -> None:
    """Add settings, seeds, machine, versions and commands."""
    report.section("Settings, seeds, machine")
    _key_values(report, "The problem", record.problem, "neither results.json nor settings.json contains it")
    _trainings(report, [r for r in record.rows if r.config])
    tuned = [r for r in record.rows if r.number("mu") is not None]
    if tuned:
        report.subsection("Weights and recoveries", "mu and scale as evaluated, trained or tuned.")
        head = ("row", "mu", "scale", "chosen", "recovery", "seeds")
        report.table(head, [(r.name, *_evaluated(r)) for r in tuned])
    machine = record.results.get("machine")
    if not isinstance(machine, dict):
        machine = next((m for r in record.rows if (m := r.table("machine"))), {})
    _key_values(report, "The machine", machine, "no row contains it")
    report.subsection("Versions and commands")
    for title, key in (("version", "version"), ("command", "command")):
        values = _shared(record.rows, lambda r, key=key: r.text(key) or "(not recorded)")
        report.table((title, "rows"), [(value, rows) for value, rows in values])
    if record.settings:
        report.details("All settings, as JSON", json.dumps(record.settings, indent=1, ensure_ascii=False))


def _trainings(report: Report, rows: list[Row]) -> None:
    keys = [k for k in (*_NETWORK, "beta", *_TRAINING) if any(k in r.config for r in rows)]
    if not rows:
        return
    report.subsection(
        "Trainings",
        "Settings of the last stage, where there are several; time and images per second of all stages, and the time "
        "with the trainings that were not chosen.",
    )
    lines = []
    for r in rows:
        seconds, seconds_all = r.number("training", "seconds"), r.number("training", "seconds_all")
        rate = w.significant(r.number("training", "images_per_second"), 3)
        times = (w.duration(seconds), w.duration(seconds_all if seconds_all != seconds else None), rate)
        lines.append((r.name, *(w.plain(r.config.get(k)) for k in keys), str(len(r.get("training", "stages"))), *times))
    report.table(("row", *keys, "stages", "time", "with all choices", "images/s"), lines)


def _evaluated(row: Row) -> tuple[str, ...]:
    mu, scale = w.significant(row.number("mu")), w.significant(row.number("scale"))
    return (mu, scale, *(w.pairs(row.table(k)) for k in ("chosen", "recovery", "seeds")))


def _shared(rows: Iterable[Row], key: Callable[[Row], str]) -> list[tuple[str, str]]:
    """Each value of `key` with the rows that have it, or "all"."""
    rows = list(rows)
    names_by_value: dict[str, list[str]] = {}
    for row in rows:
        names_by_value.setdefault(key(row), []).append(row.name)
    return [(value, "all" if len(names) == len(rows) else ", ".join(names)) for value, names in names_by_value.items()]


def _key_values(report: Report, title: str, values: dict[str, Any], otherwise: str) -> None:
    report.subsection(title, "" if values else f"Not known: {otherwise}.")
    if values:
        report.table(("", ""), [(str(k), w.plain(v)) for k, v in values.items() if v is not None])
