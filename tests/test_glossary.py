"""Identifiers avoid the words that docs/glossary.md replaces by the field's terms."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]

# Words that are still in use, by package. Remove what becomes obsolete; add nothing.
REMAINING = {
    "backend": {"given", "kept", "own", "serves"},
    "batched": {"kept", "own"},
    "data": {"found"},
    "solvers": {"own"},
}


def words() -> set[str]:
    """The left column of the glossary's last table."""
    text = (ROOT / "docs/glossary.md").read_text(encoding="utf-8")
    rows = text.split("## Words that the code does not use\n")[1].split("|---|---|\n")[1].splitlines()
    return {w for row in rows for w in re.findall(r"`(\w+)`", row.split("|")[1])}


def identifiers(source: str) -> Iterator[tuple[int, str]]:
    """Line and name of everything that a module defines: variables, attributes, arguments, functions and classes."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.lineno, node.name
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.attr


def test_no_identifier_is_a_replaced_word() -> None:
    wrong = []
    replaced = words()
    assert {"found", "given", "told", "kept", "here", "grey"} <= replaced
    for path in sorted((ROOT / "deepreg_fast").rglob("*.py")):
        part = path.relative_to(ROOT / "deepreg_fast").parts[0]
        for line, name in identifiers(path.read_text(encoding="utf-8")):
            if name.strip("_").lower() in replaced - REMAINING.get(part, set()):
                wrong.append(f"{path.relative_to(ROOT)}:{line} {name}")
    assert not wrong, f"rename these, see docs/glossary.md: {wrong}"


def test_what_the_check_sees() -> None:
    source = "def f(given):\n    kept = given.here\n    self._told = 1\nclass Found: ...\nfor own, x in y: pass"
    assert sorted(name for _, name in identifiers(source)) == ["Found", "_told", "f", "given", "kept", "own", "x"]
