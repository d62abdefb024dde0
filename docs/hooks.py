"""Hooks of mkdocs: formulas to MathML, which browsers show without a script, and the lists of public names."""

from __future__ import annotations

import html
import re
from typing import Any

from latex2mathml.converter import convert

import deepreg_fast as dr
import deepreg_fast.data

_INLINE = re.compile(r'<span class="arithmatex">\\\((.*?)\\\)</span>', re.DOTALL)
_DISPLAY = re.compile(r'<div class="arithmatex">\s*\\\[(.*?)\\\]\s*</div>', re.DOTALL)


_NAMES = re.compile(r"<!-- public names of (\S+) -->")


def _names(module: str) -> str:
    """A reference to each public name of a module of the package."""
    path = f"deepreg_fast.{module}"
    if module == "ops":
        names = list(dr.ops.__all__)
    elif module == "data":
        names = list(deepreg_fast.data.__all__)
    else:
        names = [n for n in dr.__all__ if dr._HOME.get(n) == module]
    if not names:
        raise ValueError(f"{module} has no public names")
    return "\n\n".join(f"::: {path}.{n}" for n in names)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace `<!-- public names of MODULE -->`, so that no name is forgotten."""
    return _NAMES.sub(lambda m: _names(m[1]), markdown)


def _mathml(latex: str, display: str) -> str:
    tag = re.search(r"\\tag\{(.*?)\}", latex)
    source = latex[: tag.start()] + latex[tag.end() :] if tag else latex
    formula = convert(source.replace(r"\arg", r"\operatorname{arg}"), display=display)
    if re.search(r"<m[io]>\\", formula):
        raise ValueError(f"latex2mathml does not know a command of {latex!r}")
    number = f'<span class="tag">({tag[1]})</span>' if tag else ""
    return formula if display == "inline" else f'<div class="formula">{formula}{number}</div>'


def on_page_content(content: str, **_: Any) -> str:
    """Replace the formulas of a page."""
    content = _DISPLAY.sub(lambda m: _mathml(html.unescape(m[1]), "block"), content)
    return _INLINE.sub(lambda m: _mathml(html.unescape(m[1]), "inline"), content)
