"""Input validation. Each error message states what was expected and what was received.

Only the checks of tensors and devices import torch, so that the command-line help does not need it.
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


def measured(y: object, shape: tuple[int, ...], name: str = "y") -> torch.Tensor:
    """Check that `y` is a batch of measurements `[B, *shape]` in float32 or float64; return it."""
    import torch

    if not isinstance(y, torch.Tensor) or y.dtype not in _floats() or tuple(y.shape[1:]) != shape or not y.ndim:
        sizes = ", ".join(map(str, shape))
        hint = "one row of measurements per image" if len(shape) == 1 else "the measurements of one image per row"
        raise InputError(
            f"{name} must be a float32 or float64 tensor [B, {sizes}] ({hint}), "
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
        count = int((~torch.isfinite(x)).sum())
        raise InputError(
            f"{name} must be finite, but {count} of its {x.numel()} entries are NaN or infinite; "
            "clean the data first (torch.nan_to_num, or drop that image)."
        )
    return x


def plain(value: Any) -> Any:
    """Convert a numpy scalar or a 0-d array or tensor to a Python number; return any other value unchanged."""
    # If a package has not been imported, the value cannot be one of its objects.
    numpy, torch = sys.modules.get("numpy"), sys.modules.get("torch")
    if numpy is not None and isinstance(value, (numpy.generic, numpy.ndarray)) and value.ndim == 0:
        return value.item()
    if torch is not None and isinstance(value, torch.Tensor) and value.ndim == 0 and not value.is_meta:
        return value.item()
    return value


def option(default: Any, text: str) -> Any:
    """A dataclass field with its help text for the command line."""
    return dataclasses.field(default=default, metadata={"help": text})


def plain_fields(settings: Any) -> None:
    """Convert scalar fields of a dataclass to Python numbers, which JSON and every kernel accept."""
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if (number := plain(value)) is not value:
            object.__setattr__(settings, field.name, number)


def number(value: object, name: str, low: float, high: float = math.inf, *, open_low: bool = False) -> float:
    """Check that `value` is a finite number in `[low, high]` (or `(low, high]`); return it as float."""
    result = plain(value)
    is_number = isinstance(result, (int, float)) and not isinstance(result, bool) and math.isfinite(result)
    if not is_number or result < low or result > high or (open_low and result <= low):
        bracket = "(" if open_low else "["
        raise InputError(f"{name} must be a number in {bracket}{low:g}, {high:g}], but is {value!r}.")
    return float(result)


def integer(value: object, name: str, low: int, high: int | None = None) -> int:
    """Check that `value` is an integer in `[low, high]`; return it."""
    result = plain(value)
    if isinstance(result, bool) or not isinstance(result, int) or result < low or (high is not None and result > high):
        bound = f"at least {low}" if high is None else f"between {low} and {high}"
        raise InputError(f"{name} must be an integer, {bound}, but is {value!r}.")
    return result


def boolean(value: object, name: str) -> bool:
    """Check that `value` is True or False; return it."""
    result = plain(value)
    if not isinstance(result, bool):
        raise InputError(f"{name} must be True or False, but is {value!r}.")
    return result


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
    """Check the type of each field of a settings dataclass against its declaration: `bool`, `int`, `float` (finite;
    integers are accepted), `str`, or one of these or None. Fields of other types are skipped.

    Raises
    ------
    InputError
        If a field has another type; the message names it.
    """
    hints = get_type_hints(type(settings))
    for field in dataclasses.fields(settings):  # type: ignore[arg-type]
        kinds = get_args(hints[field.name]) or (hints[field.name],)
        known = [k for k in kinds if k in _KINDS]
        value = getattr(settings, field.name)
        if not known or (value is None and type(None) in kinds):
            continue
        if not any(_is_kind(value, k) for k in known):
            expected = " or ".join([_KINDS[k] for k in known] + ["none"] * (type(None) in kinds))
            raise InputError(f"{field.name} must be {expected}, but is {describe(value)}.")


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
    """Check that `value` is "cpu", "cuda", "cuda:1" (any index) or "auto"; return it. The device need not exist."""
    if not isinstance(value, str) or re.fullmatch(r"cpu|auto|cuda(:\d+)?", value) is None:
        raise InputError(f"{name} must be 'cpu', 'cuda', 'cuda:1' (any index) or 'auto', but is {value!r}.")
    return value


def device(value: object, name: str = "device") -> torch.device:
    """The device named by `value`: "cpu", "cuda" (the current one), "cuda:1" (any index), or "auto", which is "cuda" if
    available and "cpu" otherwise.

    Raises
    ------
    InputError
        If the name is invalid, or torch does not see the device.
    """
    import torch

    text = device_name(value, name)
    has_cuda = torch.cuda.is_available()
    if text == "cpu" or (text == "auto" and not has_cuda):
        return torch.device("cpu")
    if not has_cuda:
        reason = "is built without CUDA" if torch.version.cuda is None else "finds no NVIDIA driver or GPU"
        raise InputError(f"{name} is {text!r}, but torch sees no CUDA device (it {reason}); use 'cpu' or 'auto'.")
    index = int(text.partition(":")[2]) if ":" in text else torch.cuda.current_device()
    if index >= torch.cuda.device_count():
        raise InputError(
            f"{name} must be one of the {torch.cuda.device_count()} CUDA devices that torch sees, counted from 0, but "
            f"is {text!r}; 'deepreg-fast info' lists them."
        )
    return torch.device("cuda", index)
