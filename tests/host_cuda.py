"""The CUDA sources compiled by g++: every block and thread in turn, shared memory that starts as NaN."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

from deepreg_fast.backend.gpu import nvrtc

FLAGS = ("-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared")
CTYPES = {"uint64": ctypes.c_uint64, "int32": ctypes.c_int32, "float32": ctypes.c_float}
COMPILER = shutil.which("g++")


@lru_cache(maxsize=8)
def library(name: str, options: tuple[str, ...] = ()) -> ctypes.CDLL:
    """A source of csrc/cuda, compiled once for each content on this machine, with a compiler's further options."""
    assert COMPILER is not None
    texts = nvrtc.sources(name)
    version = subprocess.run([COMPILER, "--version"], capture_output=True, text=True, check=True).stdout
    key = hashlib.sha256(repr((texts, FLAGS, options, version)).encode()).hexdigest()[:24]
    folder = Path(tempfile.gettempdir()) / f"deepreg-fast-tests-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    path = folder / f"{Path(name).stem}-{key}.so"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=folder) as work:
            for other, text in texts.items():
                (Path(work) / other).write_text(text)
            command = [COMPILER, *FLAGS, *options, "-x", "c++", name, "-o", "out.so"]
            done = subprocess.run(command, cwd=work, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
            os.replace(Path(work) / "out.so", path)
    return ctypes.CDLL(str(path))


class HostLauncher:
    """Runs the threads of a block one after the other: in order, backwards, or in a random order in each phase."""

    def __init__(self, name: str, order: int = 0, options: tuple[str, ...] = ()) -> None:
        self.library, self.order, self.launches = library(name, options), order, 0

    def launch(self, kernel: str, blocks: int, threads: int, shared: int, arguments: Sequence[np.generic]) -> None:
        """As `CudaModule.launch`."""
        self.launches += 1
        values = [CTYPES[a.dtype.name](a.item()) for a in arguments]
        assert getattr(self.library, kernel)(blocks, threads, shared, self.order, *values) == 0
