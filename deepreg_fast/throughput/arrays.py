"""HDF5 files as deepinv's `generate_dataset` writes them, and zarr groups of the same layout."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import DataError, InputError
from ..problem import Problem
from .sources import Measurement, operator_of

_BLOCK_BYTES = 2**26


def hdf5_source(path: Path, problem: Problem, split: str) -> Arrays:
    """The measurements of an HDF5 file."""
    try:
        import h5py
    except ImportError as error:
        raise InputError(f"{path} must be read with h5py, which is not installed; run pip install h5py.") from error
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise DataError(f"{path} must be a whole HDF5 file, but is not ({error}); write it again.") from error
    return Arrays(file, str(path), problem, split)


def zarr_source(path: Path, problem: Problem, split: str) -> Arrays:
    """The measurements of a zarr group."""
    try:
        import zarr
    except ImportError as error:
        raise InputError(f"{path} must be read with zarr, which is not installed; run pip install zarr.") from error
    try:
        group = zarr.open_group(str(path), mode="r")
    except Exception as error:  # zarr and its stores raise many types
        raise DataError(f"{path} must be a zarr group, but is not ({error}); write it again.") from error
    return Arrays(group, str(path), problem, split)


class Arrays:
    """Arrays `y_<split>` `[N, ...]`, with the true images in `x_<split>` if they are known.

    With one split the name may also be `y` and `x` alone. Arrays that hold parameters of single images, as deepinv's
    physics generators write them, are refused.
    """

    def __init__(self, group: Any, path: str, problem: Problem, split: str) -> None:
        self._path, self._sigma = path, problem.sigma
        names = list(group)
        if "stacked" in dict(group.attrs):
            raise InputError(f"{path} must hold one array of measurements, but holds those of stacked operators.")
        splits = [n[1:] for n in sorted(names) if n == "y" or n.startswith("y_")]
        if split:
            splits = [s for s in splits if s == f"_{split}"]
        if not splits:
            raise DataError(
                f"{path} must hold {'y_' + split if split else 'an array y_train, y_val, y_test or y'}, but holds "
                f"{', '.join(names) or 'nothing'}; choose another --split or file."
            )
        if others := [n for s in splits for n in names if s and n.endswith(s) and n not in (f"y{s}", f"x{s}")]:
            raise InputError(
                f"{path} must be measured by one operator, but holds parameters of single images "
                f"({', '.join(others)}); recover these with deepreg_fast.recover."
            )
        self._splits = [s.removeprefix("_") for s in splits]
        self._y = [_Rows(group[f"y{s}"]) for s in splits]
        self._x = [_Rows(group[f"x{s}"]) if f"x{s}" in names else None for s in splits]
        self._ends = np.cumsum([len(rows) for rows in self._y])
        for s, y, x in zip(splits, self._y, self._x, strict=True):
            if x is not None and len(x) != len(y):
                raise DataError(f"{path} must hold as many images x{s} as measurements y{s}, but does not.")
        self.A = operator_of(self, problem)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def _place(self, i: int) -> tuple[int, int]:
        part = int(np.searchsorted(self._ends, i, side="right"))
        return part, i - (int(self._ends[part - 1]) if part else 0)

    def key(self, i: int) -> str:
        """The split and the number in it."""
        part, row = self._place(i)
        return f"{self._splits[part] or 'image'}_{row:07d}"

    def measurement(self, i: int) -> Measurement:
        """Read one row."""
        part, row = self._place(i)
        x = self._x[part]
        return Measurement(self._y[part].row(row), None if x is None else x.row(row), self._sigma)


class _Rows:
    """The rows of an array. The last block of rows, a chunk of the file, is stored."""

    def __init__(self, array: Any) -> None:
        self.array = array
        if array.dtype.kind != "f":
            raise InputError(f"Measurements and images must be real numbers, but {array.name} holds {array.dtype}.")
        chunks = getattr(array, "chunks", None)
        row_bytes = max(1, array.dtype.itemsize * int(np.prod(array.shape[1:])))
        self._block = min(max(1, chunks[0] if chunks else 1), max(1, _BLOCK_BYTES // row_bytes))
        self._lock = threading.Lock()
        self._start, self._values = -1, np.empty(0)

    def __len__(self) -> int:
        return int(self.array.shape[0])

    def row(self, i: int) -> torch.Tensor:
        """Row i as float32 or float64."""
        start = i // self._block * self._block
        with self._lock:
            if start != self._start:
                self._values, self._start = np.asarray(self.array[start : start + self._block]), start
            values = self._values[i - start]
        return torch.from_numpy(values.astype(np.float64 if values.dtype == np.float64 else np.float32))
