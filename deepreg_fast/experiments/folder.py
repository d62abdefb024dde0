"""The folder of a reproduction: its paths, its lock and its recorded settings."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..errors import CheckpointError, InputError
from ..files import locked, write_atomically
from .settings import Chain, Row, Settings, Stage, changes

__all__ = ["Folder", "agree", "locked"]


@dataclass(frozen=True)
class Folder:
    """Paths of a reproduction, relative to the folder as the user named it, so that none reveals the machine."""

    path: Path

    @property
    def settings(self) -> Path:
        """The file of the canonical settings."""
        return self.path / "settings.json"

    def row(self, row: Row) -> Path:
        """A row's folder."""
        return self.path / "rows" / row.name

    def stage(self, row: Row, stage: Stage) -> Path:
        """The run folder of one training."""
        return self.row(row) / stage.folder

    def result(self, row: Row) -> Path:
        """A row's results."""
        return self.row(row) / "result.json"

    def weights(self, row: Row) -> Path:
        """A row's regularizer as evaluated."""
        return self.row(row) / "weights.safetensors"

    def trained(self, row: Row, chain: Chain) -> Path:
        """The weights that a chain of trainings produces."""
        return self.stage(row, chain.last) / "weights.safetensors"

    def start(self, row: Row) -> Path:
        """The weights that other rows start from: as trained if the row has one chain, otherwise the chosen ones."""
        return self.trained(row, row.chains[0]) if len(row.chains) == 1 else self.weights(row)

    def finished(self, row: Row, stage: Stage) -> bool:
        """Whether a training has reached its last step.

        Raises
        ------
        CheckpointError
            If the weights are damaged or from another version.
        """
        from ..weights.io import load

        path = self.stage(row, stage) / "weights.safetensors"
        return path.exists() and load(path)[1].get("step") == stage.config["steps"]

    def started(self, row: Row) -> bool:
        """Whether a row has been started."""
        return self.row(row).exists()


def agree(folder: Folder, new: Settings) -> Settings:
    """Compare the settings with those recorded in the folder, merge them and record the result. Rows that have been
    started stay; other recorded rows are replaced by the new ones or dropped. `data` may have moved.

    Raises
    ------
    InputError
        If a started row has changed; the message names its keys.
    CheckpointError
        If rows exist without settings.
    """
    if not folder.settings.exists():
        if folder.path.exists() and (folder.path / "rows").exists():
            raise CheckpointError(
                f"{folder.settings} must be there beside the rows of a reproduction, but is not; restore it or name "
                "another folder."
            )
        write_atomically(folder.settings, new.to_json().encode())
        return new
    old = Settings.from_json(folder.settings.read_text(encoding="utf-8"), str(folder.settings))
    changed = []
    for row in new.rows:
        if row.name in old and folder.started(row) and (differences := changes(old[row.name], row)):
            changed.append(f"row {row.name!r} ({'; '.join(differences)})")
    if changed:
        raise InputError(
            f"A reproduction must continue with the settings with which it started, but {', '.join(changed)} changed; "
            f"restore them, remove {folder.path / 'rows'}/<row> to train such a row again, or name another folder with "
            "--out (nothing was changed)."
        )
    started = tuple(r.name for r in old.rows if folder.started(r))
    old_rows = tuple(r for r in old.select(started).rows if r.name not in new) if started else ()
    merged = Settings((*new.rows, *old_rows))
    write_atomically(folder.settings, merged.to_json().encode())
    return merged
