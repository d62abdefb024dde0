"""The folder of a run: one writer at a time, and one process of a shared training that writes for all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..files import check_outputs, locked, remove_temporaries, same_file, write_atomically
from ..regularizers.base import Regularizer
from ..weights.io import locate, save
from .config import TrainConfig
from .log import RunLog
from .world import World

FILES = ("last.safetensors", "best.safetensors", "weights.safetensors", "config.json", "metrics.jsonl")
"""Files that a run overwrites in its folder."""


class RunFolder:
    """Checkpoints, weights, settings and logs of a run.

    Raises
    ------
    InputError
        If the folder is that of the data.
    """

    def __init__(self, config: TrainConfig, world: World) -> None:
        self.config, self.world = config, world
        self.path = Path(config.out)
        self._is_locked = False
        if config.data != "embedded" and same_file(self.path, Path(config.data)):
            raise InputError(
                f"out must be another folder than data, but both are {config.out}; name another folder with --out."
            )

    @property
    def checkpoint(self) -> Path:
        """Path of the last checkpoint."""
        return self.path / "last.safetensors"

    def check_init(self) -> None:
        """Check that no output is the weight file that the training starts from.

        Raises
        ------
        InputError
            If one is.
        """
        outputs = (self.path / name for name in FILES)
        check_outputs(outputs, [locate(self.config.init)], "name another folder with --out")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder's lock (reentrant). The first process holds it for all.

        Raises
        ------
        InputError
            If another training holds it.
        """
        if self._is_locked:
            yield
            return
        with ExitStack() as stack:
            with self.world.together():
                if self.world.is_first:
                    stack.enter_context(locked(self.path / "run.lock", f"The run in {self.path}"))
            self._is_locked = True
            try:
                yield
            finally:
                self._is_locked = False

    def open_log(self, step: int, progress: bool | None) -> RunLog | None:
        """Remove what killed writers left, write the settings and open the log; None for all but the first process."""
        if not self.world.is_first:
            return None
        for name in FILES:
            remove_temporaries(self.path / name)
        write_atomically(self.path / "config.json", self.config.to_json().encode())
        return RunLog(self.path, self.config.steps, step, progress)

    def save(self, name: str, reg: Regularizer, meta: dict[str, Any]) -> None:
        """Write a weight file."""
        with self.world.together():
            if self.world.is_first:
                save(reg, self.path / name, meta)
