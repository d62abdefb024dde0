"""Every Triton kernel that ships compiles for the GPUs without one, and fits: no spilled register, no memory too much.

What is a bound here is the hardware's; nothing here says that a kernel is fast.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[1]
SHARED_KIB = {80: 163, 90: 227, 100: 227}
"""What one block may have (CUDA programming guide, compute capabilities)."""


def _compile(*arguments: str) -> list[dict]:
    command = [sys.executable, str(ROOT / "tests/aot.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def _complaints(row: dict) -> list[str]:
    """Why a kernel does not fit."""
    if "error" in row:
        return [row["error"]]
    limits = {"reg": 255, "stack": 0, "local": 0, "shared": 1024 * SHARED_KIB[row["sm"]]}
    return [f"{name} is {row[name]}, more than {limit}" for name, limit in limits.items() if row[name] > limit]


def _modules() -> dict[str, Path]:
    """The modules of kernels/ by name, such as `conv_chain.pixel_norm`."""
    paths = [p.relative_to(ROOT / "kernels") for p in (ROOT / "kernels").rglob("[a-z]*.py")]
    return {".".join(p.with_suffix("").parts): ROOT / "kernels" / p for p in paths}


def _kernels() -> set[str]:
    """The functions of Triton in kernels/ that no other one calls: those that the host launches."""
    functions = [
        (name, node)
        for name, path in _modules().items()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef)
        and any(ast.unparse(d).startswith(("triton.jit", "unspecialized(")) for d in node.decorator_list)
    ]
    called = {ast.unparse(n.func) for _, f in functions for n in ast.walk(f) if isinstance(n, ast.Call)}
    return {f"{module}.{f.name}" for module, f in functions if f.name not in called}


def _misfits(rows: list[dict]) -> dict[str, list[str]]:
    wrong = {json.dumps({k: r[k] for k in ("module", "kernel", "sm", "constexprs")}): _complaints(r) for r in rows}
    return {k: w for k, w in wrong.items() if w}


def test_every_kernel_has_variants() -> None:
    modules = [import_module(f"deepreg_fast.kernels.{name}") for name in _modules()]
    listed = [v.kernel.fn for m in modules if hasattr(m, "variants") for v in m.variants()]
    assert _kernels() == {f"{f.__module__.removeprefix('deepreg_fast.kernels.')}.{f.__name__}" for f in listed}


def test_the_vector_kernels_fit() -> None:
    rows = _compile("solvers.reductions", "--sm", "90")
    assert rows and _misfits(rows) == {}


@pytest.mark.long
@pytest.mark.parametrize("sm", [80, 90])
def test_all_kernels_fit(sm: int) -> None:
    rows = _compile("--sm", str(sm))
    print(*rows, sep="\n")
    assert _misfits(rows) == {}
    assert _kernels() == {f"{row['module']}.{row['kernel']}" for row in rows}, (
        "each module's variants() must list its kernels"
    )


def test_a_spilling_kernel_is_caught() -> None:
    (row,) = _compile("spilling", "--sm", "90")
    assert any(c.startswith("stack") for c in _complaints(row)), row


@pytest.mark.parametrize("option", [(), pytest.param(("--machine-code",), marks=pytest.mark.long)])
def test_launches_compile(option: tuple[str, ...]) -> None:
    command = [sys.executable, str(ROOT / "tests/launches.py"), *option]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    *failed, last = [json.loads(line) for line in done.stdout.splitlines()]
    assert failed == []
    everything = {name.rpartition(".")[2] for name in _kernels()}
    assert set(last["launched"]) == everything


def test_batches_of_any_size_share_their_compiled_kernels() -> None:
    """Else a new size would compile in the middle of a run, perhaps while a CUDA graph is made."""
    command = [sys.executable, str(ROOT / "tests/launches.py"), "--keys"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    first, *others = [json.loads(line) for line in done.stdout.splitlines()]
    assert first["failed"] == [] and {key.split()[0] for key in first["keys"]} == {
        name.rpartition(".")[2] for name in _kernels()
    }
    for other in others:
        assert set(other["keys"]) ^ set(first["keys"]) == set(), f"{other['batch']} images beside 1"
