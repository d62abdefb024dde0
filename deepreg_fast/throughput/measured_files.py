"""The files of `save_measurements` as a source."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from ..errors import DataError
from ..inverse.measurements import count_measurements, load_measurements, measurements_of
from .sources import Measurement, one_for_all, unique


class MeasurementFiles:
    """Measurements of one operator in one or many files. A .npz file with several images is read as a whole and stored
    until another one is read."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._files = files
        self._errors: dict[int, str] = {}
        counts: list[int] = []
        first: Path | None = None
        for number, file in enumerate(files):
            try:
                count, fingerprint = count_measurements(file)
            except DataError as error:
                # The file is one line of the results.
                count, self._errors[number] = 1, str(error)
            else:
                if first is None:
                    first, self._fingerprint = file, fingerprint
            counts.append(count)
        if first is None:
            raise DataError(f"--data must hold measurement files, but none can be read: {self._errors[0]}")
        _, A, self.sigma = load_measurements(first)
        self.A = one_for_all(A)
        self._ends = np.cumsum(counts)
        names = [
            file.stem if count == 1 else f"{file.stem}_{row:03d}"
            for file, count in zip(files, counts, strict=True)
            for row in range(count)
        ]
        self._keys = unique(names)
        self._lock = threading.Lock()
        self._number, self._y, self._noise = -1, torch.zeros(0, dtype=torch.float32, device="cpu"), 0.0

    def __len__(self) -> int:
        return int(self._ends[-1])

    def key(self, i: int) -> str:
        """The name of the file, with the number of the image if it holds several."""
        return self._keys[i]

    def measurement(self, i: int) -> Measurement:
        """Read one image's measurements."""
        number = int(np.searchsorted(self._ends, i, side="right"))
        row = i - (int(self._ends[number - 1]) if number else 0)
        if number in self._errors:
            raise DataError(self._errors[number])
        file = self._files[number]
        if file.suffix.lower() != ".npz":
            y, sigma = measurements_of(file, self._fingerprint, row)
            return Measurement(y[0], None, sigma)
        with self._lock:
            if number != self._number:
                self._y, self._noise = measurements_of(file, self._fingerprint)
                self._number = number
            return Measurement(self._y[row], None, self._noise)
