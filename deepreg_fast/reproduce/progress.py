"""What the parent shows while its children work: one line a task, read from the runs' own logs."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from typing import Any, Protocol

from .folder import Folder
from .history import last_line
from .settings import Settings


class Shown(Protocol):
    """A task, as far as it is shown."""

    name: str
    row: str
    chain: int


class Progress:
    """Bars on a terminal, else a line when a task begins or ends."""

    def __init__(self, folder: Folder, settings: Settings, total: int, bars: bool | None = None) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bars

        self.folder, self.settings = folder, settings
        self.console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
        self.began: dict[str, float] = {}
        self.bars = None
        self.tasks: dict[str, Any] = {}
        if sys.stderr.isatty() if bars is None else bars:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            self.bars = Bars(*columns, TextColumn("{task.fields[text]}"), console=self.console)
            self.bars.start()
            self.whole = self.bars.add_task("all", total=total, text="")

    def start(self, task: Shown) -> None:
        """A task begins."""
        self.began[task.name] = time.monotonic()
        if self.bars is None:
            self.console.print(f"{task.name}: begins")
        else:
            self.tasks[task.name] = self.bars.add_task(task.name, total=self._total(task), text="")

    def end(self, task: Shown, text: str) -> None:
        """A task has ended as `text` says."""
        seconds = time.monotonic() - self.began[task.name]
        self.console.print(f"{task.name}: {text} after {seconds:.0f} s")
        if self.bars is not None:
            self.bars.remove_task(self.tasks.pop(task.name))
            self.bars.advance(self.whole)

    def look(self, running: Iterable[Shown]) -> None:
        """Read how far the running tasks are."""
        if self.bars is None:
            return
        for task in running:
            step, text = self._state(task)
            self.bars.update(self.tasks[task.name], completed=step, text=text)

    def close(self) -> None:
        """Take the bars away."""
        if self.bars is not None:
            self.bars.stop()

    def _total(self, task: Shown) -> int | None:
        if task.chain < 0:
            return None
        return sum(s.config["steps"] for s in self.settings[task.row].chains[task.chain].stages)

    def _state(self, task: Shown) -> tuple[int, str]:
        """Steps done in all stages, and the newest stage with its loss."""
        if task.chain < 0:
            return 0, "evaluating"
        row, done, text = self.settings[task.row], 0, ""
        stages = row.chains[task.chain].stages
        for i, stage in enumerate(stages):
            line = last_line(self.folder.stage(row, stage) / "metrics.jsonl")
            if line:
                done += line["step"]
                text = (f"stage {i + 1} of {len(stages)}, " if len(stages) > 1 else "") + f"loss {line['loss']:.3g}"
        return done, text
