"""Results of units: a tar shard of images and a line per image; and their summary."""

from __future__ import annotations

import json
import math
import tarfile
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from .. import checks
from ..data import npy, png
from ..errors import DataError
from ..files import write_atomically
from .units import RESULTS, Claim, done_units, unit_paths

FORMATS = ("npy", "png", "both", "none")
Encoded = list[tuple[str, bytes]]


class OpenUnit:
    """A claimed unit whose results come in any order."""

    def __init__(self, claim: Claim) -> None:
        self.claim = claim
        self.lines: dict[int, dict[str, Any]] = {}
        self.files: dict[int, Future[Encoded]] = {}

    def complete(self) -> bool:
        """Whether every image has its line."""
        return len(self.lines) == len(self.claim.images)


class Writer:
    """Encodes images in threads and writes complete units, at most `pending` images ahead of the disk."""

    def __init__(self, images: str, workers: int, pending: int) -> None:
        self._images = checks.choice(images, "images", FORMATS)
        self._pool = ThreadPoolExecutor(workers, "encode")
        self._room = threading.BoundedSemaphore(pending)
        self._publishing: list[tuple[OpenUnit, Future[None]]] = []

    def put(self, unit: OpenUnit, i: int, line: dict[str, Any], x: torch.Tensor | None) -> None:
        """Add image i of a unit; waits while too many images are being encoded."""
        unit.lines[i] = line
        if x is not None and self._images != "none":
            self._room.acquire()
            future = self._pool.submit(encode, line["key"], x, self._images)
            future.add_done_callback(lambda _: self._room.release())
            unit.files[i] = future
        if unit.complete():
            self._publishing.append((unit, self._pool.submit(publish, unit)))

    def settle(self, wait: bool = False) -> int:
        """Release the units that are written; their number. Errors of writing are raised here."""
        settled = [(u, f) for u, f in self._publishing if wait or f.done()]
        for unit, future in settled:
            future.result()
            unit.claim.release(True)
            self._publishing.remove((unit, future))
        return len(settled)

    def writing(self) -> int:
        """The number of complete units that are not released yet."""
        return len(self._publishing)

    def close(self) -> None:
        """End the threads; what has not begun is dropped."""
        self._pool.shutdown(cancel_futures=True)


def encode(key: str, x: torch.Tensor, images: str) -> Encoded:
    """The files of an image `[C, H, W]`: float32 .npy, 8-bit .png."""
    out: Encoded = []
    if images in ("npy", "both"):
        out.append((f"{key}.npy", npy(x)))
    if images in ("png", "both"):
        out.append((f"{key}.png", png(x.nan_to_num().clamp(0, 1))))
    return out


def publish(unit: OpenUnit) -> None:
    """Write the images, then the lines, whose rename completes the unit. Both are in the order of the source and tell
    no time, so a unit that is computed again has the same bytes."""
    order = sorted(unit.lines)
    if unit.files:
        write_atomically(
            unit.claim.shard_path, _tar(f for i in order if i in unit.files for f in unit.files[i].result())
        )
    text = "".join(json.dumps(unit.lines[i]) + "\n" for i in order)
    write_atomically(unit.claim.lines_path, text.encode())


def _tar(files: Iterator[tuple[str, bytes]]) -> Iterator[bytes]:
    """The pieces of a tar file with these files."""
    for name, data in files:
        member = tarfile.TarInfo(name)
        member.size = len(data)
        yield member.tobuf(tarfile.PAX_FORMAT)
        yield data
        yield b"\0" * (-len(data) % tarfile.BLOCKSIZE)
    yield b"\0" * (2 * tarfile.BLOCKSIZE)


def read_lines(folder: Path) -> Iterator[dict[str, Any]]:
    """The lines of all units that are done, in the order of the source."""
    if not (folder / RESULTS).is_dir():
        raise DataError(f"{folder} must be the folder of a run of recover --data, but holds no results; check --out.")
    for index in sorted(done_units(folder)):
        path = unit_paths(folder, index)[0]
        for text in path.read_text(encoding="utf-8").splitlines():
            yield json.loads(text)


def summary(folder: str | Path) -> dict[str, Any]:
    """The results so far: number of images, images by status, mean iterations and PSNR, and the first errors."""
    folder = Path(folder)
    statuses: Counter[str] = Counter()
    iterations, known, decibels = 0, 0, 0.0
    errors: list[dict[str, str]] = []
    for line in read_lines(folder):
        statuses[line["status"]] += 1
        iterations += line.get("iterations", 0)
        quality = line.get("psnr")
        if quality is not None and math.isfinite(quality):
            known, decibels = known + 1, decibels + quality
        if "error" in line and len(errors) < 5:
            errors.append({"key": line["key"], "error": line["error"]})
    recovered = statuses.total() - statuses["error"]
    settings = folder / "run.json"
    total = json.loads(settings.read_text(encoding="utf-8"))["count"] if settings.is_file() else statuses.total()
    out: dict[str, Any] = {"images": total, "done": statuses.total(), "statuses": dict(sorted(statuses.items()))}
    if recovered:
        out["iterations"] = iterations / recovered
    if known:
        out["psnr"] = decibels / known
    if errors:
        out["errors"] = errors
    return out
