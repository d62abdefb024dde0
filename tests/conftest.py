"""One thread per test process, deterministic hypothesis in CI, and the `gpu` marker."""

from __future__ import annotations

import os
import sys
from pathlib import Path

# Before torch is imported, and inherited by the processes that tests start: pytest-xdist already fills the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
if not Path("/dev/nvidiactl").exists():
    # Before triton is imported: its kernels then run in the interpreter, on CPU tensors.
    os.environ.setdefault("TRITON_INTERPRET", "1")

import hypothesis
import numpy as np
import pytest
import torch
from PIL import Image

from .torchvision_shim import define

torch.set_num_threads(1)
define()

# No deadline: the first call of a torch function may take long, and no test may depend on the machine's load.
hypothesis.settings.register_profile("local", deadline=None, max_examples=50)
hypothesis.settings.register_profile(
    "ci", deadline=None, max_examples=50, derandomize=True, database=None, print_blob=True
)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "local")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if "triton.runtime.interpreter" in sys.modules:
        from .interpreter import quicken

        quicken()
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA device on this machine")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(name="folder", scope="session")
def _folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight smooth 24 x 24 pictures."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for i in range(8):
        coarse = Image.fromarray(rng.integers(0, 255, (5, 5), dtype=np.uint8))
        coarse.resize((24, 24), Image.Resampling.BICUBIC).save(folder / f"{i}.png")
    return folder
