"""Progress display of a reproduction: one line per task, read from the runs' logs."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from ..terminal import INTERVAL, Pulse, console, is_terminal, say
from .folder import Folder
from .settings import Settings
from .training_curves import last_line


class Shown(Protocol):
    """The attributes of a task that are displayed."""

    name: str
    row: str
    chain: int


class Progress:
    """Bars on a terminal; otherwise a line when a task starts or ends, and one every half minute."""

    def __init__(
        self,
        folder: Folder,
        settings: Settings,
        total: int,
        bars: bool | None = None,
        interval: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.folder, self.settings, self.clock = folder, settings, clock
        self.began: dict[str, float] = {}
        self.bars: Any = None
        self.tasks: dict[str, Any] = {}
        # Printed by `look`, which the parent calls many times per second.
        self.pulse = Pulse("reproduce", total, "tasks", clock=clock)
        self.interval, self.seen = INTERVAL if interval is None else interval, clock()
        if is_terminal(sys.stderr) if bars is None else bars:
            self.bars = self._begin_bars(total)

    def _begin_bars(self, total: int) -> Any:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bars

        name, text = (TextColumn(t, markup=False) for t in ("{task.description}", "{task.fields[text]}"))
        bars = Bars(name, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), text, console=console(sys.stderr))
        bars.start()
        self.overall = bars.add_task("all", total=total, text="")
        return bars

    def _print(self, text: str) -> None:
        if self.bars is None:
            say(text)
        else:
            self.bars.console.print(text, soft_wrap=True)

    def start(self, task: Shown) -> None:
        """Show that a task starts."""
        self.began[task.name] = self.clock()
        if self.bars is None:
            say(f"{task.name}: begins")
        else:
            self.tasks[task.name] = self.bars.add_task(task.name, total=self._total(task), text="")

    def end(self, task: Shown, text: str) -> None:
        """Show that a task has ended; `text` says how."""
        seconds = self.clock() - self.began[task.name]
        self._print(f"{task.name}: {text} after {seconds:.0f} s")
        self.pulse.done()
        if self.bars is not None:
            self.bars.remove_task(self.tasks.pop(task.name))
            self.bars.advance(self.overall)

    def look(self, running: Iterable[Shown]) -> None:
        """Update the display of the running tasks."""
        if self.bars is not None:
            for task in running:
                step, text = self._state(task)
                self.bars.update(self.tasks[task.name], completed=step, text=text)
        elif self.clock() - self.seen >= self.interval:
            self.seen = self.clock()
            self.pulse.begin("; ".join(self._brief(task) for task in running))
            self.pulse.beat()

    def close(self) -> None:
        """Remove the bars."""
        if self.bars is not None:
            self.bars.stop()

    def _brief(self, task: Shown) -> str:
        """A task and its progress as text."""
        step, text = self._state(task)
        total = self._total(task)
        return f"{task.name}: " + (f"step {step} of {total}" if total else text)

    def _total(self, task: Shown) -> int | None:
        if task.chain < 0:
            return None
        return sum(s.config["steps"] for s in self.settings[task.row].chains[task.chain].stages)

    def _state(self, task: Shown) -> tuple[int, str]:
        """Steps done in all stages, and a text with the current stage and its loss."""
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
