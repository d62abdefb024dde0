"""The import of deepinv, and the error message if it fails."""

from __future__ import annotations

from importlib import import_module
from operator import attrgetter
from typing import Any

import torch
from torch import nn

from ...errors import InputError

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
    """Base class of the adapters if deepinv is missing: constructing one raises the error."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        deepinv()
        super().__init__()


def base(path: str) -> Any:
    """The class `deepinv.<path>` to inherit from; without deepinv, a class whose constructor raises the error."""
    return _Missing if _DEEPINV is None else attrgetter(path)(_DEEPINV)


def flatten(y: Any) -> torch.Tensor:
    """Measurements of deepinv as one real tensor: those of a `TensorList` flattened and concatenated, complex numbers
    as pairs of real ones."""
    if isinstance(y, torch.Tensor):
        return torch.view_as_real(y) if y.is_complex() else y
    return torch.cat([flatten(part).flatten(1) for part in y], 1)
