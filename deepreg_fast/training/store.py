"""What each sample keeps between two visits: recovery, adjoint, perturbation, step size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from ..files import make_folder

FIELDS = ("x", "gamma", "delta")


class Store:
    """Arrays `[N, 1, h, w]` in memory up to a budget, in a file of the run's folder beyond it."""

    def __init__(self, count: int, image: tuple[int, ...], budget_mb: int, folder: Path) -> None:
        shape = (count, *image)
        need = len(FIELDS) * 4 * int(np.prod(shape))
        self.on_disk = need > budget_mb * 2**20
        self.arrays: dict[str, np.ndarray] = {}
        if self.on_disk:
            make_folder(folder)
        for name in FIELDS:
            if self.on_disk:
                path = folder / f"store_{name}.bin"
                self.arrays[name] = np.memmap(path, np.float32, "w+", shape=shape)
            else:
                self.arrays[name] = np.zeros(shape, np.float32)
        self.arrays["tau"] = np.zeros(count, np.float64)
        self.arrays["visits"] = np.zeros(count, np.int64)

    def get(self, name: str, rows: np.ndarray) -> torch.Tensor:
        """A copy of these samples' values."""
        return torch.from_numpy(np.array(self.arrays[name][rows]))

    def put(self, name: str, rows: np.ndarray, value: torch.Tensor) -> None:
        """Keep these samples' values."""
        self.arrays[name][rows] = value.detach().cpu().numpy()

    def state(self) -> dict[str, np.ndarray]:
        """The arrays by name, for a checkpoint."""
        return {f"store.{k}": np.asarray(v) for k, v in self.arrays.items()}

    def load(self, tensors: dict[str, np.ndarray]) -> None:
        """Take the arrays of a checkpoint."""
        for k, v in self.arrays.items():
            v[...] = tensors[f"store.{k}"]
