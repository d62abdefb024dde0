"""Units of images that processes claim by lock files.

The system releases the lock of a process that ends in any way, so a unit whose process was killed can be claimed at
once. A unit is done when its results are in place; that is tested after the lock is held, so no unit is done twice.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from .. import checks
from ..errors import InputError
from ..files import make_folder, remove_temporaries

if TYPE_CHECKING:
    from filelock import BaseFileLock

RESULTS, LOCKS = "units", "locks"
"""Subfolders of a run's folder."""


class Claim:
    """A unit that this process holds: the images `range(first, last)`."""

    def __init__(self, folder: Path, index: int, images: range, lock: BaseFileLock) -> None:
        self.index, self.images = index, images
        self.lines_path, self.shard_path = unit_paths(folder, index)
        self._lock = lock

    def release(self, done: bool) -> None:
        """Give the unit back; `done` if its results are in place."""
        if done:
            # Whoever still opens the file or makes a new one finds the results.
            with contextlib.suppress(OSError):
                Path(self._lock.lock_file).unlink()
        self._lock.release()


class Units:
    """The units of `size` images of a run in `folder`.

    Parameters
    ----------
    folder : Path
        Shared by all processes. Its file system must support locks; without them, units may be computed twice, with the
        same results.
    count, size : int
        Images in all and in a unit.
    shard : (i, n)
        This process begins at the share i of n, and goes on with what others have not claimed.
    """

    def __init__(self, folder: Path, count: int, size: int, shard: tuple[int, int] = (0, 1)) -> None:
        self.count, self.size = checks.integer(count, "count", 1), checks.integer(size, "unit", 1)
        self.total = -(-count // size)
        self._folder = folder
        self._done: set[int] = set()
        self._held: set[int] = set()
        start = self.total * shard[0] // shard[1]
        self._order = [*range(start, self.total), *range(start)]
        make_folder(folder / RESULTS)
        make_folder(folder / LOCKS)

    def claim(self) -> Claim | None:
        """The next unit that is neither done nor held; None if there is none now."""
        self.refresh()
        for index in self._order:
            if index in self._done or index in self._held:
                continue
            if (lock := _try_lock(self._folder / LOCKS / f"{index:06d}.lock")) is None:
                continue
            images = range(index * self.size, min(self.count, (index + 1) * self.size))
            claim = Claim(self._folder, index, images, lock)
            self.refresh()
            if index in self._done:
                claim.release(True)
                continue
            self._held.add(index)
            for path in unit_paths(self._folder, index):
                remove_temporaries(path)
            return claim
        return None

    def refresh(self) -> None:
        """Read which units are done. Opening the folder also renews the cache of a network file system."""
        self._done = done_units(self._folder)
        self._held -= self._done
        self._order = [i for i in self._order if i not in self._done]

    def finished(self) -> int:
        """The number of units that are done."""
        return len(self._done)

    def all_done(self) -> bool:
        """Whether every unit is done."""
        return not self._order


def unit_paths(folder: Path, index: int) -> tuple[Path, Path]:
    """The lines and the images of a unit."""
    return folder / RESULTS / f"{index:06d}.jsonl", folder / RESULTS / f"{index:06d}.tar"


def done_units(folder: Path) -> set[int]:
    """The units whose lines are in place."""
    with os.scandir(folder / RESULTS) as entries:
        names = [e.name for e in entries]
    return {int(n[:-6]) for n in names if n.endswith(".jsonl") and n[:-6].isdigit()}


def _try_lock(path: Path) -> BaseFileLock | None:
    from filelock import FileLock, Timeout

    lock = FileLock(path, thread_local=False)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return None
    except NotImplementedError:
        # Without locks of the system, the results are still complete, and each in place by one rename.
        return lock
    except OSError as error:
        raise InputError(
            f"{path} must be writable, but the system says: {error.strerror or error}; name another --out."
        ) from error
    return lock


def parse_shard(text: str) -> tuple[int, int]:
    """`(i, n)` of `i/n` with `0 <= i < n`."""
    i, slash, n = text.partition("/")
    if not (slash and i.isdigit() and n.isdigit() and int(i) < int(n)):
        raise InputError(f"--shard must be i/n with i from 0 to n - 1, such as 0/4, but is {text!r}.")
    return int(i), int(n)


def shard_of_environment(environment: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """`(i, n)` of this process in torchrun (`RANK`), SLURM's tasks (`SLURM_PROCID`) or arrays; otherwise `(0, 1)`."""
    for rank, world, low in (
        ("RANK", "WORLD_SIZE", ""),
        ("SLURM_PROCID", "SLURM_NTASKS", ""),
        ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT", "SLURM_ARRAY_TASK_MIN"),
    ):
        numbers = [environment.get(rank, ""), environment.get(world, ""), environment.get(low, "0")]
        if all(n.isdigit() for n in numbers):
            i, n = int(numbers[0]) - int(numbers[2]), int(numbers[1])
            if n > 1:
                return i % n, n
    return 0, 1
