"""The pages of the documentation: their Python runs as written, and their command lines are valid."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from PIL import Image

from deepreg_fast.cli import app

from .helpers import images

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs").rglob("*.md")))
RUN = ("docs/index.md", *(p for p in PAGES if p.startswith("docs/howto/")))
# Trainings of the pages, shortened: their settings stay, but for the number of steps and the sizes.
SHORTER = (
    (re.compile(r"steps=\d+"), "steps=1, crop=26, batch=2, validation=2, validation_crop=26, channels=2"),
    (re.compile(r", channels=4"), ""),
)


def blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("page", [p for p in RUN if blocks(p)])
def test_the_python_of_a_page(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    for i in range(6):
        Image.fromarray((images(40, 40, seed=i) * 255).byte().numpy()).save(tmp_path / "images" / f"{i}.png")
    Image.fromarray((images(12, 14) * 255).byte().numpy()).save(tmp_path / "blurred.png")
    Image.fromarray(np.full((3, 5), 200, np.uint8)).save(tmp_path / "kernel.png")
    code = "\n".join(blocks(page))
    for pattern, shorter in SHORTER:
        code = pattern.sub(shorter, code)
    names: dict[str, Any] = {}
    exec(compile(code, page, "exec"), names)
    assert {"dr"} < set(names)


@pytest.mark.parametrize("page", PAGES)
def test_the_command_lines_of_a_page(page: str) -> None:
    """Every command line is one that the parser takes whole."""
    # The odd pieces between fences are code.
    code = re.split(r"^```", (ROOT / page).read_text(encoding="utf-8"), flags=re.MULTILINE)[1::2]
    lines = re.findall(r"^deepreg-fast (.+)$", "".join(code), re.MULTILINE)
    root: Any = typer.main.get_command(app)
    for line in lines:
        command, words = root, shlex.split(line, comments=True)
        while hasattr(command, "commands"):
            command = command.commands[words.pop(0)]
        with command.make_context(line, words) as context:
            assert not context.args, line
    assert lines or page not in ("README.md", "docs/index.md", "docs/howto/commands.md")


def test_the_pictures_and_pages_of_the_site_exist() -> None:
    """`make docs` checks all links; this one needs no site to be built."""
    missing = []
    for page in PAGES:
        text = re.sub(r"```.*?```|`[^`]*`", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)
        targets = re.findall(r"\]\(([^)#\s]+)", text) + re.findall(r'<img src="([^"]+)"', text)
        links = [t for t in targets if not re.match(r"[a-z]+:", t)]
        missing += [(page, t) for t in links if not ((ROOT / page).parent / t).exists()]
    assert missing == []
    navigation = re.findall(r"[\w/-]+\.md", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    assert sorted(f"docs/{n}" for n in navigation) == sorted(p for p in PAGES if p.startswith("docs/"))
