"""Operators by name, so that files can refer to them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..errors import InputError

if TYPE_CHECKING:
    from .base import LinearOperator

_REGISTRY: dict[str, Callable[..., LinearOperator]] = {}


def register(kind: str, cls: Callable[..., LinearOperator]) -> None:
    """Register a class (or a function) for files: `describe()['kind'] == kind`, and the rest are its arguments."""
    _REGISTRY[kind] = cls


def from_description(description: dict[str, Any]) -> LinearOperator:
    """Rebuild an operator from the result of `describe()`."""
    kind = description.get("kind") if isinstance(description, dict) else description
    if not isinstance(kind, str) or kind not in _REGISTRY:
        raise InputError(
            f"The operator's kind must be one of {sorted(_REGISTRY)}, but is {kind!r}; "
            "register your class with deepreg_fast.operators.register(kind, cls) first."
        )
    try:
        return _REGISTRY[kind](**{k: v for k, v in description.items() if k != "kind"})
    except TypeError as error:
        raise InputError(f"The description of a {kind!r} operator does not fit its class: {error}.") from error
