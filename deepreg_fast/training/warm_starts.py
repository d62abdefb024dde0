"""Warm starts of each sample: recovery, adjoint solution, perturbation and step size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from .checkpoint import Array
from .placement import DeviceSamples, FileSamples, PinnedSamples, Placement, Rows, SampleTable

FIELDS = ("x", "gamma", "delta")


class WarmStarts:
    """Images `[N, C, h, w]`: on the device if they fit its budget, else in host memory up to `host_mb`, else in files
    in the run's folder. Step sizes and numbers of visits are on the device.

    `blank` `[N]`, on the host, is true for samples that have no perturbation yet.
    """

    def __init__(self, count: int, image: tuple[int, ...], placement: Placement, host_mb: int, folder: Path) -> None:
        shape, device = (count, *image), placement.device
        self.location = placement.location(len(FIELDS) * 4 * int(np.prod(shape)), host_mb)

        def table(name: str) -> SampleTable:
            if self.location == "device":
                return DeviceSamples(shape, torch.float32, device)
            if self.location == "pinned":
                return PinnedSamples(shape, device)
            return FileSamples(folder / f"store_{name}.bin", shape, device)

        self.tables: dict[str, SampleTable] = {name: table(name) for name in FIELDS}
        self.tables["tau"] = DeviceSamples((count,), torch.float64, device)
        self.tables["visits"] = DeviceSamples((count,), torch.int64, device)
        self.blank = np.ones(count, bool)

    def open(self) -> None:
        """Create the files, if the images are stored in files. The caller must hold the run's lock."""
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
            self.blank[rows.host] = False

    def state(self) -> dict[str, Array]:
        """The arrays by name, for a checkpoint."""
        return {f"store.{k}": t.array() for k, t in self.tables.items()}

    def load(self, tensors: dict[str, np.ndarray]) -> None:
        """Restore the arrays of a checkpoint."""
        for k, t in self.tables.items():
            t.fill(tensors[f"store.{k}"])
        self.blank = ~np.any(tensors["store.delta"], axis=(1, 2, 3))
