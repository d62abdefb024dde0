"""The folder of a reproduction: where things are, who may write, and what was asked for before."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..errors import CheckpointError, InputError
from ..files import locked, write_atomically
from .settings import Chain, Row, Settings, Stage, changes

__all__ = ["Folder", "agree", "locked"]


@dataclass(frozen=True)
class Folder:
    """Paths of a reproduction, as the user named its folder: none is made absolute, so none tells of the machine."""

    path: Path

    @property
    def settings(self) -> Path:
        """The canonical settings."""
        return self.path / "settings.json"

    def row(self, row: Row) -> Path:
        """A row's folder."""
        return self.path / "rows" / row.name

    def stage(self, row: Row, stage: Stage) -> Path:
        """The run folder of one training."""
        return self.row(row) / stage.folder

    def result(self, row: Row) -> Path:
        """A row's figures."""
        return self.row(row) / "result.json"

    def weights(self, row: Row) -> Path:
        """A row's regularizer, as it is evaluated."""
        return self.row(row) / "weights.safetensors"

    def trained(self, row: Row, chain: Chain) -> Path:
        """What a chain of trainings gives."""
        return self.stage(row, chain.last) / "weights.safetensors"

    def start(self, row: Row) -> Path:
        """The weights that another row takes from this one: as trained where there is one training, else the chosen."""
        return self.trained(row, row.chains[0]) if len(row.chains) == 1 else self.weights(row)

    def finished(self, row: Row, stage: Stage) -> bool:
        """Whether a training has reached its last step.

        Raises
        ------
        CheckpointError
            If there are weights, but of another version or damaged.
        """
        from ..weights.io import load

        path = self.stage(row, stage) / "weights.safetensors"
        return path.exists() and load(path)[1].get("step") == stage.config["steps"]

    def begun(self, row: Row) -> bool:
        """Whether anything of a row is there."""
        return self.row(row).exists()


def agree(folder: Folder, new: Settings) -> Settings:
    """Compare the settings with those that the folder was begun with, and write them down: what is there stays, new
    rows and rows of which nothing is there yet are taken over or dropped, and `data` may have moved.

    Raises
    ------
    InputError
        If a row that was begun has changed, named with its keys.
    CheckpointError
        If the folder is of another version.
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
    told = []
    for row in new.rows:
        if row.name in old and folder.begun(row) and (found := changes(old[row.name], row)):
            told.append(f"row {row.name!r} ({'; '.join(found)})")
    if told:
        raise InputError(
            f"A reproduction must go on with the settings it was begun with, but {', '.join(told)} changed; restore "
            f"them, remove {folder.path / 'rows'}/<row> to train such a row anew, or name another folder with --out "
            "(nothing was changed)."
        )
    begun = tuple(r.name for r in old.rows if folder.begun(r))
    kept = tuple(r for r in old.select(begun).rows if r.name not in new) if begun else ()
    whole = Settings((*new.rows, *kept))
    write_atomically(folder.settings, whole.to_json().encode())
    return whole
