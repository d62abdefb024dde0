"""Files that are never half written."""

from __future__ import annotations

import os
from pathlib import Path

from .errors import InputError


def write_atomically(path: Path, data: bytes) -> None:
    """Write to a temporary file beside `path`, fsync, rename: at no moment is `path` half written.

    Raises
    ------
    InputError
        If the folder cannot be written or the disk is full; what was at `path` stays.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as f:
            f.write(data)
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
