"""Sources of measurements: pictures in a folder, tar shards, HDF5, zarr, and measurement files."""

from __future__ import annotations

import glob
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from ..data.images import SUFFIXES, load_image
from ..errors import DataError, InputError
from ..files import portable
from ..inverse.problem import build_operator, operator_measuring
from ..operators import LinearOperator
from ..problem import Problem

HDF5 = (".h5", ".hdf5")
MEASURED = (".npz", ".safetensors")
KINDS = "a folder of pictures or of measurement files, .tar shards, a .h5 file, a .zarr group, or a measurement file"


@dataclass(frozen=True)
class Measurement:
    """What a source holds of one image.

    Attributes
    ----------
    y : Tensor `[*measurement_shape]` or None
        The measurements; None if the true image is measured by the run.
    truth : Tensor `[C, H, W]` or None
        The true image, if it is known.
    sigma : float
        Standard deviation of the noise in y, or of the noise to be added.
    """

    y: torch.Tensor | None
    truth: torch.Tensor | None
    sigma: float


class Source(Protocol):
    """Measurements of images that one operator has measured. Threads may read at the same time."""

    A: LinearOperator

    def __len__(self) -> int:
        """The number of images."""
        ...

    def key(self, i: int) -> str:
        """The name of image i: unique, without dots and slashes."""
        ...

    def measurement(self, i: int) -> Measurement:
        """Read image i. Any error is that of this image alone."""
        ...


def open_source(path: str, problem: Problem, measured: bool = False, split: str = "") -> Source:
    """Open a source, whose kind follows from its name and content.

    Parameters
    ----------
    path : str
        A folder, a file, or a pattern of tar shards such as `shards-{000..003}.tar` or `shards-*.tar`.
    problem : Problem
        What measures the images, for sources that do not describe their operator; its sigma is the noise.
    measured : bool
        Whether pictures are measurements.
    split : str
        Of HDF5 and zarr: read `y_<split>` only. Empty for all.

    Raises
    ------
    InputError
        If the path is no source, an optional package is missing, or images have parameters of their own.
    """
    from . import arrays, measured_files, shards

    tars = expand(path)
    if tars:
        return shards.TarShards(tars, problem, measured)
    folder = Path(path)
    suffix = folder.suffix.lower()
    if folder.is_dir():
        if suffix == ".zarr" or (folder / "zarr.json").exists() or (folder / ".zgroup").exists():
            return arrays.zarr_source(folder, problem, split)
        return _folder(folder, problem, measured)
    if not folder.is_file():
        raise DataError(f"--data must be {KINDS}, but there is nothing at {path}; check the path.")
    if suffix in HDF5:
        return arrays.hdf5_source(folder, problem, split)
    if suffix in MEASURED:
        return measured_files.MeasurementFiles([folder])
    raise DataError(f"--data must be {KINDS}, but is {path}; name one of these.")


def expand(path: str) -> list[Path]:
    """The tar files of a path or a pattern, with `*` or one range `{000..003}`; empty if it is none."""
    if not path.lower().endswith(".tar"):
        return []
    if match := re.search(r"\{(\d+)\.\.(\d+)\}", path):
        low, high = int(match[1]), int(match[2])
        width = len(match[1])
        return [Path(f"{path[: match.start()]}{i:0{width}d}{path[match.end() :]}") for i in range(low, high + 1)]
    if Path(path).exists():
        return [Path(path)]
    paths = sorted(glob.glob(path), key=portable)
    if not paths:
        raise DataError(f"--data must be {KINDS}, but there is nothing at {path}; check the path.")
    return [Path(p) for p in paths]


def _folder(folder: Path, problem: Problem, measured: bool) -> Source:
    from . import measured_files, shards

    try:
        entries = sorted((f for f in folder.iterdir() if not f.name.startswith(".")), key=lambda f: portable(f.name))
    except OSError as error:
        raise DataError(f"--data must be a folder that can be read, but {folder} is not ({error.strerror}).") from error
    of_kind = {
        kind: [f for f in entries if f.suffix.lower() in suffixes]
        for kind, suffixes in (("tar shards", (".tar",)), ("measurement files", MEASURED), ("pictures", SUFFIXES))
    }
    present = [kind for kind, files in of_kind.items() if files]
    if len(present) != 1:
        raise DataError(
            f"--data must be {KINDS}, but {folder} holds {' and '.join(present) or 'none of these'}; "
            "name a folder that holds one kind."
        )
    files = of_kind[present[0]]
    if present[0] == "tar shards":
        return shards.TarShards(files, problem, measured)
    return (
        measured_files.MeasurementFiles(files)
        if present[0] == "measurement files"
        else Pictures(files, problem, measured)
    )


class Pictures:
    """The pictures of a folder, which the run measures, or which are measurements (`measured`)."""

    def __init__(self, files: Sequence[Path], problem: Problem, measured: bool) -> None:
        self._files, self._measured, self._sigma = files, measured, problem.sigma
        self._color = problem.color
        self._keys = unique([f.stem for f in files])
        self.A = operator_of(self, problem)

    def __len__(self) -> int:
        return len(self._files)

    def key(self, i: int) -> str:
        """The file's name without its suffix."""
        return self._keys[i]

    def measurement(self, i: int) -> Measurement:
        """Decode one picture."""
        picture = load_image(self._files[i], color=self._color)
        return Measurement(picture, None, self._sigma) if self._measured else Measurement(None, picture, self._sigma)


class Readable(Protocol):
    """The part of a source from which `operator_of` finds the shape."""

    def __len__(self) -> int:
        """The number of images."""
        ...

    def measurement(self, i: int) -> Measurement:
        """Read image i."""
        ...


def operator_of(source: Readable, problem: Problem) -> LinearOperator:
    """The problem's operator for the shape of the first image that can be read."""
    first, reason = None, "it is empty"
    for i in range(min(len(source), 1000)):
        try:
            first = source.measurement(i)
            break
        except Exception as error:  # one bad file is one line of the results
            reason = str(error)
    if first is None:
        raise DataError(f"--data must hold images, but none of the first can be read: {reason}")
    truth, y = first.truth, first.y
    if truth is not None and truth.ndim == 3:
        c, h, w = truth.shape
        A = build_operator(problem, (c, h, w))
        if y is not None:
            check_operator(A, y, truth, first.sigma)
    elif truth is None and y is not None and y.ndim == 3:
        c, h, w = y.shape
        A = operator_measuring(problem, (c, h, w))
    else:
        raise InputError(
            "--data must hold the true images [C, H, W] or measurements that are pictures, so that the size of the "
            "images is known, but holds others; use save_measurements, whose files describe their operator."
        )
    return one_for_all(A)


def check_operator(A: LinearOperator, y: torch.Tensor, truth: torch.Tensor, sigma: float) -> None:
    """Raise an `InputError` if y is farther from `A x` than from zero, which noise does not explain: by another
    operator of the same size."""
    if tuple(y.shape) != A.measurement_shape:
        raise InputError(
            f"--data must hold the measurements of --problem, {list(A.measurement_shape)} an image, but holds "
            f"{list(y.shape)}; name the problem that measured."
        )
    misfit = float((y - A.A(truth.to(y.dtype)[None])[0]).double().square().sum())
    if misfit > max(float(y.double().square().sum()), 4.0 * sigma**2 * y.numel()):
        raise InputError(
            "--data must hold the measurements of --problem, but those of the first image are far from what it "
            "measures of the true image; describe the operator that measured in a .json file."
        )


def one_for_all(A: LinearOperator) -> LinearOperator:
    """Check that an operator has no parameters for single images; return it."""
    if A.batch is not None:
        raise InputError(
            f"--data must be measured by one operator, but this {type(A).__name__} has parameters for {A.batch} images "
            "of their own; recover these with deepreg_fast.recover."
        )
    return A


def unique(names: list[str], prefixes: Callable[[int], str] | None = None) -> list[str]:
    """Names as keys, without dots and slashes. If some are equal, all get their prefix.

    Raises
    ------
    DataError
        If keys are equal even so.
    """
    keys = [re.sub(r"[./\\]", "_", portable(name)) for name in names]
    if len(set(keys)) == len(keys):
        return keys
    if prefixes is not None:
        return unique([f"{prefixes(i)}_{name}" for i, name in enumerate(names)])
    seen: set[str] = set()
    twice = next(k for k in keys if k in seen or seen.add(k))
    raise DataError(f"--data must hold images whose names differ, but {twice} comes twice; rename one of them.")
