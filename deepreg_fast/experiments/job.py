"""What a child process is told, and how it answers."""

from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path

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
        """The command line of the child.

        The child imports this package from where it is here and nothing from the current folder, which is the user's:
        a `random.py` there must not be taken for Python's.
        """
        return [sys.executable, "-P", "-c", _CHILD, str(_ROOT), json.dumps(dataclasses.asdict(self))]


# The package's place comes last, so that nothing beside it hides a module of Python's.
_CHILD = (
    "import sys; sys.path.append(sys.argv.pop(1)); from deepreg_fast.experiments.worker import main; sys.exit(main())"
)
_ROOT = Path(__file__).resolve().parents[2]

SAFE = {"PYTHONSAFEPATH": "1"}
"""What keeps the children of a child from the current folder, too."""
