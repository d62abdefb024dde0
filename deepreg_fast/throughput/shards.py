"""Tar shards in the layout of webdataset: files that are named alike up to the first dot are one image."""

from __future__ import annotations

import io
import tarfile
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import checks
from ..data.images import SUFFIXES, decode_image
from ..errors import DataError
from ..problem import Problem
from .sources import Measurement, operator_of, unique

_WHOLE = "{} must be a whole, uncompressed tar file, but is not ({}); write it again."
_FIELDS = ("picture", "y", "x")


class TarShards:
    """Images of uncompressed tar files.

    Of each image, `key.png` (or another picture) is the true image, or the measurements if `measured`; `key.y.npy` or
    `key.npy` holds measurements and `key.x.npy` the true image, as float32 or float64 without a batch dimension. Other
    files are ignored. The files are listed once; an image is read from its place.
    """

    def __init__(self, files: Sequence[Path], problem: Problem, measured: bool) -> None:
        self._files, self._measured, self._sigma = files, measured, problem.sigma
        self._color = problem.color
        self._shard, self._places, self._error = array("l"), array("q"), dict[int, str]()
        names: list[str] = []
        for number, file in enumerate(files):
            for name, places, error in _samples(file):
                if error:
                    self._error[len(names)] = error
                names.append(name)
                self._shard.append(number)
                self._places.extend(places)
        self._keys = unique(names, lambda i: files[self._shard[i]].stem)
        self.A = operator_of(self, problem)

    def __len__(self) -> int:
        return len(self._keys)

    def key(self, i: int) -> str:
        """The common name of the image's files."""
        return self._keys[i]

    def measurement(self, i: int) -> Measurement:
        """Read one image."""
        if i in self._error:
            raise DataError(self._error[i])
        parts: dict[str, torch.Tensor] = {}
        file = self._files[self._shard[i]]
        for k, name in enumerate(_FIELDS):
            offset, size = self._places[6 * i + 2 * k : 6 * i + 2 * k + 2]
            if size:
                text = _read(file, offset, size)
                label = f"{file}/{self._keys[i]}"
                is_picture = name == "picture"
                parts[name] = decode_image(text, label, self._color) if is_picture else _array(text, label)
        y, truth = parts.get("y"), parts.get("x")
        picture = parts.get("picture")
        if self._measured and y is None:
            y = picture
        elif truth is None:
            truth = picture
        if y is None and truth is None:
            raise DataError(f"An image of {file} must have a picture or a .npy file, but {self._keys[i]} has neither.")
        return Measurement(y, truth, self._sigma)


def _samples(file: Path) -> Iterator[tuple[str, list[int], str]]:
    """Name, `[offset, size]` of each field, and error, of the images of a shard."""
    name, places = "", [0] * 6
    error = ""
    try:
        with tarfile.open(file, "r:") as archive:
            while (member := archive.next()) is not None:
                # The archive would store all headers.
                archive.members = []  # pyright: ignore[reportAttributeAccessIssue] - webdataset does the same
                if not member.isreg() or member.issparse() or Path(member.name).name.startswith("."):
                    continue
                folder, _, base = member.name.rpartition("/")
                stem, _, kind = base.partition(".")
                stem = f"{folder}/{stem}" if folder else stem
                if stem != name:
                    if any(places[1::2]):
                        yield name, places, ""
                    name, places = stem, [0] * 6
                if (field := _field(kind.lower())) is not None:
                    places[2 * field : 2 * field + 2] = [member.offset_data, member.size]
            # A header that is damaged or missing ends the loop like the end of the file.
            if _read(file, archive.offset, tarfile.BLOCKSIZE) != b"\0" * tarfile.BLOCKSIZE:
                error = _WHOLE.format(file, "a header is damaged")
    except (tarfile.TarError, OSError, DataError) as problem:
        error = _WHOLE.format(file, problem)
    if any(places[1::2]):
        yield name, places, ""
    if error:
        # Whatever the rest of the shard was, it is one line of the results.
        yield f"{file.stem}_damaged", [0] * 6, error


def _field(kind: str) -> int | None:
    if kind in ("y.npy", "npy"):
        return 1
    if kind == "x.npy":
        return 2
    return 0 if f".{kind}" in SUFFIXES else None


def _read(file: Path, offset: int, size: int) -> bytes:
    with open(file, "rb") as f:
        f.seek(offset)
        text = f.read(size)
    if len(text) != size:
        raise DataError(f"{file} must be whole, but ends within an image; write it again.")
    return text


def _array(text: bytes, label: str) -> torch.Tensor:
    try:
        values: Any = np.load(io.BytesIO(text), allow_pickle=False)
        t = torch.from_numpy(values)
    except Exception as error:  # numpy raises many types on damaged files
        raise DataError(f"{label} must hold whole .npy files, but does not ({error}); write it again.") from error
    if t.dtype not in checks.FLOATS:
        raise DataError(f"{label} must hold float32 or float64 arrays, but holds {t.dtype}; convert it.")
    return t
