"""Report of `deepreg-fast reproduce`, built from the folder only."""

from __future__ import annotations

from pathlib import Path

from ...report.html import Report
from . import curves, provenance, tables
from .pictures import pictures
from .record import read


def write_report(folder: Path) -> Path:
    """Write `folder/report.html` from settings.json, results.json and rows/*; return its path.

    If the run is unfinished or fields are missing, the report is shorter and lists what is missing.

    Raises
    ------
    InputError
        If the folder does not belong to a reproduction, or the report cannot be written.
    """
    record = read(Path(folder))
    report = Report("The bi-level compressed sensing experiment, reproduced", tables.summary(record))
    if record.missing:
        report.text(f"This run is not complete: {len(record.missing)} of its files are missing, listed below.")
    tables.headline(report, record)
    curves.recovery(report, record)
    tables.differences(report, record)
    curves.training(report, record)
    curves.lipschitz(report, record)
    report.section("Iterations and time to convergence", "Of each row's own recovery, from a cold start.")
    curves.gradients(report, record)
    tables.convergence(report, record)
    pictures(report, record)
    tables.ledger(report, record)
    provenance.statuses(report, record)
    provenance.settings(report, record)
    path = Path(folder) / "report.html"
    report.write(path)
    return path
