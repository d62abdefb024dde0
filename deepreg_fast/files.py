"""Atomic writes, lock files, and checks that outputs never replace inputs."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from .errors import InputError

# Errors of file systems that do not support sync or locks; any other error is a real one.
_UNSUPPORTED = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EBADF}


def write_atomically(path: Path, data: bytes | Iterable[bytes]) -> None:
    """Write to a temporary file beside `path`, fsync and rename, so that `path` is never partially written.

    `data` may be an iterable of pieces, so that a file larger than memory can be written. If two processes write to one
    path, the file is completely that of the last. Links are followed; pipes and devices are written directly.

    Raises
    ------
    InputError
        If the folder cannot be written or the disk is full; an existing file stays unchanged.
    """
    make_folder(path.parent)
    with writing(path):
        replace_atomically(path, data)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise the system's errors inside the block as an `InputError` about the file `path`, which is replaced only as a
    whole."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{path} must be writable, but the system says: {error.strerror or error}; free space or choose another "
            "place (what was there before is unharmed)."
        ) from error


def replace_atomically(path: Path, data: bytes | Iterable[bytes]) -> None:
    """Like `write_atomically`, but the folder must exist and errors are the system's `OSError`."""
    pieces = [data] if isinstance(data, bytes) else data
    path = Path(os.path.realpath(path)) if path.is_symlink() else path
    if path.exists() and not path.is_file() and not path.is_dir():
        with open(path, "wb") as f:
            f.writelines(pieces)
        return
    temporary = path.with_name(f".{path.name[:40]}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as f:
            for piece in pieces:
                f.write(piece)
            f.flush()
            sync(f.fileno())
        with contextlib.suppress(OSError):
            os.chmod(temporary, path.stat().st_mode & 0o7777)
        os.replace(temporary, path)
    except BaseException:
        # An interruption must not leave gigabytes behind either.
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def remove_temporaries(path: Path) -> None:
    """Remove temporary files of killed writers of `path`. The caller must hold the folder's lock."""
    start = f".{path.name[:40]}."
    with contextlib.suppress(OSError):
        for file in path.parent.iterdir():
            if file.name.startswith(start) and file.name.endswith(".tmp"):
                file.unlink(missing_ok=True)


def sync(number: int) -> None:
    """Bring a file's content to the disk, if the file system supports that."""
    try:
        os.fsync(number)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise


def sync_folder(folder: Path) -> None:
    """Make the rename survive a power failure, if the system can. The file is in place, so errors are ignored."""
    with contextlib.suppress(OSError):
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def reserve(f: BinaryIO, size: int) -> None:
    """Allocate a file's disk space now: writing to a mapped hole on a full disk would kill the process by a signal."""
    if size and hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(f.fileno(), 0, size)
            return
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
    f.truncate(size)


def make_folder(path: Path) -> None:
    """Create a folder and its parents.

    Raises
    ------
    InputError
        If the folder cannot be created.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"{path} must be a folder that can be written, but the system says: {error.strerror or error}; choose "
            "another place."
        ) from error


@contextmanager
def locked(path: Path, what: str, seconds: float = 0.0) -> Iterator[None]:
    """Hold the lock file `path` inside the `with` block; wait for it at most `seconds`.

    The system releases the lock of a process that ends in any way; the file stays. If the file system does not support
    locks, nothing is locked.

    Raises
    ------
    InputError
        If another process holds the lock.
    """
    from filelock import FileLock, Timeout

    make_folder(path.parent)
    lock = FileLock(path)
    try:
        lock.acquire(timeout=seconds, poll_interval=0.2)
    except Timeout as error:
        raise InputError(
            f"{what} must be written by one process at a time, but another one is at work there; wait for it, or name "
            "another folder with --out."
        ) from error
    except (OSError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno not in _UNSUPPORTED:
            raise InputError(
                f"{path} must be writable, but the system says: {error.strerror or error}; name another --out."
            ) from error
    try:
        yield
    finally:
        lock.release()


def check_outputs(outputs: Iterable[Path], inputs: Iterable[str | Path], way_out: str) -> None:
    """Check that no output is an input and that outputs differ, even on file systems that ignore case or Unicode forms.

    Raises
    ------
    InputError
        If there is such a pair; the message ends with `way_out`.
    """
    sources = [Path(p) for p in inputs]
    names: dict[str, Path] = {}
    for output in outputs:
        for source in sources:
            if same_file(output, source):
                raise InputError(f"Outputs must not replace inputs, but {source} would be written over; {way_out}.")
        previous = names.setdefault(_folded(output), output)
        if previous is not output:
            raise InputError(f"Outputs must have different names, but {previous} and {output} are one file; {way_out}.")


def same_file(a: Path, b: Path) -> bool:
    """Whether two paths lead to the same file or folder. If one does not exist, their normalized names are compared."""
    try:
        return os.path.samefile(a, b)
    except (OSError, ValueError):
        return _folded(a) == _folded(b)


def _folded(path: Path) -> str:
    return unicodedata.normalize("NFC", os.path.realpath(path)).casefold()


def portable(name: str) -> str:
    """A file name in Unicode's NFC form, for comparing and sorting. File systems store either form."""
    return unicodedata.normalize("NFC", name)


def name_bytes(name: str) -> bytes:
    """The bytes of a file name's portable form, even if the name is not valid Unicode."""
    return portable(name).encode("utf-8", "surrogatepass")
