"""The loop of one process: claim units, read ahead, keep the slots full, write what is complete."""

from __future__ import annotations

import hashlib
import json
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .. import checks
from ..errors import InputError
from ..files import locked, remove_temporaries, write_atomically
from ..regularizers.base import Regularizer
from ..solvers import PGDOptions
from .results import OpenUnit, Writer
from .solve import Solver
from .sources import Measurement, Source
from .units import Units

OPEN_UNITS = 4
"""Units that a process holds at most, if they are not smaller than the slots: while the slowest images of one are
recovered, the slots fill with the next."""
POLL_SECONDS = 0.5

Item = tuple[OpenUnit, int]


@dataclass(frozen=True)
class Job:
    """What is recovered and how.

    Parameters
    ----------
    source : Source
    reg : Regularizer, on the device and in the precision of the recovery, like the operator.
    weight : `mu` of an image from the standard deviation of its noise.
    options : PGDOptions
    settings : what the results depend on besides, as JSON values. Another run with other settings is refused.
    images : "npy", "png", "both" or "none"
        What is written of each image.
    unit, slots, workers : int
        Images in a unit, images that are recovered at the same time, threads that read and as many that encode.
    """

    source: Source
    reg: Regularizer
    weight: Callable[[float], float]
    options: PGDOptions
    settings: dict[str, Any]
    images: str = "npy"
    unit: int = 256
    slots: int = 64
    workers: int = 2

    def __post_init__(self) -> None:
        for name in ("unit", "slots", "workers"):
            checks.integer(getattr(self, name), name, 1)


def run(
    job: Job,
    out: str | Path,
    shard: tuple[int, int] = (0, 1),
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Recover what is not done yet, together with any other processes that call this with the same `out`.

    Returns when every image of the source has its line in `out`. A unit that another process holds is waited for, and
    claimed if that process dies.

    Parameters
    ----------
    job : Job
    out : Path
        Shared by all processes: `units/000000.jsonl`, `units/000000.tar`, ...
    shard : (i, n)
        Where to begin.
    progress : callable, optional
        Called as `progress(units done, units)` when units are done.

    Returns
    -------
    int
        The number of images that this process recovered.

    Raises
    ------
    InputError
        If `out` holds a run with other settings, or cannot be written.
    """
    out = Path(out)
    channels = job.source.A.image_shape[0]
    if job.images in ("png", "both") and channels not in (1, 3):
        raise InputError(f"--images must be npy or none for images of {channels} channels, but is {job.images}.")
    units = Units(out, len(job.source), job.unit, shard)
    agree(job, out)
    solver: Solver[Item] = Solver(job.source.A, job.reg, job.weight, job.options, job.slots)
    writer = Writer(job.images, job.workers, 2 * job.slots + job.workers)
    reader = ThreadPoolExecutor(job.workers, "read")
    try:
        return _Loop(job, units, solver, writer, reader, progress).run()
    finally:
        reader.shutdown(wait=False, cancel_futures=True)
        writer.close()


def agree(job: Job, out: Path) -> None:
    """Write the settings of a new run; compare those of one that exists."""
    digest = hashlib.sha256()
    for i in range(len(job.source)):
        digest.update(job.source.key(i).encode() + b"\n")
    settings = {
        "count": len(job.source),
        "keys": digest.hexdigest(),
        "unit": job.unit,
        "images": job.images,
        "options": asdict(job.options),
        **job.settings,
    }
    path = out / "run.json"
    with locked(out / "run.lock", str(out), seconds=60.0):
        if not path.exists():
            remove_temporaries(path)
            write_atomically(path, json.dumps(settings, indent=1).encode())
            return
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"{path} must hold the settings of a run, but cannot be read ({error}).") from error
    settings = json.loads(json.dumps(settings))
    if differing := sorted(k for k in {*settings, *stored} if settings.get(k) != stored.get(k)):
        raise InputError(
            f"{out} holds the results of a run with other settings ({', '.join(differing)}); name another --out, or "
            "repeat the command that began it."
        )


class _Loop:
    def __init__(
        self,
        job: Job,
        units: Units,
        solver: Solver[Item],
        writer: Writer,
        reader: ThreadPoolExecutor,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        self._job, self._units, self._solver, self._writer, self._reader = job, units, solver, writer, reader
        self._progress = progress
        self._open: list[OpenUnit] = []
        self._unread: deque[Item] = deque()
        self._reading: deque[tuple[Item, Future[Measurement]]] = deque()
        self._recovered = 0
        self._next_claim = 0.0

    def run(self) -> int:
        """Until all units are done."""
        few = max(1, self._job.slots // 8)
        while True:
            self._read_ahead()
            # A refill costs about a round, so a few slots are filled together.
            free = self._solver.free()
            if free >= few or not len(self._solver):
                self._admit(free)
            if len(self._solver):
                for (unit, i), result in self._solver.advance():
                    self._finish(unit, i, result.line(), result.x)
            elif not self._reading and not self._rest():
                return self._recovered
            self._settle()

    def _read_ahead(self) -> None:
        while len(self._reading) < self._job.slots:
            if not self._unread and not self._claim():
                return
            item = self._unread.popleft()
            self._reading.append((item, self._reader.submit(self._job.source.measurement, item[1])))

    def _claim(self) -> bool:
        """Claim a unit, if there is one. After a failure the folder is left alone for a while."""
        self._open = [u for u in self._open if not u.complete()]
        if (
            len(self._open) >= max(OPEN_UNITS, 2 * self._job.slots // self._job.unit)
            or time.monotonic() < self._next_claim
        ):
            return False
        if (claim := self._units.claim()) is None:
            self._next_claim = time.monotonic() + POLL_SECONDS
            return False
        unit = OpenUnit(claim)
        self._open.append(unit)
        self._unread.extend((unit, i) for i in claim.images)
        return True

    def _admit(self, free: int) -> None:
        """Start images that have been read; wait for one only if nothing else is to be done."""
        batch: list[tuple[Item, int, Measurement]] = []
        while self._reading and len(batch) < free:
            item, future = self._reading[0]
            if not future.done() and (batch or len(self._solver)):
                break
            self._reading.popleft()
            try:
                measurement = future.result()
                self._solver.check(measurement)
            except Exception as error:  # whatever a reader raises concerns this image alone
                self._finish(*item, {"status": "error", "error": str(error) or type(error).__name__}, None)
                continue
            batch.append((item, item[1], measurement))
        if batch:
            self._solver.admit(batch)

    def _finish(self, unit: OpenUnit, i: int, line: dict[str, Any], x: Any) -> None:
        self._recovered += 1
        self._writer.put(unit, i, {"key": self._job.source.key(i), **line}, x)

    def _settle(self, wait: bool = False) -> None:
        if self._writer.settle(wait) and self._progress is not None:
            self._units.refresh()
            self._progress(self._units.finished(), self._units.total)

    def _rest(self) -> bool:
        """When there is nothing to recover now: write what is complete, and wait for others. False if all is done."""
        if self._writer.writing():
            self._settle(wait=True)
            return True
        self._units.refresh()
        if self._units.all_done():
            return False
        time.sleep(POLL_SECONDS)
        return True
