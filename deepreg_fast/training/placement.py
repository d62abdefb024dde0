"""Placement of a training's per-sample data, and the transfers between host and device.

A step synchronizes only in `read` and once in `MedianClip`. Transfers to the device are asynchronous.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from .. import checks
from ..errors import InputError
from ..files import make_folder, reserve
from .checkpoint import Array
from .lanes import Rows

# Fraction of the free device memory at the start that samples and warm starts may use. The rest is for the solvers.
DEVICE_SHARE = 0.5
_PIECE = 256


def upload(t: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a host tensor to `device` asynchronously, through pinned memory."""
    return t if device.type == "cpu" else t.pin_memory().to(device, non_blocking=True)


def read(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copy tensors to the host in float64, with one synchronizing transfer."""
    flat = torch.cat([t.detach().reshape(-1).double() for t in tensors.values()]).cpu()
    parts = flat.split([t.numel() for t in tensors.values()])
    return {k: p.reshape(t.shape) for (k, t), p in zip(tensors.items(), parts, strict=True)}


class Placement:
    """The device of a training, and how much of its memory is left for per-sample data.

    Parameters
    ----------
    name : str
        "cpu", "cuda", "cuda:1" or "auto".
    budget_mb : int
        Device memory for samples and warm starts; 0 uses `DEVICE_SHARE` of the free memory.
    """

    def __init__(self, name: str, budget_mb: int = 0) -> None:
        self.device = checks.device(name)
        # True if the device has its own memory (a test overrides this on the CPU).
        self.has_own_memory = self.device.type != "cpu"
        self.left = budget_mb * 2**20
        if self.has_own_memory and not budget_mb:
            self.left = int(DEVICE_SHARE * torch.cuda.mem_get_info(self.device)[0])

    def take(self, count: int) -> bool:
        """Reserve `count` bytes of the device if the budget allows. Returns whether it did."""
        if not self.has_own_memory or count > self.left:
            return False
        self.left -= count
        return True

    def location(self, count: int, host_mb: int) -> str:
        """Location of `count` bytes: "device", else "pinned" host memory up to `host_mb`, else "disk"."""
        if self.take(count):
            return "device"
        if count > host_mb * 2**20:
            return "disk"
        return "pinned" if self.has_own_memory else "device"

    def rows(self, samples: np.ndarray, local: np.ndarray | None = None) -> Rows:
        """Samples, whose rows in this process's tables are `local` (by default all samples have a row)."""
        local = samples if local is None else local
        return Rows(samples, local, self.upload(torch.from_numpy(local)))

    def upload(self, t: torch.Tensor) -> torch.Tensor:
        """Copy a host tensor to the device."""
        return upload(t, self.device)

    @contextmanager
    def current(self) -> Iterator[None]:
        """Make the device current, so that kernels launch there, and make torch's convolutions on it deterministic and
        true float32. (Their default, TF32, ends tight solves early by its rounding.)"""
        if self.device.type == "cpu":
            yield
            return
        reproducible = torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False)
        with torch.cuda.device(self.device), reproducible:
            yield


class SampleTable(Protocol):
    """One array `[N, ...]`, a row for each sample."""

    def get(self, rows: Rows) -> torch.Tensor:
        """A copy of these rows, on the device."""
        ...

    def put(self, rows: Rows, value: torch.Tensor) -> None:
        """Replace these rows."""
        ...

    def array(self) -> Array:
        """All rows, without a copy."""
        ...

    def fill(self, array: np.ndarray, owned: np.ndarray) -> None:
        """Replace all rows by the rows `owned` of an array, which may be a mapped file."""
        ...


class DeviceSamples:
    """Rows in device memory."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        self.data = torch.zeros(shape, dtype=dtype, device=device)

    def get(self, rows: Rows) -> torch.Tensor:
        """A copy of these rows."""
        return self.data.index_select(0, rows.index)

    def put(self, rows: Rows, value: torch.Tensor) -> None:
        """Replace these rows."""
        self.data.index_copy_(0, rows.index, value.detach())

    def array(self) -> Array:
        """All rows, on the device."""
        return self.data

    def fill(self, array: np.ndarray, owned: np.ndarray) -> None:
        """Replace all rows."""
        for i in range(0, len(owned), _PIECE):
            self.data[i : i + _PIECE].copy_(torch.from_numpy(np.array(array[owned[i : i + _PIECE]])))


class PinnedSamples:
    """Rows in pinned host memory, copied one by one and asynchronously in stream order."""

    def __init__(self, shape: tuple[int, ...], device: torch.device) -> None:
        self.device = device
        self.data = self._rows(shape, device)

    @staticmethod
    def _rows(shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.float32, device="cpu", pin_memory=device.type == "cuda")

    def get(self, rows: Rows) -> torch.Tensor:
        """A copy of these rows, on the device."""
        out = torch.empty((len(rows), *self.data.shape[1:]), dtype=self.data.dtype, device=self.device)
        for i, row in enumerate(rows.local.tolist()):
            out[i].copy_(self.data[row], non_blocking=True)
        return out

    def put(self, rows: Rows, value: torch.Tensor) -> None:
        """Replace these rows."""
        for i, row in enumerate(rows.local.tolist()):
            self.data[row].copy_(value[i].detach(), non_blocking=True)

    def _wait(self) -> np.ndarray:
        """The rows, after all pending copies have completed."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return self.data.numpy()

    def array(self) -> Array:
        """All rows."""
        return self._wait()

    def fill(self, array: np.ndarray, owned: np.ndarray) -> None:
        """Replace all rows."""
        _copy_rows(self._wait(), array, owned)


class FileSamples:
    """Rows in a file, for data that fits into no memory. `open` or the first `put` creates the file; before that, a
    file at `path` may belong to another run, and the rows are zeros or the array passed to `fill`."""

    def __init__(self, path: Path, shape: tuple[int, ...], device: torch.device) -> None:
        self.path, self.shape, self.device = path, shape, device
        self._file: np.memmap | None = None
        self._before: tuple[np.ndarray, np.ndarray] | None = None

    def open(self) -> np.ndarray:
        """The rows, mapped from the file, which is created if needed."""
        if self._file is None:
            make_folder(self.path.parent)
            try:
                with open(self.path, "wb") as f:
                    reserve(f, 4 * int(np.prod(self.shape)))
                self._file = np.memmap(self.path, np.float32, "r+", shape=self.shape)
            except OSError as error:
                raise InputError(
                    f"{self.path} must have room for the warm starts, but the system says: {error.strerror or error}; "
                    "free space, or raise memory_budget_mb to keep them in memory."
                ) from error
            if self._before is not None:
                _copy_rows(self._file, *self._before)
                self._before = None
        return self._file

    def get(self, rows: Rows) -> torch.Tensor:
        """A copy of these rows, on the device."""
        return upload(torch.from_numpy(np.array(self.array()[rows.local])), self.device)

    def put(self, rows: Rows, value: torch.Tensor) -> None:
        """Replace these rows."""
        self.open()[rows.local] = value.detach().cpu().numpy()

    def array(self) -> np.ndarray:
        """All rows, without a copy."""
        if self._file is not None:
            return np.asarray(self._file)
        if self._before is None:
            return np.broadcast_to(np.float32(0), self.shape)
        array, owned = self._before
        return array if len(owned) == len(array) else array[owned]

    def fill(self, array: np.ndarray, owned: np.ndarray) -> None:
        """Replace all rows."""
        if self._file is not None:
            _copy_rows(self._file, array, owned)
        else:
            self._before = (array, owned)


def _copy_rows(target: np.ndarray, array: np.ndarray, owned: np.ndarray) -> None:
    for i in range(0, len(owned), _PIECE):
        target[i : i + _PIECE] = array[owned[i : i + _PIECE]]
