"""Command-line arguments and exit codes of a worker process."""

from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path

FATAL = 3
"""Exit code if no other task can continue either, because the disk is full or the images are gone."""
STOPPED = 130
"""Exit code of a worker that was stopped."""


@dataclass(frozen=True)
class Job:
    """A row's chain of trainings, by number, or the row's evaluation (`chain` -1)."""

    folder: str
    row: str
    chain: int
    device: str = "cpu"
    threads: int = 1
    command: str = ""

    def argv(self) -> list[str]:
        """The command line of the worker.

        The worker imports this package from its location in this process and nothing from the current folder: a
        `random.py` of the user there must not shadow Python's.
        """
        return [sys.executable, "-P", "-c", _CHILD, str(_ROOT), json.dumps(dataclasses.asdict(self))]


# The package's folder comes last in the search path, so that nothing beside it shadows the standard library.
_CHILD = (
    "import sys; sys.path.append(sys.argv.pop(1)); from deepreg_fast.experiments.worker import main; sys.exit(main())"
)
_ROOT = Path(__file__).resolve().parents[2]

SAFE = {"PYTHONSAFEPATH": "1"}
"""Environment that keeps child processes of the worker from importing from the current folder as well."""
