"""Triton's interpreter without the half of its work that no test sees; called by conftest.py."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import triton.language as tl
from triton.runtime import interpreter


class _Unchanged:
    """The scope of a call that had nothing to replace."""

    def restore(self) -> None:
        pass


@functools.cache
def _languages(function: Callable[..., Any]) -> frozenset[int]:
    """Which of the language's modules a kernel sees."""
    return frozenset(id(v) for v in function.__globals__.values() if v is tl or v is tl.core)


def quicken() -> None:
    """Replace what costs time and changes no number.

    Sums and products of integers are computed again in 64 bits for an assertion that the interpreter never makes (its
    option `debug` is off), and each call of a device function replaces all functions of the language once more, which
    the launch around it did already.
    """
    builder = interpreter.interpreter_builder
    assert not builder.options.debug
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)

    if not hasattr(interpreter, "_LangPatchScope"):
        return  # a Triton that replaces functions in another way
    replace_all, replaced = interpreter._patch_lang, set[int]()

    def replace(function: Callable[..., Any]) -> Any:
        languages = _languages(function)
        if replaced and languages <= replaced:
            return _Unchanged()
        scope = replace_all(function)
        if not replaced:
            restore = scope.restore

            def end() -> None:
                replaced.clear()
                restore()

            replaced.update(languages)
            scope.restore = end
        return scope

    interpreter._patch_lang = replace
