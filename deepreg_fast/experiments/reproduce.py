"""One reproduction: agree on the settings, run what is missing, write the tables."""

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
    """What a run left: the results of all rows that have one, the report, and what failed by task."""

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
    """Train and evaluate what is missing in the folder `out`, then write `results.json`, `results.csv`, `report.html`.

    Parameters
    ----------
    settings : Settings
        `load_settings("bsd400").with_data("BSD400")`, say.
    rows, group : only these rows (and those they begin from); by default all.
    device : "cpu", "cuda", "cuda:1" or "auto".
    workers : processes at a time; 0 takes one for each core on a CPU and one on a GPU.
    report_only : run nothing, write the tables from what is there.
    command : kept with the results.

    Raises
    ------
    InputError
        If another process works in the folder, or settings of a row that was begun have changed.
    DataError
        If the images are not there.
    """
    folder = Folder(Path(out))
    make_folder(folder.path)
    with locked(folder.path / "lock", f"The reproduction in {folder.path}"):
        chosen = settings.select(rows, group)
        whole = agree(folder, settings)
        outcome = Outcome()
        if not report_only:
            outcome = _run(folder, whole, chosen, str(checks.device(device)), workers, command)
        results = collect(folder, whole)
        report = None
        if results and not outcome.stopped:
            from .report.write import write_report

            report = write_report(folder.path)
        return Reproduction(results, report, outcome.failed, outcome.fatal, outcome.stopped)


def _run(folder: Folder, whole: Settings, chosen: Settings, device: str, workers: int, command: str) -> Outcome:
    for data in sorted({r.problem.data for r in chosen.rows} - {"embedded"}):
        image_names(data)
    tasks = plan(folder, whole, chosen)
    progress = Progress(folder, whole, len(tasks))
    count = checks.integer(workers, "workers", 0) or (_cores() if device == "cpu" else 1)
    try:
        return Runner(folder, progress, count, device, command).run(tasks)
    finally:
        progress.close()


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
