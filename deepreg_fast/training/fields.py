"""The help texts of the settings' fields (`checks.option`) as parts of their docstrings."""

from __future__ import annotations

import dataclasses
import textwrap
from typing import TypeVar

T = TypeVar("T")
PLACE = "<every field>"


def with_fields(cls: type[T]) -> type[T]:
    """Replace `PLACE` in the docstring by every field with its type, default and help text."""
    lines: list[str] = []
    for f in dataclasses.fields(cls):  # type: ignore[arg-type]
        lines.append(f"    {f.name} : {f.type}, default {f.default!r}")
        lines += textwrap.wrap(f.metadata["help"], 110, initial_indent=" " * 8, subsequent_indent=" " * 8)
    # Python -OO removes docstrings.
    cls.__doc__ = cls.__doc__ and cls.__doc__.replace(f"    {PLACE}", "\n".join(lines))
    return cls
