"""Tensors as JSON values, for the descriptions of operators."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import torch

from ..errors import InputError

_DTYPES = {"float32": torch.float32, "float64": torch.float64, "bool": torch.bool}


def pack(t: torch.Tensor) -> dict[str, Any]:
    """A float32, float64 or bool tensor as a JSON value, without loss; `unpack` is the inverse."""
    name = str(t.dtype).removeprefix("torch.")
    array = t.detach().cpu().contiguous().numpy()
    data = np.packbits(array.reshape(-1)) if t.dtype == torch.bool else array.astype(array.dtype.newbyteorder("<"))
    return {"dtype": name, "shape": list(t.shape), "data": base64.b64encode(data.tobytes()).decode()}


def unpack(value: Any) -> Any:
    """The tensor of a value of `pack`; anything else unchanged."""
    if not isinstance(value, dict):
        return value
    try:
        dtype, shape, data = value["dtype"], [int(n) for n in value["shape"]], base64.b64decode(value["data"])
        raw = np.frombuffer(data, dtype=np.uint8 if dtype == "bool" else np.dtype(dtype).newbyteorder("<"))
        count = int(np.prod(shape))
        array = np.unpackbits(raw, count=count).astype(bool) if dtype == "bool" else raw.astype(dtype)
        return torch.from_numpy(array.reshape(shape).copy()).to(_DTYPES[dtype])
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"A tensor in a description must have dtype, shape and data, but does not: {error}."
        ) from error
