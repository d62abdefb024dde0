"""Files that are never half written."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from .errors import InputError


def write_atomically(path: Path, data: bytes | Iterable[bytes]) -> None:
    """Write to a temporary file beside `path`, fsync, rename: at no moment is `path` half written.

    `data` may come in pieces, so that a file larger than memory can be written.

    Raises
    ------
    InputError
        If the folder cannot be written or the disk is full; what was at `path` stays.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        make_folder(path.parent)
        with open(temporary, "wb") as f:
            for piece in [data] if isinstance(data, bytes) else data:
                f.write(piece)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise InputError(
            f"{path} must be writable, but the system says: {error.strerror}; free space or choose another place "
            "(what was there before is unharmed)."
        ) from error


def make_folder(path: Path) -> None:
    """Make a folder and its parents.

    Raises
    ------
    InputError
        If the system refuses.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"{path} must be a folder that can be written, but the system says: {error.strerror}; choose another place."
        ) from error
