"""Weight files: safetensors with the regularizer's description and the caller's `meta` in the header.

Shipped weights (`deepreg_fast.weights`) are loaded by name.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from .._version import __version__
from ..errors import CheckpointError, InputError
from ..files import write_atomically
from ..regularizers.base import Regularizer, from_description
from . import cards

KIND = "deepreg-fast-weights-"
REVISION = 1
FORMAT = f"{KIND}{REVISION}"


def save(reg: Regularizer, path: str | Path, meta: dict[str, Any] | None = None) -> None:
    """Write a regularizer's parameters, description and `meta` to one safetensors file.

    The file is replaced atomically: after an error the previous file is intact.

    Parameters
    ----------
    reg : Regularizer
    path : str or Path
    meta : dict of JSON values, optional
        Stored beside the weights; `load` returns it.

    Raises
    ------
    InputError
        If `meta` is not JSON, or the path cannot be written.

    Examples
    --------
    >>> import tempfile, deepreg_fast as dr
    >>> path = tempfile.mkdtemp() + "/tv.safetensors"
    >>> dr.save(dr.TV(0.02), path, {"mu": 0.1})
    >>> reg, meta = dr.load(path)
    >>> reg.eps, meta["mu"]
    (0.02, 0.1)
    """
    from safetensors.torch import save as to_bytes

    header = {
        "format": FORMAT,
        "version": __version__,
        "regularizer": json.dumps(reg.describe()),
        "meta": json.dumps(meta or {}),
    }
    # Copies, because tied weights share memory, which the format rejects.
    tensors = {k: v.detach().cpu().contiguous().clone() for k, v in reg.state_dict().items()}
    # Some releases cannot store a header in an empty safetensors file, and TV has no parameters.
    tensors = tensors or {"no_parameters": torch.zeros(1, dtype=torch.float32, device="cpu")}
    write_atomically(Path(path), _sorted_header(to_bytes(tensors, metadata=header)))


def _sorted_header(data: bytes) -> bytes:
    """The same safetensors file with its header in one order, so that equal weights are equal files. The library writes
    the metadata in the random order of a hash table."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[end:]


def locate(weights: str | Path) -> Path:
    """The path of a weight file: `weights` if that file exists, otherwise the shipped file of that name.

    Raises
    ------
    CheckpointError
        If neither exists.
    """
    path = Path(weights)
    if path.is_file():
        return path
    is_bare_name = path.name == str(weights)
    shipped = cards.find(path.name) if is_bare_name else None
    if shipped is None:
        if is_bare_name and not path.suffix:
            raise CheckpointError(cards.unknown(path.name))
        raise CheckpointError(f"Weights must be a file, but there is none at {path}; check the path.")
    return shipped


def load(path: str | Path, reg: Regularizer | None = None) -> tuple[Regularizer, dict[str, Any]]:
    """Load a regularizer and the `meta` stored with it, from a file of `save` or from shipped weights.

    Parameters
    ----------
    path : str or Path
        A file, or a shipped name such as "cs5-beta10" (`deepreg-fast info` lists them).
    reg : Regularizer, optional
        Filled with the file's parameters and returned. Needed if the file cannot rebuild the regularizer by itself,
        such as an `EnergyRegularizer` around your own module.

    Returns
    -------
    (Regularizer, dict)
        `meta["mu"]` is the trained weight of a training's file; `meta["card"]` the model card of shipped weights.

    Raises
    ------
    CheckpointError
        If the file is missing, truncated, not a weight file, of another release's format, contains non-finite values,
        or does not fit `reg`.

    Examples
    --------
    >>> import deepreg_fast as dr
    >>> reg, meta = dr.load("cs5-beta10")
    >>> type(reg).__name__, meta["card"]["name"]
    ('RED', 'cs5-beta10')
    """
    from safetensors import SafetensorError, safe_open

    path = locate(path)
    try:
        with safe_open(path, framework="pt") as f:
            header = f.metadata() or {}
            tensors = {k: f.get_tensor(k) for k in f.keys()}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} must be a whole safetensors file, but cannot be read ({error}); copy it again."
        ) from error
    description, meta = _notes(path, header)
    if reg is None:
        reg = _build(path, description, header.get("version"))
    tensors.pop("no_parameters", None)
    non_finite = [k for k, v in tensors.items() if not bool(torch.isfinite(v).all())]
    if non_finite:
        raise CheckpointError(
            f"Weights must be finite, but {path} holds NaN or infinity in {non_finite}; use an older file."
        )
    if tensors:
        reg.to(next(iter(tensors.values())).dtype)
    try:
        reg.load_state_dict(tensors)
    except RuntimeError as error:
        raise CheckpointError(f"The tensors of {path} must fit its regularizer, but do not: {error}.") from error
    return reg.eval(), meta


def _notes(path: Path, header: dict[str, str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The description and `meta` of a header in this release's format."""
    file_format = header.get("format")
    if file_format != FORMAT:
        revision = str(file_format).removeprefix(KIND)
        if file_format is None or revision == file_format or not revision.isdecimal():
            raise CheckpointError(
                f"{path} must hold weights written by deepreg_fast.save, but its format is {file_format!r}; "
                "load foreign weights into a regularizer with load_state_dict and save that."
            )
        newer = int(revision) > REVISION
        raise CheckpointError(
            f"{path} must hold weights of the format {REVISION}, but holds the {'newer' if newer else 'older'} format "
            f"{revision} of deepreg-fast {header.get('version', 'of another release')}; "
            + ("update deepreg-fast." if newer else "load and save it with a release that knows both.")
        )
    try:
        description, meta = json.loads(header["regularizer"]), json.loads(header["meta"])
    except (KeyError, ValueError) as error:
        raise CheckpointError(
            f"The header of {path} must contain its regularizer and meta as JSON, but does not ({error!r}); "
            "copy it again."
        ) from error
    if not isinstance(description, dict) or not isinstance(meta, dict):
        raise CheckpointError(
            f"The header of {path} must contain its regularizer and meta as JSON objects, but does not; copy it again."
        )
    return description, meta


def _build(path: Path, description: dict[str, Any], version: str | None) -> Regularizer:
    """The regularizer of a description. If another release wrote it, the error message says so."""
    try:
        return from_description(description)
    except InputError as error:
        if version in (None, __version__):
            raise
        raise CheckpointError(
            f"{path} was written by deepreg-fast {version} and this is {__version__}, which cannot rebuild it: {error}"
        ) from error
