"""Scheduler: rows as a graph of tasks, each a process; the critical path comes first."""

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

# Seconds for a worker to finish its current step (or validation) and write a checkpoint, before it is killed.
_PATIENCE = 90.0
_POLL = 0.1
# Cost of an evaluation in the unit of `Stage.cost`; negligible, so that trainings come first.
_SCORE_COST = 1.0


@dataclass
class Task:
    """A chain of trainings (number `chain`) or a row's evaluation (`chain` -1). It runs after the tasks `needs`."""

    name: str
    row: str
    chain: int
    needs: tuple[str, ...]
    cost: float
    urgency: float = 0.0


@dataclass
class Outcome:
    """Outcome of the tasks: error messages of failed tasks by name, the message of a failure that ended everything, and
    whether the run was stopped."""

    failed: dict[str, str] = field(default_factory=dict)
    fatal: str = ""
    stopped: bool = False


def plan(folder: Folder, settings: Settings, chosen: Settings) -> dict[str, Task]:
    """The unfinished tasks by name."""
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
    """The task that creates `Folder.start(source)`."""
    return _training(source, 0) if len(source.chains) == 1 else f"{source.name} evaluation"


def _urgency(name: str, tasks: dict[str, Task]) -> float:
    """Cost of the critical path from a task to the end."""
    task = tasks[name]
    if not task.urgency:
        dependents = [t for t, other in tasks.items() if name in other.needs]
        task.urgency = task.cost + max((_urgency(t, tasks) for t in dependents), default=0.0)
    return task.urgency


class Runner:
    """Runs tasks in at most `workers` processes, with one thread each on a CPU."""

    def __init__(self, folder: Folder, progress: Progress, workers: int, device: str, command: str) -> None:
        self.folder, self.progress, self.workers = folder, progress, workers
        self.device, self.command = device, command
        self.running: dict[str, _Child] = {}
        self.outcome = Outcome()

    def run(self, tasks: dict[str, Task]) -> Outcome:
        """Run all tasks. A failure stops only the tasks that depend on it, unless it is fatal."""
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
        """Start the most urgent tasks that are ready."""
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
        """Record how a worker ended."""
        task, code = child.task, child.process.wait()
        del self.running[task.name]
        if code == 0:
            self.progress.end(task, "done")
            return
        if code == STOPPED:
            # We did not stop it: Ctrl-C or a signal reached the whole process group.
            self.outcome.stopped = True
            self.progress.end(task, "stopped")
            return
        self.progress.end(task, "failed")
        if code == FATAL:
            self.outcome.fatal = child.sentence()
            return
        self.outcome.failed[task.name] = child.sentence()
        failed = {task.name}
        while dependents := [n for n, t in waiting.items() if failed.intersection(t.needs)]:
            for name in dependents:
                del waiting[name]
                failed.add(name)
                self.outcome.failed[name] = f"it needs '{task.name}', which failed."

    def _end_all(self) -> None:
        """Stop the workers, and kill those that do not end in time."""
        for child in self.running.values():
            child.process.terminate()
        deadline = time.monotonic() + _PATIENCE
        for child in self.running.values():
            try:
                child.process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.process.kill()
                child.process.wait()
            self.progress.end(child.task, "stopped")
        self.running.clear()


class _Child:
    """A worker process. Its stdin stays open as long as this process lives, and its stderr is read."""

    def __init__(self, task: Task, job: Job) -> None:
        self.task = task
        # OMP_NUM_THREADS must be set before torch is imported.
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
        """Why the worker failed: its last line on stderr, or the signal that ended it."""
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
    """SIGINT and SIGTERM call `stop()` inside the block, if this is the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {s: signal.signal(s, lambda *_: stop()) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for name, handler in previous.items():
            signal.signal(name, handler)
