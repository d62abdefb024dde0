"""Checkpoints: safetensors with JSON in its header, never pickle, replaced in one step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import CheckpointError
from ..files import write_atomically

FORMAT = "deepreg-fast-checkpoint-1"


def save_checkpoint(path: Path, tensors: dict[str, np.ndarray], state: dict[str, Any]) -> None:
    """Write tensors and a JSON-able state to one file."""
    from safetensors.numpy import save

    metadata = {"format": FORMAT, "state": json.dumps(state)}
    write_atomically(path, save({k: np.ascontiguousarray(v) for k, v in tensors.items()}, metadata=metadata))


def load_checkpoint(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Read what `save_checkpoint` wrote.

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
            tensors = {k: f.get_tensor(k) for k in f.keys()}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} must be a whole checkpoint, but cannot be read ({error}); use an older one."
        ) from error
    if metadata.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} must be a training checkpoint of this version, but its format is {metadata.get('format')!r}; "
            "use weights with deepreg_fast.load instead."
        )
    return tensors, json.loads(metadata["state"])
