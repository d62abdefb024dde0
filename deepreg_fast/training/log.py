"""Where a run tells how it goes: JSON lines, TensorBoard, a progress bar."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from ..files import write_atomically


class RunLog:
    """`metrics.jsonl` and TensorBoard events in the run's folder; a progress bar on a terminal."""

    def __init__(self, folder: Path, total: int, start: int, progress: bool, tensorboard: bool = True) -> None:
        self.path = folder / "metrics.jsonl"
        self._truncate(start)
        self._file = open(self.path, "a", encoding="utf-8")
        self._board = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=start)
        self._bar = None
        if progress:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self._bar = Progress(
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.description}"),
                console=Console(stderr=True),
            )
            self._bar.start()
            self._task = self._bar.add_task("", total=total, completed=start)

    def _truncate(self, start: int) -> None:
        """Drop lines of steps that a resumed run will do again."""
        if self.path.exists():
            kept = []
            for line in self.path.read_text(encoding="utf-8").splitlines():
                try:
                    if json.loads(line)["step"] <= start:
                        kept.append(line)
                except (ValueError, KeyError):
                    continue
            write_atomically(self.path, "".join(f"{line}\n" for line in kept).encode())

    def write(self, step: int, metrics: dict[str, Any]) -> None:
        """One line of metrics after step `step`."""
        self._file.write(json.dumps({"step": step, "time": round(time.time(), 3), **metrics}) + "\n")
        self._file.flush()
        if self._board is not None:
            for k, v in metrics.items():
                if isinstance(v, (int, float)):
                    self._board.add_scalar(k, v, step)
        if self._bar is not None:
            text = f"loss {metrics['loss']:.3g}" if "loss" in metrics else ""
            if "val_psnr" in metrics:
                text = f"validation {metrics['val_psnr']:.2f} dB"
            self._bar.update(self._task, completed=step, description=text)

    def close(self) -> None:
        """Close files and bar."""
        self._file.close()
        if self._board is not None:
            self._board.close()
        if self._bar is not None:
            self._bar.stop()
