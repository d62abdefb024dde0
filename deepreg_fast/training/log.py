"""Training logs: JSON lines, TensorBoard, and a progress bar or periodic lines.

A failure here is reported once and never stops the training.
"""

from __future__ import annotations

import io
import itertools
import json
import os
import socket
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import InputError
from ..files import write_atomically
from ..terminal import Pulse, console, is_terminal, say

# Most bytes of log lines held in memory while the disk is full; they are written when it has space again.
_PENDING = 2**22
_EVENT_FILES = itertools.count()


class RunLog:
    """`metrics.jsonl` and TensorBoard events in the run's folder; progress on stderr.

    `progress=True` shows a bar, False nothing. None shows a bar on a terminal and otherwise a line every half minute.
    """

    def __init__(
        self, folder: Path, total: int, start: int, progress: bool | None = None, tensorboard: bool = True
    ) -> None:
        self.path = folder / "metrics.jsonl"
        try:
            self._truncate(start)
            self._file = open(self.path, "ab", buffering=0)
        except OSError as error:
            raise InputError(
                f"{self.path} must be writable, but the system says: {error.strerror or error}; free space or choose "
                "another folder."
            ) from error
        self._pending = b""
        self._failed: set[str] = set()
        self._board: _Board | None = None
        if tensorboard:
            try:
                self._board = _Board(folder / "tensorboard", start)
            except Exception as error:  # no failure of TensorBoard stops the training
                self._report("TensorBoard's events", error)
        self._bar: Any = None
        self._pulse: Pulse | None = None
        if progress or (progress is None and is_terminal(sys.stderr)):
            self._bar = self._begin_bar(total, start)
        elif progress is None:
            self._pulse = Pulse("train", total, "steps", start)
            self._pulse.__enter__()

    def _begin_bar(self, total: int, start: int) -> Any:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        bar = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.description}", markup=False),
            console=console(sys.stderr),
        )
        bar.start()
        self._task = bar.add_task("", total=total, completed=start)
        return bar

    def _truncate(self, start: int) -> None:
        """Drop lines of steps that the resumed run will repeat."""
        if self.path.exists():
            lines = self.path.read_bytes().splitlines(keepends=True)
            remaining = [line for line in lines if line.endswith(b"\n") and _step(line) <= start]
            if len(remaining) < len(lines):
                write_atomically(self.path, b"".join(remaining))

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Log the metrics of step `step`."""
        self._pending += (json.dumps({"step": step, "time": round(time.time(), 3), **metrics}) + "\n").encode()
        self._flush()
        if self._board is not None:
            try:
                self._board.write(step, {k: v for k, v in metrics.items() if isinstance(v, (int, float))})
            except Exception as error:
                self._board = None
                self._report("TensorBoard's events", error)
        text = f"loss {metrics['loss']:.3g}" if "loss" in metrics else ""
        if "val_psnr" in metrics:
            text = f"validation {metrics['val_psnr']:.2f} dB"
        if self._pulse is not None:
            self._pulse.done(step, text)
        if self._bar is not None:
            try:
                self._bar.update(self._task, completed=step, description=text)
            except (OSError, ValueError):
                self._bar = None

    def _flush(self) -> None:
        """Write the pending lines; keep what the disk rejects."""
        try:
            while self._pending:
                self._pending = self._pending[self._file.write(self._pending) or 0 :]
        except OSError as error:
            self._report(f"the log {self.path}", error)
            if len(self._pending) > _PENDING:
                self._pending = b""

    def _report(self, what: str, error: Exception) -> None:
        if what not in self._failed:
            self._failed.add(what)
            text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            say(f"deepreg-fast: {what} cannot be written ({text}); the training goes on without it.")

    def close(self) -> None:
        """Close files and bar."""
        if self._pending:
            self._flush()
        for close in (self._file.close, *([self._board.close] if self._board else [])):
            try:
                close()
            except OSError as error:
                self._report("the log", error)
        if self._pulse is not None:
            self._pulse.close()
        if self._bar is not None:
            try:
                self._bar.stop()
            except (OSError, ValueError):
                self._bar = None


def _step(line: bytes) -> float:
    """The step number of a line; infinite if the line is damaged."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")
    return step if isinstance(step, (int, float)) else float("inf")


class _Board:
    """Synchronous writer of TensorBoard event files. TensorBoard's own writer uses a thread whose errors are lost."""

    def __init__(self, folder: Path, start: int) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        # Protocol buffers create these classes at import, invisible to type checkers.
        events: Any = event_pb2
        summaries: Any = summary_pb2
        self._event, self._summary, self._records = events.Event, summaries.Summary, RecordWriter
        folder.mkdir(parents=True, exist_ok=True)
        # The number keeps names unique within one second, host and process.
        number = next(_EVENT_FILES)
        name = f"events.out.tfevents.{time.time():010.0f}.{socket.gethostname()}.{os.getpid()}.{number}"
        self._file: BinaryIO = open(folder / name, "ab", buffering=0)
        self._write(self._event(wall_time=time.time(), step=start, file_version="brain.Event:2"))
        # With this event TensorBoard drops later steps of the run's earlier files.
        session = events.SessionLog(status=events.SessionLog.START)
        self._write(self._event(wall_time=time.time(), step=start, session_log=session))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Write one event with these scalars."""
        scalars = [self._summary.Value(tag=k, simple_value=float(v)) for k, v in values.items()]
        self._write(self._event(wall_time=time.time(), step=step, summary=self._summary(value=scalars)))

    def _write(self, event: Any) -> None:
        buffer = io.BytesIO()
        self._records(buffer).write(event.SerializeToString())
        self._file.write(buffer.getvalue())

    def close(self) -> None:
        """Close the file."""
        self._file.close()
