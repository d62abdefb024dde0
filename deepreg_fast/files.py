"""Files that are never half written, never written by two at once, and never written over what was read."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import InputError

# What file systems say that cannot sync or lock at all; any other error is one of the disk.
_UNSUPPORTED = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EBADF}


def write_atomically(path: Path, data: bytes | Iterable[bytes]) -> None:
    """Write to a temporary file beside `path`, fsync, rename: at no moment is `path` half written.

    `data` may come in pieces, so that a file larger than memory can be written. Of two writers of one path the last one
    wins with all that it wrote. A link is followed; a pipe or a device is written as it is.

    Raises
    ------
    InputError
        If the folder cannot be written or the disk is full; what was at `path` stays.
    """
    make_folder(path.parent)
    try:
        replace_atomically(path, data)
    except OSError as error:
        raise InputError(
            f"{path} must be writable, but the system says: {error.strerror or error}; free space or choose another "
            "place (what was there before is unharmed)."
        ) from error


def replace_atomically(path: Path, data: bytes | Iterable[bytes]) -> None:
    """What `write_atomically` does in a folder that exists, with the system's own `OSError`."""
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
            _sync(f.fileno())
        with contextlib.suppress(OSError):
            os.chmod(temporary, path.stat().st_mode & 0o7777)
        os.replace(temporary, path)
    except BaseException:
        # An interruption, too, must not leave gigabytes behind.
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def remove_temporaries(path: Path) -> None:
    """Remove what killed writers of `path` left beside it. Only who has the folder's lock may ask for this."""
    start = f".{path.name[:40]}."
    with contextlib.suppress(OSError):
        for left in path.parent.iterdir():
            if left.name.startswith(start) and left.name.endswith(".tmp"):
                left.unlink(missing_ok=True)


def _sync(number: int) -> None:
    try:
        os.fsync(number)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise


def _sync_folder(folder: Path) -> None:
    """Make the rename outlast a power cut where the system can. The file is in place, so no error here matters."""
    with contextlib.suppress(OSError):
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


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
            f"{path} must be a folder that can be written, but the system says: {error.strerror or error}; choose "
            "another place."
        ) from error


@contextmanager
def locked(path: Path, what: str, seconds: float = 0.0) -> Iterator[None]:
    """Hold the lock file `path` inside the `with` block, waiting for it up to `seconds`.

    The system takes a lock from a process that ends, however it ends; the file stays. Where the file system has no
    locks, nothing is locked.

    Raises
    ------
    InputError
        If another process has it.
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
    """Check that no output is one of the inputs and that no two outputs are one file, also where the file system does
    not tell upper from lower case or one Unicode form from another.

    Raises
    ------
    InputError
        If there is such a pair; the sentence ends with `way_out`.
    """
    sources = [Path(p) for p in inputs]
    names: dict[str, Path] = {}
    for output in outputs:
        for source in sources:
            if same_file(output, source):
                raise InputError(f"Outputs must not replace inputs, but {source} would be written over; {way_out}.")
        other = names.setdefault(_folded(output), output)
        if other is not output:
            raise InputError(f"Outputs must have different names, but {other} and {output} are one file; {way_out}.")


def same_file(a: Path, b: Path) -> bool:
    """Whether two paths lead to one file or folder; of a path that does not exist yet, whether its name does."""
    try:
        return os.path.samefile(a, b)
    except (OSError, ValueError):
        return _folded(a) == _folded(b)


def _folded(path: Path) -> str:
    return unicodedata.normalize("NFC", os.path.realpath(path)).casefold()


def portable(name: str) -> str:
    """A file name in the one Unicode form (NFC) that names are compared and sorted by: systems store either form."""
    return unicodedata.normalize("NFC", name)


def name_bytes(name: str) -> bytes:
    """The bytes of a file name's portable form, whatever bytes the name has."""
    return portable(name).encode("utf-8", "surrogatepass")
