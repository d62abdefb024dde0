"""Weight files: safetensors, with the regularizer's description and the caller's notes in the header."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from .errors import CheckpointError
from .files import write_atomically
from .regularizers.base import Regularizer, from_description

FORMAT = "deepreg-fast-weights-1"


def save(reg: Regularizer, path: str | Path, meta: dict[str, Any] | None = None) -> None:
    """Write the regularizer's parameters, description and `meta` (JSON values) to one safetensors file.

    The file is replaced in one step: a fault leaves what was there.
    """
    from safetensors.torch import save as to_bytes

    header = {"format": FORMAT, "regularizer": json.dumps(reg.describe()), "meta": json.dumps(meta or {})}
    tensors = {k: v.detach().cpu().contiguous() for k, v in reg.state_dict().items()}
    # An empty safetensors file cannot carry a header in every release; TV has no parameter.
    tensors = tensors or {"no_parameters": torch.zeros(1)}
    write_atomically(Path(path), to_bytes(tensors, metadata=header))


def load(path: str | Path, reg: Regularizer | None = None) -> tuple[Regularizer, dict[str, Any]]:
    """The regularizer and the `meta` of a file that `save` wrote.

    Give `reg` to fill a regularizer that the file cannot rebuild by itself, such as an `EnergyRegularizer` around a
    module of yours; it is returned.

    Raises
    ------
    CheckpointError
        If the file is missing, truncated, foreign, holds values that are not finite, or does not fit.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"Weights must be a file, but there is none at {path}; check the path.")
    try:
        with safe_open(path, framework="pt") as f:
            header = f.metadata() or {}
            tensors = {k: f.get_tensor(k) for k in f.keys()}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} must be a whole safetensors file, but cannot be read ({error}); copy it again."
        ) from error
    if header.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} must hold weights written by deepreg_fast.save, but its format is {header.get('format')!r}; "
            "load foreign weights into a regularizer with load_state_dict and save that."
        )
    if reg is None:
        reg = from_description(json.loads(header["regularizer"]))
    tensors.pop("no_parameters", None)
    bad = [k for k, v in tensors.items() if not bool(torch.isfinite(v).all())]
    if bad:
        raise CheckpointError(f"Weights must be finite, but {path} holds NaN or infinity in {bad}; use an older file.")
    if tensors:
        reg.to(next(iter(tensors.values())).dtype)
    try:
        reg.load_state_dict(tensors)
    except RuntimeError as error:
        raise CheckpointError(f"The tensors of {path} must fit its regularizer, but do not: {error}.") from error
    return reg.eval(), json.loads(header["meta"])
