"""Rows as a graph of tasks, each a process; the longest way through the graph first."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from .folder import Folder
from .job import FATAL, SAFE, STOPPED, Job
from .progress import Progress
from .settings import Row, Settings, in_order

# A child writes its checkpoint after the step (or validation) at hand; then it is ended by force.
_PATIENCE = 90.0
_POLL = 0.1
# Pieces of an evaluation, in the unit of `Stage.cost`: it comes after every training of the same length.
_SCORE_COST = 1.0


@dataclass
class Task:
    """A chain of trainings (`chain` its number) or a row's evaluation (`chain` -1), after the tasks `needs`."""

    name: str
    row: str
    chain: int
    needs: tuple[str, ...]
    cost: float
    urgency: float = 0.0


@dataclass
class Outcome:
    """What became of the tasks: sentences of those that failed by name, of a failure that ended everything, and whether
    the run was told to stop."""

    failed: dict[str, str] = field(default_factory=dict)
    fatal: str = ""
    stopped: bool = False


def plan(folder: Folder, settings: Settings, chosen: Settings) -> dict[str, Task]:
    """The tasks that are not finished, by name."""
    tasks: dict[str, Task] = {}
    for row in in_order(chosen.rows):
        chains = []
        for k, chain in enumerate(row.chains):
            if not all(folder.finished(row, s) for s in chain.stages):
                source = (_start(settings[row.init]),) if row.init else ()
                name = _training(row, k)
                tasks[name] = Task(name, row.name, k, source, sum(s.cost for s in chain.stages))
                chains.append(name)
        source = (_start(settings[row.weights]),) if row.weights else ()
        if chains or not folder.result(row).exists() or any(s in tasks for s in source):
            name = f"{row.name} evaluation"
            tasks[name] = Task(name, row.name, -1, (*chains, *source), _SCORE_COST)
    for task in tasks.values():
        task.needs = tuple(n for n in task.needs if n in tasks)
    for name in tasks:
        _urgency(name, tasks)
    return tasks


def _training(row: Row, k: int) -> str:
    folder = row.chains[k].stages[0].folder.partition("/")[0]
    return f"{row.name} training" if len(row.chains) == 1 else f"{row.name} training {folder}"


def _start(source: Row) -> str:
    """The task after which `Folder.start(source)` is there."""
    return _training(source, 0) if len(source.chains) == 1 else f"{source.name} evaluation"


def _urgency(name: str, tasks: dict[str, Task]) -> float:
    """Cost of the longest way from a task on to the end."""
    task = tasks[name]
    if not task.urgency:
        after = [t for t, other in tasks.items() if name in other.needs]
        task.urgency = task.cost + max((_urgency(t, tasks) for t in after), default=0.0)
    return task.urgency


class Runner:
    """Runs tasks in at most `workers` processes, one thread each on a CPU."""

    def __init__(self, folder: Folder, progress: Progress, workers: int, device: str, command: str) -> None:
        self.folder, self.progress, self.workers = folder, progress, workers
        self.device, self.command = device, command
        self.running: dict[str, _Child] = {}
        self.outcome = Outcome()

    def run(self, tasks: dict[str, Task]) -> Outcome:
        """Run all of them; a failure stops only what needs it, unless nothing can go on."""
        waiting = dict(tasks)
        with _signals(self._stop):
            while (waiting or self.running) and not (self.outcome.stopped or self.outcome.fatal):
                self._begin(waiting)
                time.sleep(_POLL)
                self.progress.look(c.task for c in self.running.values())
                for child in [c for c in self.running.values() if c.process.poll() is not None]:
                    self._end(child, waiting)
            self._end_all()
        return self.outcome

    def _stop(self) -> None:
        self.outcome.stopped = True

    def _begin(self, waiting: dict[str, Task]) -> None:
        """Start the most urgent tasks that can start."""
        busy = {*waiting, *self.running}
        ready = [t for t in waiting.values() if not busy.intersection(t.needs)]
        for task in sorted(ready, key=lambda t: -t.urgency)[: max(0, self.workers - len(self.running))]:
            del waiting[task.name]
            self.running[task.name] = _Child(task, self._job(task))
            self.progress.start(task)

    def _job(self, task: Task) -> Job:
        threads = 0 if self.device.startswith("cuda") else 1
        return Job(str(self.folder.path), task.row, task.chain, self.device, threads, self.command)

    def _end(self, child: _Child, waiting: dict[str, Task]) -> None:
        """Take note of how a child ended."""
        task, code = child.task, child.process.wait()
        del self.running[task.name]
        if code == 0:
            self.progress.end(task, "done")
            return
        if code == STOPPED:
            # Nobody of ours told it to: the same key or signal reached the whole group.
            self.outcome.stopped = True
            self.progress.end(task, "stopped")
            return
        self.progress.end(task, "failed")
        if code == FATAL:
            self.outcome.fatal = child.sentence()
            return
        self.outcome.failed[task.name] = child.sentence()
        lost = {task.name}
        while more := [n for n, t in waiting.items() if lost.intersection(t.needs)]:
            for name in more:
                del waiting[name]
                lost.add(name)
                self.outcome.failed[name] = f"it needs '{task.name}', which failed."

    def _end_all(self) -> None:
        """Tell the children to stop, and end by force those that do not."""
        for child in self.running.values():
            child.process.terminate()
        until = time.monotonic() + _PATIENCE
        for child in self.running.values():
            try:
                child.process.wait(max(0.1, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.process.kill()
                child.process.wait()
            self.progress.end(child.task, "stopped")
        self.running.clear()


class _Child:
    """A process at work on a task. Its stdin stays open as long as this process lives; its stderr is read."""

    def __init__(self, task: Task, job: Job) -> None:
        self.task = task
        # OMP_NUM_THREADS must be there before torch is loaded.
        threads = {"OMP_NUM_THREADS": str(job.threads)} if job.threads else {}
        self.process = subprocess.Popen(
            job.argv(),
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env={**os.environ, **threads, **SAFE},
        )
        self._text = b""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        while piece := self.process.stderr.read1(4096):  # type: ignore[attr-defined]
            self._text = (self._text + piece)[-20_000:]

    def sentence(self) -> str:
        """Why it failed: its last line, or what the system did to it."""
        self._reader.join(5.0)
        code = self.process.returncode
        lines = [t for t in self._text.decode("utf-8", "replace").splitlines() if t.strip()]
        if code < 0:
            name = signal.Signals(-code).name
            return (
                f"it was ended by {name}, as happens where memory or the disk is used up; run the same command again."
            )
        return lines[-1] if lines else f"it ended with code {code}."


@contextmanager
def _signals(stop) -> Iterator[None]:  # type: ignore[no-untyped-def]
    """SIGINT and SIGTERM call `stop()` inside the block, where this is the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {s: signal.signal(s, lambda *_: stop()) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)
