"""Checks of what comes in, each with a sentence that says what was expected and what came.

torch is imported by the checks of tensors and devices alone: the command line's help does without it.
"""

from __future__ import annotations

import dataclasses
import math
import re
import sys
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

from .errors import InputError

if TYPE_CHECKING:
    import torch

    FLOATS: tuple[torch.dtype, ...]


def _floats() -> tuple[torch.dtype, ...]:
    import torch

    return torch.float32, torch.float64


def __getattr__(name: str) -> Any:
    if name == "FLOATS":
        return _floats()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def describe(value: Any) -> str:
    """A short description of a value for an error message."""
    if isinstance(value, getattr(sys.modules.get("torch"), "Tensor", ())):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {list(value.shape)} on {value.device}"
    return f"{value!r} ({type(value).__name__})"


def images(x: object, name: str = "x", shape: tuple[int, int, int] | None = None) -> torch.Tensor:
    """Check that `x` is a batch of images `[B, C, H, W]` in float32 or float64; return it.

    Raises
    ------
    InputError
        If `x` is not such a tensor, or its `C, H, W` differ from `shape`.
    """
    import torch

    if not isinstance(x, torch.Tensor) or x.ndim != 4 or x.dtype not in _floats() or x.layout != torch.strided:
        raise InputError(
            f"{name} must be a float32 or float64 tensor [B, C, H, W], but is {describe(x)}; "
            "add the missing dimensions with x[None, None] or convert with x.float()."
        )
    if shape is not None and tuple(x.shape[1:]) != tuple(shape):
        raise InputError(
            f"{name} must hold images of shape {list(shape)} (C, H, W), but has shape {list(x.shape)}; "
            "crop the images or build the operator for their shape."
        )
    return x


def vectors(y: object, m: int, name: str = "y") -> torch.Tensor:
    """Check that `y` is a batch of measurements `[B, m]` in float32 or float64; return it."""
    import torch

    if not isinstance(y, torch.Tensor) or y.ndim != 2 or y.dtype not in _floats() or y.shape[1] != m:
        raise InputError(
            f"{name} must be a float32 or float64 tensor [B, {m}] (one row of measurements per image), "
            f"but is {describe(y)}; were these measurements made by another operator?"
        )
    return y


def same_kind(a: torch.Tensor, b: torch.Tensor, names: str) -> None:
    """Check that two tensors agree in dtype and device."""
    if a.dtype != b.dtype or a.device != b.device:
        raise InputError(
            f"{names} must have one dtype and one device, but are {describe(a)} and {describe(b)}; "
            "convert one of them with .to(other)."
        )


def finite(x: torch.Tensor, name: str) -> torch.Tensor:
    """Check that every entry of `x` is finite; return it."""
    import torch

    if not bool(torch.isfinite(x).all()):
        bad = int((~torch.isfinite(x)).sum())
        raise InputError(
            f"{name} must be finite, but {bad} of its {x.numel()} entries are NaN or infinite; "
            "clean the data first (torch.nan_to_num, or drop that image)."
        )
    return x


def plain(value: Any) -> Any:
    """A scalar of numpy, or an array or tensor without dimensions, as the Python number that it is; else `value`."""
    # Values of packages that nobody has imported cannot come.
    numpy, torch = sys.modules.get("numpy"), sys.modules.get("torch")
    if numpy is not None and isinstance(value, (numpy.generic, numpy.ndarray)) and value.ndim == 0:
        return value.item()
    if torch is not None and isinstance(value, torch.Tensor) and value.ndim == 0 and not value.is_meta:
        return value.item()
    return value


def plain_fields(settings: Any) -> None:
    """Make numpy's scalars among a dataclass's fields Python's numbers, which JSON and every kernel take."""
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if (number := plain(value)) is not value:
            object.__setattr__(settings, field.name, number)


def number(value: object, name: str, low: float, high: float = math.inf, *, open_low: bool = False) -> float:
    """Check that `value` is a finite number in `[low, high]` (or `(low, high]`); return it as float."""
    found = plain(value)
    ok = isinstance(found, (int, float)) and not isinstance(found, bool) and math.isfinite(found)
    if not ok or found < low or found > high or (open_low and found <= low):
        left = "(" if open_low else "["
        raise InputError(f"{name} must be a number in {left}{low:g}, {high:g}], but is {value!r}.")
    return float(found)


def integer(value: object, name: str, low: int, high: int | None = None) -> int:
    """Check that `value` is an integer in `[low, high]`; return it."""
    found = plain(value)
    if isinstance(found, bool) or not isinstance(found, int) or found < low or (high is not None and found > high):
        bound = f"at least {low}" if high is None else f"between {low} and {high}"
        raise InputError(f"{name} must be an integer, {bound}, but is {value!r}.")
    return found


def boolean(value: object, name: str) -> bool:
    """Check that `value` is True or False; return it."""
    found = plain(value)
    if not isinstance(found, bool):
        raise InputError(f"{name} must be True or False, but is {value!r}.")
    return found


def odd(value: object, name: str) -> int:
    """Check that `value` is an odd integer >= 1; return it."""
    size = integer(value, name, 1)
    if size % 2 == 0:
        raise InputError(f"{name} must be odd, but is {size}.")
    return size


def choice(value: object, name: str, options: tuple[str, ...]) -> str:
    """Check that `value` is one of `options`; return it."""
    if not isinstance(value, str) or value not in options:
        raise InputError(f"{name} must be one of {', '.join(map(repr, options))}, but is {value!r}.")
    return str(value)


def fields_typed(settings: object) -> None:
    """Check that each field of a dataclass of settings is of the type that it is declared with: `bool`, `int`,
    `float` (finite; whole numbers are taken too), `str`, or one of these or None. Others are passed over.

    Raises
    ------
    InputError
        If a field is not; the sentence names it.
    """
    hints = get_type_hints(type(settings))
    for field in dataclasses.fields(settings):  # type: ignore[arg-type]
        kinds = get_args(hints[field.name]) or (hints[field.name],)
        known = [k for k in kinds if k in _KINDS]
        value = getattr(settings, field.name)
        if not known or (value is None and type(None) in kinds):
            continue
        if not any(_is_kind(value, k) for k in known):
            wish = " or ".join([_KINDS[k] for k in known] + ["none"] * (type(None) in kinds))
            raise InputError(f"{field.name} must be {wish}, but is {describe(value)}.")


_KINDS: dict[object, str] = {bool: "true or false", int: "an integer", float: "a number", str: "a text"}


def _is_kind(value: object, kind: object) -> bool:
    if kind is bool:
        return isinstance(value, bool)
    if kind is str:
        return isinstance(value, str) and "\0" not in value
    if isinstance(value, bool):
        return False
    return isinstance(value, int) if kind is int else isinstance(value, (int, float)) and math.isfinite(value)


def device_name(value: object, name: str = "device") -> str:
    """Check that `value` is "cpu", "cuda", "cuda:1" (any index) or "auto", whether it is here or not; return it."""
    if not isinstance(value, str) or re.fullmatch(r"cpu|auto|cuda(:\d+)?", value) is None:
        raise InputError(f"{name} must be 'cpu', 'cuda', 'cuda:1' (any index) or 'auto', but is {value!r}.")
    return value


def device(value: object, name: str = "device") -> torch.device:
    """The device that `value` means here: "cpu"; "cuda", the current one; "cuda:1"; or "auto", which is "cuda" where
    torch sees such a device and "cpu" elsewhere.

    Raises
    ------
    InputError
        If it is none of these, or torch does not see that device.
    """
    import torch

    text = device_name(value, name)
    here = torch.cuda.is_available()
    if text == "cpu" or (text == "auto" and not here):
        return torch.device("cpu")
    if not here:
        why = "is built without CUDA" if torch.version.cuda is None else "finds no NVIDIA driver or GPU"
        raise InputError(f"{name} is {text!r}, but torch sees no CUDA device (it {why}); use 'cpu' or 'auto'.")
    index = int(text.partition(":")[2]) if ":" in text else torch.cuda.current_device()
    if index >= torch.cuda.device_count():
        raise InputError(
            f"{name} must be one of the {torch.cuda.device_count()} CUDA devices that torch sees, counted from 0, but "
            f"is {text!r}; 'deepreg-fast info' lists them."
        )
    return torch.device("cuda", index)
