"""What a child process is told, and how it answers."""

from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import dataclass

FATAL = 3
"""Exit code where no other task can go on either: the disk is full, the images are gone."""
STOPPED = 130
"""Exit code of a child that was told to stop."""


@dataclass(frozen=True)
class Job:
    """A chain of trainings of a row, by its number, or the row's evaluation (`chain` -1)."""

    folder: str
    row: str
    chain: int
    device: str = "cpu"
    threads: int = 1
    command: str = ""

    def argv(self) -> list[str]:
        """The command line of the child."""
        return [sys.executable, "-m", "deepreg_fast.reproduce.child", json.dumps(dataclasses.asdict(self))]
