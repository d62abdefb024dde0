"""Run of a reproduction: compare the settings with the folder's, run the missing tasks, write the tables."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import checks
from ..data import image_names
from ..files import make_folder
from .folder import Folder, agree, locked
from .progress import Progress
from .results import collect
from .scheduler import Outcome, Runner, plan
from .settings import Settings


@dataclass
class Reproduction:
    """Result of a run: the results of all finished rows, the report, and the error messages by task."""

    results: list[dict[str, Any]]
    report: Path | None
    failed: dict[str, str] = field(default_factory=dict)
    fatal: str = ""
    stopped: bool = False


def reproduce(  # noqa: PLR0913 - what, where and how
    settings: Settings,
    out: str | Path,
    *,
    rows: tuple[str, ...] = (),
    group: str = "",
    device: str = "cpu",
    workers: int = 0,
    report_only: bool = False,
    command: str = "",
) -> Reproduction:
    """Train and evaluate what is missing in the folder `out`; write `results.json`, `results.csv` and `report.html`.

    Parameters
    ----------
    settings : Settings
        For example `load_settings("bsd400").with_data("BSD400")`.
    rows, group : only these rows (and the rows that they start from); by default all.
    device : "cpu", "cuda", "cuda:1" or "auto".
    workers : number of parallel processes; 0 for one per core on a CPU and one on a GPU.
    report_only : run nothing; write the tables from the existing results.
    command : recorded with the results.

    Raises
    ------
    InputError
        If another process uses the folder, or settings of a started row have changed.
    DataError
        If the images are missing.
    """
    folder = Folder(Path(out))
    make_folder(folder.path)
    with locked(folder.path / "lock", f"The reproduction in {folder.path}"):
        chosen = settings.select(rows, group)
        all_settings = agree(folder, settings)
        outcome = Outcome()
        if not report_only:
            outcome = _run(folder, all_settings, chosen, str(checks.device(device)), workers, command)
        results = collect(folder, all_settings)
        report = None
        if results and not outcome.stopped:
            from .report.write import write_report

            report = write_report(folder.path)
        return Reproduction(results, report, outcome.failed, outcome.fatal, outcome.stopped)


def _run(folder: Folder, settings: Settings, chosen: Settings, device: str, workers: int, command: str) -> Outcome:
    for data in sorted({r.problem.data for r in chosen.rows} - {"embedded"}):
        image_names(data)
    tasks = plan(folder, settings, chosen)
    progress = Progress(folder, settings, len(tasks))
    count = checks.integer(workers, "workers", 0) or (_cores() if device == "cpu" else 1)
    try:
        return Runner(folder, progress, count, device, command).run(tasks)
    finally:
        progress.close()


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
