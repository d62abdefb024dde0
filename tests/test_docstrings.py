"""Docstrings of the public names: sections, and examples that run."""

from __future__ import annotations

import doctest
import inspect

import pytest

import deepreg_fast as dr
from deepreg_fast.adapters import package

NAMES = [n for n in dr.__all__ if n not in ("__version__", "ops")]


@pytest.mark.parametrize("name", NAMES)
def test_the_example_runs(name: str) -> None:
    if dr._HOME[name] == "adapters.deepinv" and not package.available():
        pytest.skip("deepinv cannot be imported")
    text = inspect.getdoc(getattr(dr, name)) or ""
    test = doctest.DocTestParser().get_doctest(text, {}, name, None, None)
    assert test.examples, f"{name} has no example"
    output: list[str] = []
    assert doctest.DocTestRunner().run(test, out=output.append).failed == 0, "".join(output)


@pytest.mark.parametrize("name", NAMES)
def test_sections(name: str) -> None:
    value = getattr(dr, name)
    text = inspect.getdoc(value) or ""
    first, _, rest = text.partition("\n")
    assert len(first) <= 120 and first.endswith((".", "`.")) and rest.startswith("\n")
    assert "Parameters\n-------" in text or "Attributes\n-------" in text or not inspect.signature(value).parameters
    if inspect.isfunction(value) and name not in ("save", "use_backend", "gpu_options"):
        assert "Returns\n-------" in text
    for option in inspect.signature(value).parameters if inspect.isfunction(value) else ():
        assert option in text, f"{name} does not describe {option}"
