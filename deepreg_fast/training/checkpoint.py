"""Checkpoints: safetensors with JSON in the header, never pickle, replaced atomically.

Files are written and read in pieces, because the warm starts of a large data set are on disk or on a device and may not
fit into host memory.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import numpy as np
import torch

from ..errors import CheckpointError
from ..files import reserve, sync, sync_folder, write_atomically, writing
from .world import World

FORMAT = "deepreg-fast-checkpoint-1"
_PIECE = 2**24
_ROWS = 256
_DTYPES = {"float32": "F32", "float64": "F64", "int64": "I64"}

Array: TypeAlias = np.ndarray | torch.Tensor


@dataclass(frozen=True)
class Shard:
    """Rows of an array `[count, ...]` that is divided among processes: those of this one, which are rows `owned`."""

    array: Array
    owned: np.ndarray
    count: int


def save_checkpoint(
    path: Path,
    tensors: Mapping[str, Array],
    state: dict[str, Any],
    shards: Mapping[str, Shard] | None = None,
    world: World | None = None,
) -> None:
    """Write arrays, tensors on any device and a JSON-serializable state to one file.

    All processes of `world` call this; each writes its rows of the arrays `shards`, the first one all the rest. The
    file does not depend on the number of processes.
    """
    shards = shards or {}
    sizes = {k: (_type(a), tuple(a.shape), a.itemsize) for k, a in tensors.items()}
    sizes |= {k: (_type(s.array), (s.count, *s.array.shape[1:]), s.array.itemsize) for k, s in shards.items()}
    text, offsets = _layout(sizes, {"format": FORMAT, "state": json.dumps(state)})
    if world is None or world.size == 1:
        arrays = {**tensors, **{k: s.array for k, s in shards.items()}}
        pieces = (piece for name in offsets for piece in _pieces(arrays[name]))
        write_atomically(path, itertools.chain((text,), pieces))
    else:
        _write_together(path, text, offsets, tensors, shards, world)


def _layout(
    sizes: Mapping[str, tuple[str, tuple[int, ...], int]], metadata: dict[str, str]
) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """The start of a safetensors file (length and text of the header), and where each array lies in the file."""
    # Widest dtypes first, so that every array is aligned to its item size.
    order = sorted(sizes, key=lambda k: -sizes[k][2])
    header: dict[str, Any] = {"__metadata__": metadata}
    end, ends = 0, {}
    for name in order:
        dtype, shape, width = sizes[name]
        count = width * math.prod(shape)
        header[name] = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": [end, end + count]}
        ends[name] = (end, end + count)
        end += count
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, {k: (start + a, start + b) for k, (a, b) in ends.items()}


def _pieces(a: Array) -> Iterator[bytes]:
    flat = a.reshape(-1)
    count = _PIECE // flat.itemsize
    for i in range(0, len(flat), count):
        yield _on_host(flat[i : i + count]).tobytes()


def _on_host(a: Array) -> np.ndarray:
    return a.detach().cpu().numpy() if isinstance(a, torch.Tensor) else a


def _write_together(
    path: Path,
    text: bytes,
    offsets: Mapping[str, tuple[int, int]],
    tensors: Mapping[str, Array],
    shards: Mapping[str, Shard],
    world: World,
) -> None:
    """Write one file by several processes: space for all of it first, then each one its part, then the rename."""
    temporary = path.with_name(f".{path.name}.shared.tmp")
    size = max((end for _, end in offsets.values()), default=len(text))
    try:
        with world.together(), writing(path):
            if world.is_first:
                with open(temporary, "wb") as f:
                    reserve(f, size)
        with world.together(), writing(path), open(temporary, "r+b", buffering=0) as f:
            if world.is_first:
                _write_at(f, 0, text)
                for name, a in tensors.items():
                    f.seek(offsets[name][0])
                    for piece in _pieces(a):
                        _write_at(f, f.tell(), piece)
            for name, shard in shards.items():
                _write_rows(f, offsets[name], shard)
            sync(f.fileno())
        with world.together(), writing(path):
            if world.is_first:
                os.replace(temporary, path)
                sync_folder(path.parent)
    except BaseException:
        if world.is_first:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
        raise


def _write_rows(f: BinaryIO, place: tuple[int, int], shard: Shard) -> None:
    start, end = place
    width = (end - start) // shard.count
    for i in range(0, len(shard.owned), _ROWS):
        rows = _on_host(shard.array[i : i + _ROWS])
        for row, number in zip(rows, shard.owned[i : i + _ROWS].tolist(), strict=True):
            _write_at(f, start + number * width, row.tobytes())


def _write_at(f: BinaryIO, position: int, data: bytes) -> None:
    f.seek(position)
    rest = memoryview(data)
    while rest:
        rest = rest[f.write(rest) :]


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
