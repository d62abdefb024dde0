"""Measurement files: the measurements with the description and fingerprint of their operator."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from .. import checks
from ..errors import DataError, OperatorMismatch
from ..files import write_atomically
from ..operators import LinearOperator, from_description

T = TypeVar("T")
FORMAT = "deepreg-fast-measurements-1"


def save_measurements(path: str | Path, y: torch.Tensor, A: LinearOperator, sigma: float = 0.0) -> None:
    """Write `y` `[B, *A.measurement_shape]` with the operator's description to `.npz` (no pickle) or `.safetensors`."""
    path = Path(path)
    header = {
        "format": FORMAT,
        "operator": json.dumps(A.describe()),
        "fingerprint": A.fingerprint(),
        "sigma": json.dumps(sigma),
    }
    suffix = path.suffix.lower()
    if not isinstance(y, torch.Tensor) or y.ndim < 2 or y.dtype not in checks.FLOATS:
        raise DataError(
            f"Measurements must be a float32 or float64 tensor [B, m], but are {checks.describe(y)}; convert them."
        )
    if tuple(y.shape[1:]) != A.measurement_shape:
        raise DataError(
            f"Measurements must be those of the operator, {list(A.measurement_shape)} an image, but have "
            f"{list(y.shape[1:])}; give the operator that measured."
        )
    checks.number(sigma, "sigma", 0.0)
    if suffix == ".npz":
        buffer = io.BytesIO()
        np.savez(buffer, allow_pickle=False, y=y.detach().cpu().numpy(), **{k: np.array(v) for k, v in header.items()})
        write_atomically(path, buffer.getvalue())
    elif suffix == ".safetensors":
        from safetensors.torch import save

        write_atomically(path, save({"y": y.detach().cpu().contiguous()}, metadata=header))
    else:
        raise DataError(f"Measurements are written to .npz or .safetensors, but the name is {path.name}; rename it.")


def load_measurements(path: str | Path) -> tuple[torch.Tensor, LinearOperator, float]:
    """Read `(y, A, sigma)` from a file written by `save_measurements`.

    Raises
    ------
    DataError
        If the file is missing, truncated or not a measurement file.
    OperatorMismatch
        If the rebuilt operator differs from the one that made the measurements.
    """
    path = Path(path)
    y, header = _read(path)
    try:
        A = from_description(json.loads(header["operator"]))
        fingerprint, sigma = header["fingerprint"], checks.number(json.loads(header["sigma"]), "sigma", 0.0)
    except Exception as error:  # a damaged description can raise anything
        raise DataError(
            f"{path} must describe its operator and its noise, but does not ({error}); write it again."
        ) from error
    if A.fingerprint() != fingerprint or tuple(y.shape[1:]) != A.measurement_shape:
        raise OperatorMismatch(
            f"The operator of {path} must be the one described in it, but the one built here differs (fingerprint or "
            f"{list(y.shape[1:])} measurements against {list(A.measurement_shape)}); use the version that wrote it."
        )
    return y, A, sigma


def count_measurements(path: Path) -> tuple[int, str]:
    """The number of images in a measurement file and the fingerprint of their operator, without reading all.

    Raises
    ------
    DataError
        As `load_measurements`.
    """
    count, header = _guarded(path, _count_npz if path.suffix.lower() == ".npz" else _count_safetensors)
    _check_format(path, header)
    if count < 1:
        raise DataError(f"{path} must hold measurements of at least one image, but holds none; write it again.")
    return count, header.get("fingerprint", "")


def measurements_of(path: Path, fingerprint: str, row: int | None = None) -> tuple[torch.Tensor, float]:
    """`(y, sigma)` of a file whose operator must have this fingerprint, with one row or all. A row of a .safetensors
    file is read alone.

    Raises
    ------
    DataError, OperatorMismatch
        As `load_measurements`.
    """
    y, header = _read(path, row)
    if header.get("fingerprint") != fingerprint:
        raise OperatorMismatch(
            f"{path} must hold measurements by the operator of the other files, but has another fingerprint; "
            "recover it apart."
        )
    try:
        return y, checks.number(json.loads(header["sigma"]), "sigma", 0.0)
    except Exception as error:  # a damaged header can raise anything
        raise DataError(f"{path} must tell its noise, but does not ({error}); write it again.") from error


def _read(path: Path, row: int | None = None) -> tuple[torch.Tensor, dict[str, str]]:
    y, header = _guarded(path, lambda p: _read_npz(p) if p.suffix.lower() == ".npz" else _read_safetensors(p, row))
    _check_format(path, header)
    if y.ndim < 2:
        raise DataError(f"{path} must be written by save_measurements, but has no rows; write it with that.")
    if y.dtype not in checks.FLOATS or len(y) == 0:
        raise DataError(
            f"{path} must hold float32 or float64 measurements of at least one image, but holds "
            f"{checks.describe(y)}; write it again."
        )
    return y, header


def _guarded(path: Path, reader: Callable[[Path], T]) -> T:
    if not path.is_file():
        raise DataError(f"Measurements must be a file, but there is none at {path}; check the path.")
    try:
        return reader(path)
    except DataError:
        raise
    except Exception as error:  # each reader raises its own types
        raise DataError(
            f"{path} must be a whole measurement file, but cannot be read ({error}); write it again."
        ) from error


def _check_format(path: Path, header: dict[str, str]) -> None:
    if header.get("format") != FORMAT:
        raise DataError(f"{path} must be written by save_measurements, but has no such header; write it with that.")


def _read_npz(path: Path) -> tuple[torch.Tensor, dict[str, str]]:
    if not zipfile.is_zipfile(path):
        raise DataError(f"{path} must be a whole .npz file, but is not a zip archive; write it again.")
    with np.load(path, allow_pickle=False) as f:
        return torch.from_numpy(f["y"]), {k: str(f[k]) for k in f.files if k != "y"}


def _count_npz(path: Path) -> tuple[int, dict[str, str]]:
    if not zipfile.is_zipfile(path):
        raise DataError(f"{path} must be a whole .npz file, but is not a zip archive; write it again.")
    with zipfile.ZipFile(path) as archive, archive.open("y.npy") as f:
        version = np.lib.format.read_magic(f)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        count = read(f)[0][0]
    with np.load(path, allow_pickle=False) as f:
        return count, {k: str(f[k]) for k in f.files if k != "y"}


def _read_safetensors(path: Path, row: int | None = None) -> tuple[torch.Tensor, dict[str, str]]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as f:
        y = f.get_tensor("y") if row is None else f.get_slice("y")[row : row + 1]
        return y, f.metadata() or {}


def _count_safetensors(path: Path) -> tuple[int, dict[str, str]]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as f:
        return f.get_slice("y").get_shape()[0], f.metadata() or {}
