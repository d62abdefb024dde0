"""deepinv itself, or the sentence that says how to get it."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import nn

from ..errors import InputError

_PARTS = ("optim", "physics", "models", "utils")


def _load() -> tuple[Any, str]:
    try:
        package = import_module("deepinv")
        for part in _PARTS:
            import_module(f"deepinv.{part}")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "deepinv":
            return None, "is not installed; pip install deepinv"
        return None, f"lacks the package {error.name}; pip install deepinv"
    except Exception as error:  # a torchvision for another torch fails in many ways
        line = (str(error).splitlines() or [""])[0][:80]
        return None, f"cannot be imported ({line}); pip install deepinv and the torchvision that belongs to your torch"
    return package, ""


_DEEPINV, _REASON = _load()


def available() -> bool:
    """Whether deepinv can be imported."""
    return _DEEPINV is not None


def deepinv() -> Any:
    """The package.

    Raises
    ------
    InputError
        If it cannot be imported; the message says how to install it.
    """
    if _DEEPINV is None:
        raise InputError(f"This function needs the package deepinv, which {_REASON}.")
    return _DEEPINV


class _Missing(nn.Module):
    """What the adapters' classes are based on where deepinv is missing: it cannot be constructed."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        deepinv()
        super().__init__()


def base(path: str) -> Any:
    """The class `deepinv.<path>` to inherit from, or one that raises the sentence when it is constructed."""
    found = _DEEPINV
    for part in path.split(".") if _DEEPINV is not None else ():
        found = getattr(found, part)
    return _Missing if found is None else found


def flatten(y: Any) -> torch.Tensor:
    """Measurements of deepinv as one real tensor: those of a `TensorList` flattened and concatenated, complex numbers
    as pairs of real ones."""
    if isinstance(y, torch.Tensor):
        return torch.view_as_real(y) if y.is_complex() else y
    return torch.cat([flatten(part).flatten(1) for part in y], 1)
