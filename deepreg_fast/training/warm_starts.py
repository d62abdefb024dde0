"""Warm starts of each sample: recovery, adjoint solution, perturbation and step size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from .checkpoint import Array
from .lanes import Rows
from .placement import DeviceSamples, FileSamples, PinnedSamples, Placement, SampleTable

FIELDS = ("x", "gamma", "delta")


class WarmStarts:
    """Images `[N, C, h, w]` of the samples of this process: on the device if they fit its budget, else in host memory
    up to `host_mb`, else in files in the run's folder. Step sizes and numbers of visits are on the device.

    `blank` `[N]`, on the host, is true for samples that have no perturbation yet.
    """

    def __init__(
        self, count: int, image: tuple[int, ...], placement: Placement, host_mb: int, folder: Path, rank: int = 0
    ) -> None:
        shape, device = (count, *image), placement.device
        suffix = f".{rank}" if rank else ""
        self.folder, self.rank = folder, rank
        self.location = placement.location(len(FIELDS) * 4 * int(np.prod(shape)), host_mb)

        def table(name: str) -> SampleTable:
            if self.location == "device":
                return DeviceSamples(shape, torch.float32, device)
            if self.location == "pinned":
                return PinnedSamples(shape, device)
            return FileSamples(folder / f"store_{name}{suffix}.bin", shape, device)

        self.tables: dict[str, SampleTable] = {name: table(name) for name in FIELDS}
        self.tables["tau"] = DeviceSamples((count,), torch.float64, device)
        self.tables["visits"] = DeviceSamples((count,), torch.int64, device)
        self.blank = np.ones(count, bool)

    def open(self, processes: int = 1) -> None:
        """Create the files, if the images are stored in files, and remove those of processes that the run had before.
        The caller must hold the run's lock."""
        for path in self.folder.glob("store_*.*.bin") if self.rank == 0 else ():
            if int(path.suffixes[-2][1:]) >= processes:
                path.unlink()
        for table in self.tables.values():
            if isinstance(table, FileSamples):
                table.open()

    def get(self, name: str, rows: Rows) -> torch.Tensor:
        """A copy of the values of the samples `rows`, on the device."""
        return self.tables[name].get(rows)

    def put(self, name: str, rows: Rows, value: torch.Tensor) -> None:
        """Save the values of the samples `rows`."""
        self.tables[name].put(rows, value)
        if name == "delta":
            self.blank[rows.local] = False

    def state(self) -> dict[str, Array]:
        """The arrays by name, for a checkpoint."""
        return {f"store.{k}": t.array() for k, t in self.tables.items()}

    def load(self, tensors: dict[str, np.ndarray], owned: np.ndarray) -> None:
        """Restore the rows `owned` of the arrays of a checkpoint."""
        for k, t in self.tables.items():
            t.fill(tensors[f"store.{k}"], owned)
        delta = tensors["store.delta"]
        self.blank = np.array([not delta[s].any() for s in owned], bool)
