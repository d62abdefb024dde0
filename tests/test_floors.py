"""Imports only go down the floors, and `import deepreg_fast` stays light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "deepreg_fast"

# The table of docs/design.md. A new module or subpackage gets its line here; a module of a subpackage is on the
# floor of its subpackage. A floor may import itself and the floors below it.
FLOORS: dict[int, tuple[str, ...]] = {
    0: ("errors", "status", "ambient", "terminal", "_version", "_cpu", "kernels", "cuda"),
    1: ("checks", "files", "machine"),
    2: ("functional", "data", "report", "problem"),
    3: ("backend",),
    4: ("batched",),
    5: ("solvers", "autograd"),
    6: ("operators", "regularizers"),
    7: ("inverse", "weights", "ops"),
    8: ("evaluation", "bench", "adapters", "throughput"),
    9: ("training",),
    10: ("experiments",),
    11: ("cli", "__init__", "__main__"),
}
FLOOR_OF = {name: floor for floor, names in FLOORS.items() for name in names}

# What the plain import must not bring in: optional parts, and parts that cost time and are used by some callers only.
HEAVY = ("triton", "cupy", "matplotlib", "skimage", "typer", "rich", "tensorboard", "scipy", "pooch", "deepinv")


def sources() -> dict[str, Path]:
    """Every module of the package by its full name, those of `kernels/` and `csrc/cuda` among them."""
    found = {}
    for folder, prefix in (
        (ROOT / PACKAGE, (PACKAGE,)),
        (ROOT / "kernels", (PACKAGE, "kernels")),
        (ROOT / "csrc/cuda", (PACKAGE, "cuda")),
    ):
        for path in sorted(folder.rglob("*.py")):
            parts = (*prefix, *path.relative_to(folder).with_suffix("").parts)
            found[".".join(parts)] = path
    return found


def top(module: str) -> str:
    """The name that stands in the table for `deepreg_fast.top.rest`."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def imports_of(module: str, text: str) -> set[str]:
    """Full names of the package's modules that a module's text imports, anywhere in it (functions too)."""
    # `module` ends in `.__init__` for a package, so that dropping the last part is right for both kinds.
    package = module.split(".")[:-1]
    out: set[str] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            out.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = [*base, *(node.module.split(".") if node.module else [])]
            # `from deepreg_fast import x`: x is a module of the table, or a name that the package itself offers.
            names = [a.name for a in node.names] if base == [PACKAGE] else [None]
            out.update(".".join([*base, name]) if name in FLOOR_OF else ".".join(base) for name in names)
    return {name for name in out if name.split(".")[0] == PACKAGE}


def violations(module: str, text: str) -> list[str]:
    floor = FLOOR_OF[top(module)]
    return [
        f"{module} (floor {floor}) imports {name} (floor {FLOOR_OF[top(name)]})"
        for name in sorted(imports_of(module, text))
        if FLOOR_OF[top(name)] > floor
    ]


def test_every_module_has_a_floor():
    homeless = sorted(name for name in sources() if top(name) not in FLOOR_OF)
    assert not homeless, f"give these a line in FLOORS and in docs/design.md: {homeless}"


def test_every_name_of_the_table_exists():
    present = {top(name) for name in sources()}
    # _cpu is compiled from csrc/cpu.
    assert set(FLOOR_OF) - {"__main__", "_cpu"} <= present


@pytest.mark.parametrize("module", sources())
def test_imports_only_go_down(module: str):
    wrong = violations(module, sources()[module].read_text(encoding="utf-8"))
    assert not wrong, "; ".join(wrong)


@pytest.mark.parametrize(
    ("module", "text", "count"),
    [
        ("deepreg_fast.errors", "import deepreg_fast.cli", 1),
        ("deepreg_fast.errors", "from . import status", 0),
        ("deepreg_fast.errors", "from . import recover", 1),
        ("deepreg_fast.errors", "from .solvers.pgd import pgd", 1),
        ("deepreg_fast.solvers.pgd", "from ..operators import SRM", 1),
        ("deepreg_fast.operators.__init__", "from .srm import SRM\nfrom ..functional import dct", 0),
        ("deepreg_fast.operators.__init__", "from ..inverse.recovery import recover", 1),
        ("deepreg_fast.backend.gpu.backend", "def f():\n    from deepreg_fast.regularizers import RED", 1),
        ("deepreg_fast.backend.gpu.backend", "def f():\n    from deepreg_fast.kernels import srm\nimport triton", 0),
        ("deepreg_fast.cli.main", "from .. import SRM, training", 0),
    ],
)
def test_the_check_itself(module: str, text: str, count: int):
    assert len(violations(module, text)) == count


@pytest.mark.parametrize("code", ["import deepreg_fast", "from deepreg_fast import RED, SRM, PGDOptions, recover"])
def test_import_is_light(code: str):
    code += f"; import sys; print(' '.join(m for m in {HEAVY!r} if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT.anchor, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []
