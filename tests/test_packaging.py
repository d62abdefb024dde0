"""What is installed, under which names, and that the pins agree."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import pytest

import deepreg_fast
from deepreg_fast._version import __version__

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def python(*args: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *args], capture_output=True, text=True, cwd=cwd, env={**os.environ, **env}, check=False
    )


class Wheel(NamedTuple):
    """A wheel, and whether its extension is that of the sources."""

    archive: zipfile.ZipFile
    compiled: bool


COMPILER = shutil.which("c++")
# What a wheel holds does not depend on what the compiler makes of a source.
_EMPTY_OBJECTS = f"""#!/bin/sh
case " $* " in *" -c "*) ;; *) exec {COMPILER} "$@" ;; esac
while [ $# -gt 0 ]; do [ "$1" = -o ] && out=$2; shift; done
exec {COMPILER} -fPIC -c -x c++ /dev/null -o "$out"
"""


@pytest.fixture(scope="module", params=["empty", pytest.param("compiled", marks=pytest.mark.long)])
def wheel(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Wheel:
    """The wheel built from a copy of the tree, so that nothing is left in the tree itself."""
    copy = tmp_path_factory.mktemp("tree")
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in ("deepreg_fast", "kernels", "csrc"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    env = {}
    if request.param == "empty":
        compiler = tmp_path_factory.mktemp("compiler") / "c++"
        compiler.write_text(_EMPTY_OBJECTS, encoding="utf-8")
        compiler.chmod(0o755)
        env = {"CC": str(compiler), "CXX": str(compiler)}
    out = tmp_path_factory.mktemp("wheel")
    code = "import sys; from setuptools.build_meta import build_wheel; print(build_wheel(sys.argv[1]))"
    done = python("-c", code, str(out), cwd=copy, **env)
    assert done.returncode == 0, done.stderr
    return Wheel(zipfile.ZipFile(next(out.glob("*.whl"))), request.param == "compiled")


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Wheel):
    names = set(wheel.archive.namelist())
    tops = {name.split("/")[0] for name in names}
    assert tops == {"deepreg_fast", f"deepreg_fast-{__version__}.dist-info"}
    expected = {str(p.relative_to(ROOT)) for p in (ROOT / "deepreg_fast").rglob("*.py")}
    expected |= {
        "deepreg_fast/kernels/" + str(p.relative_to(ROOT / "kernels")) for p in (ROOT / "kernels").rglob("*.py")
    }
    expected |= {f"deepreg_fast/data/bsd400_{kind}.json" for kind in ("split", "sha256")}
    expected |= {f"deepreg_fast/weights/{p.name}" for p in (ROOT / "deepreg_fast/weights").glob("*.safetensors")}
    expected |= {f"deepreg_fast/experiments/{name}.toml" for name in ("bsd400", "quick", "ledger")}
    assert "deepreg_fast/weights/cs5-beta10.safetensors" in expected <= names
    assert "deepreg_fast/py.typed" in names
    extensions = {name for name in names if name.endswith((".so", ".pyd"))}
    assert extensions == ({f"deepreg_fast/_cpu{sysconfig.get_config_var('EXT_SUFFIX')}"} if COMPILER else set())
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_unpacked_wheel_imports(wheel: Wheel, tmp_path: Path):
    wheel.archive.extractall(tmp_path)
    code = (
        "import deepreg_fast as dr, deepreg_fast.kernels as k, deepreg_fast.data as d\n"
        "print(k.__file__, len(d.bsd400_split().train), dr.load('cs5-beta10')[1]['card']['name'])\n"
        "print(dr.backends()['cpu'])"
    )
    done = python("-c", code, cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    (file, count, name), backend = (line.split(maxsplit=2) for line in done.stdout.splitlines())
    assert Path(file) == tmp_path / "deepreg_fast" / "kernels" / "__init__.py"
    assert (count, name) == ("370", "cs5-beta10")
    assert not (wheel.compiled and COMPILER) or backend == ["None"]


def test_kernels_alone_fails_with_a_sentence():
    done = python("-c", "import kernels", cwd=ROOT)
    assert done.returncode == 1
    assert "cannot be imported by itself" in done.stderr
    assert "import deepreg_fast.kernels" in done.stderr


def test_kernels_as_part_of_the_package():
    import deepreg_fast.kernels

    assert deepreg_fast.kernels.__name__ == "deepreg_fast.kernels"


def test_one_version():
    assert deepreg_fast.__version__ == __version__ == metadata.version("deepreg-fast")


def test_entry_point():
    (entry,) = (e for e in metadata.entry_points(group="console_scripts") if e.name == "deepreg-fast")
    assert entry.value == "deepreg_fast.cli:main"
    assert callable(entry.load())


def test_pins_agree():
    hooks = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    dev = set(PROJECT["optional-dependencies"]["dev"])
    pins = set(re.findall(r'"([^"]+==[^"]+)"', hooks))
    assert {re.split(r"[\[=]", pin)[0] for pin in pins} == {"ruff", "pyright"}
    assert pins <= dev


def absolute_imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module)
    return {name.split(".")[0] for name in names}


def test_every_import_is_declared():
    """No module imports a package that the project does not depend on."""
    declared = {re.split(r"[^\w-]", d)[0] for extra in PROJECT["optional-dependencies"].values() for d in extra}
    declared |= {re.split(r"[^\w-]", d)[0] for d in PROJECT["dependencies"]}
    distribution = {"PIL": "pillow", "skimage": "scikit-image", "cupy": "cupy-cuda13x", "requests": "pooch"}
    for path in [*(ROOT / "deepreg_fast").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]:
        for name in absolute_imports(path):
            known = name in sys.stdlib_module_names or name == "deepreg_fast"
            assert known or distribution.get(name, name) in declared, f"{path.name} imports {name}"


def test_ci_calls_make_test():
    script = ROOT / ".ci" / "run"
    lines = script.read_text(encoding="utf-8").splitlines()
    assert lines[:2] == ["#!/usr/bin/env bash", "set -euo pipefail"]
    assert lines[-4:] == ["make sanitize", "make docs", "make test-long", "exec make test"]
    assert os.access(script, os.X_OK)


@pytest.mark.skipif(shutil.which("make") is None, reason="no make on this machine")
def test_make_says_which_python_it_needs(tmp_path: Path):
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("pyproject.toml", "setup.py"):
        (tmp_path / name).touch()
    old = tmp_path / "python-old"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.9.2 && exit 0\nexit 1\n', encoding="utf-8")
    old.chmod(0o755)
    done = subprocess.run(
        ["make", "install", f"PYTHON={old}"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "needs Python 3.11 or newer" in done.stderr
    assert "Python 3.9.2" in done.stderr
    assert not (tmp_path / ".venv").exists()
