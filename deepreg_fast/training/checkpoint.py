"""Checkpoints: safetensors with JSON in the header, never pickle, replaced atomically.

Files are written and read in pieces, because the warm starts of a large data set are on disk or on a device and may not
fit into host memory.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch

from ..errors import CheckpointError
from ..files import write_atomically

FORMAT = "deepreg-fast-checkpoint-1"
_PIECE = 2**24
_DTYPES = {"float32": "F32", "float64": "F64", "int64": "I64"}

Array: TypeAlias = np.ndarray | torch.Tensor


def save_checkpoint(path: Path, tensors: Mapping[str, Array], state: dict[str, Any]) -> None:
    """Write arrays, tensors on any device and a JSON-serializable state to one file."""
    write_atomically(path, _pieces(tensors, {"format": FORMAT, "state": json.dumps(state)}))


def _pieces(tensors: Mapping[str, Array], metadata: dict[str, str]) -> Iterator[bytes]:
    """The bytes of a safetensors file: length and text of the header, then the arrays."""
    # Widest dtypes first, so that every array is aligned to its item size.
    order = sorted(tensors, key=lambda k: -tensors[k].itemsize)
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name in order:
        a = tensors[name]
        header[name] = {"dtype": _DTYPES[_type(a)], "shape": list(a.shape), "data_offsets": [end, end + a.nbytes]}
        end += a.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little")
    yield text
    for name in order:
        flat = tensors[name].reshape(-1)
        count = _PIECE // flat.itemsize
        for i in range(0, len(flat), count):
            piece = flat[i : i + count]
            yield (piece.detach().cpu().numpy() if isinstance(piece, torch.Tensor) else piece).tobytes()


def _type(a: Array) -> str:
    return str(a.dtype).removeprefix("torch.")


def load_checkpoint(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Read a file of `save_checkpoint`. The arrays are memory-mapped.

    Raises
    ------
    CheckpointError
        If the file is missing, truncated, or not a checkpoint of this package.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise CheckpointError(f"A checkpoint must be at {path}, but there is none; name the run's folder or file.")
    try:
        with safe_open(path, framework="np") as f:
            metadata = f.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} must be a whole checkpoint, but cannot be read ({error}); use an older one."
        ) from error
    if metadata.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} must be a training checkpoint of this version, but its format is {metadata.get('format')!r}; "
            "use weights with deepreg_fast.load instead."
        )
    return _mapped(path), json.loads(metadata["state"])


def _mapped(path: Path) -> dict[str, np.ndarray]:
    """Read-only views of the arrays of a safetensors file whose structure has been checked."""
    with open(path, "rb") as f:
        start = 8 + int.from_bytes(f.read(8), "little")
        header = json.loads(f.read(start - 8))
    data = np.memmap(path, np.uint8, "r", offset=0)
    types = {v: k for k, v in _DTYPES.items()}
    arrays: dict[str, np.ndarray] = {}
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            arrays[name] = data[start + begin : start + end].view(types[entry["dtype"]]).reshape(entry["shape"])
    return arrays


def moments(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Adam's step numbers and moments, by parameter number and name."""
    state = optimizer.state_dict()["state"]
    # Adam creates step numbers in torch's default dtype.
    return {
        f"adam.{i}.{k}": (v.to(torch.float32) if k == "step" else v).reshape(-1)
        for i, values in state.items()
        for k, v in values.items()
    }


def load_moments(optimizer: torch.optim.Optimizer, tensors: dict[str, np.ndarray]) -> None:
    """Restore what `moments` returned, on the device of the optimizer's parameters."""
    adam = optimizer.state_dict()
    # Discard the current state, even for parameters that the checkpoint lacks.
    adam["state"] = {}
    for i, p in enumerate(p for g in optimizer.param_groups for p in g["params"]):
        prefix = f"adam.{i}."
        values = {k.removeprefix(prefix): np.array(v) for k, v in tensors.items() if k.startswith(prefix)}
        if values:
            shaped = {k: v.reshape(() if k == "step" else tuple(p.shape)) for k, v in values.items()}
            adam["state"][i] = {k: torch.from_numpy(v) for k, v in shaped.items()}
    optimizer.load_state_dict(adam)
