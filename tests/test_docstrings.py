"""Docstrings of the public names: sections that agree with the signatures, and examples that run."""

from __future__ import annotations

import ast
import doctest
import enum
import inspect
import re
import textwrap
from collections.abc import Callable
from typing import Any

import pytest

import deepreg_fast as dr
from deepreg_fast.adapters.deepinv import package
from deepreg_fast.data import load_image

NAMES = [n for n in dr.__all__ if n not in ("__version__", "ops")]
OBJECTS: dict[str, Callable[[], Any]] = {
    **{n: lambda n=n: getattr(dr, n) for n in NAMES},
    **{f"ops.{n}": lambda n=n: getattr(dr.ops, n) for n in dr.ops.__all__},
    "data.load_image": lambda: load_image,
}
RESULTS = ("Solution", "Hypergradient")
"""Classes that users receive: they have Attributes."""


def entries(text: str, section: str) -> list[str] | None:
    """The names that a numpy-style section lists, or None if there is no such section."""
    match = re.search(rf"^{section}\n-+\n(.*?)(?=^\w+\n-{{3,}}|\Z)", text, re.MULTILINE | re.DOTALL)
    if match is None:
        return None
    names = [line.partition(" : ")[0] for line in match[1].splitlines() if line and not line.startswith(" ")]
    return [n.strip() for group in names for n in group.split(",")]


def raises_input_error(value: Any) -> bool:
    """Whether its source names InputError in a `raise`, for a class in its constructor."""
    function = inspect.unwrap(value)
    if inspect.isclass(value):
        function = getattr(value, "__post_init__", None) or value.__init__
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError):
        return False
    return any(isinstance(n, ast.Raise) and n.exc and "InputError" in ast.unparse(n.exc) for n in ast.walk(tree))


def skip_without_deepinv(name: str) -> None:
    if dr._HOME.get(name) == "adapters.deepinv" and not package.available():
        pytest.skip("deepinv cannot be imported")


@pytest.mark.parametrize("name", OBJECTS)
def test_the_example_runs(name: str) -> None:
    skip_without_deepinv(name)
    text = inspect.getdoc(OBJECTS[name]()) or ""
    assert "Examples\n--------" in text
    test = doctest.DocTestParser().get_doctest(text, {}, name, None, None)
    assert test.examples, f"{name} has no example"
    output: list[str] = []
    assert doctest.DocTestRunner().run(test, out=output.append).failed == 0, "".join(output)


@pytest.mark.parametrize("name", OBJECTS)
def test_sections(name: str) -> None:
    value = OBJECTS[name]()
    text = inspect.getdoc(value) or ""
    first, _, rest = text.partition("\n")
    assert len(first) <= 120 and first.endswith((".", "`.")) and rest.startswith("\n")
    expected = list(inspect.signature(value).parameters)
    if inspect.isclass(value) and issubclass(value, enum.Enum):
        assert set(value.__members__) <= set(entries(text, "Attributes") or [])
    elif name in RESULTS:
        assert entries(text, "Attributes") == expected
    elif name != "Regularizer":  # an abstract class, whose subclasses have their own parameters
        assert sorted(entries(text, "Parameters") or []) == sorted(expected)
    returned = inspect.signature(value).return_annotation if not inspect.isclass(value) else None
    assert (entries(text, "Returns") is not None) == (returned not in (None, "None"))
    if raises_input_error(value):
        assert "InputError" in (entries(text, "Raises") or [])
