"""Measurement files: the measurements with the description and fingerprint of their operator."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path

import numpy as np
import torch

from .. import checks
from ..errors import DataError, OperatorMismatch
from ..files import write_atomically
from ..operators import LinearOperator, from_description

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
    if not path.is_file():
        raise DataError(f"Measurements must be a file, but there is none at {path}; check the path.")
    try:
        y, header = _read_npz(path) if path.suffix.lower() == ".npz" else _read_safetensors(path)
    except DataError:
        raise
    except Exception as error:  # each reader raises its own types
        raise DataError(
            f"{path} must be a whole measurement file, but cannot be read ({error}); write it again."
        ) from error
    if header.get("format") != FORMAT or y.ndim < 2:
        raise DataError(f"{path} must be written by save_measurements, but has no such header; write it with that.")
    if y.dtype not in checks.FLOATS or len(y) == 0:
        raise DataError(
            f"{path} must hold float32 or float64 measurements of at least one image, but holds "
            f"{checks.describe(y)}; write it again."
        )
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


def _read_npz(path: Path) -> tuple[torch.Tensor, dict[str, str]]:
    if not zipfile.is_zipfile(path):
        raise DataError(f"{path} must be a whole .npz file, but is not a zip archive; write it again.")
    with np.load(path, allow_pickle=False) as f:
        return torch.from_numpy(f["y"]), {k: str(f[k]) for k in f.files if k != "y"}


def _read_safetensors(path: Path) -> tuple[torch.Tensor, dict[str, str]]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as f:
        return f.get_tensor("y"), f.metadata() or {}
