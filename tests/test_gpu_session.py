"""The script for a machine with a GPU keeps what it finds, ends what hangs, and needs no installed package."""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(name="script", scope="module")
def _script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_session", ROOT / "benchmarks/gpu_session.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Its dataclass looks itself up there.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_a_checkout_alone_can_be_imported(script: ModuleType, tmp_path: Path) -> None:
    folder = script.site(tmp_path)
    code = "import deepreg_fast, deepreg_fast.kernels, deepreg_fast.cuda; print(deepreg_fast.__file__)"
    environment = script.environment(folder, dry=True)
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == str(folder / "deepreg_fast/__init__.py")


def test_a_stage_that_hangs_is_ended_and_keeps_its_findings(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = tmp_path / "gpu_stages.py"
    fake.write_text(
        "import json, sys, time\n"
        "name, path = sys.argv[1], sys.argv[sys.argv.index('--json') + 1]\n"
        "json.dump({'summary': ['found ' + name], 'key': 1}, open(path, 'w'))\n"
        "print('said by', name, flush=True)\n"
        "time.sleep(60 if name == 'hangs' else 0)\n"
        "sys.exit(3 if name == 'fails' else 0)\n"
    )
    monkeypatch.setattr(script, "environment", lambda folder, dry: {"PYTHONPATH": str(tmp_path)})
    out = tmp_path / "out"
    arguments = argparse.Namespace(out=str(out), data="", minutes=2.0, dry_run=True)
    session = script.Session(arguments, tmp_path)
    for name in ("hangs", "fails", "works"):
        session.run(script.Stage(name, 2, "a fake"))
    found = json.loads((out / "session.json").read_text())["stages"]
    assert [found[n]["state"] for n in ("hangs", "fails", "works")] == ["cut", "ended with code 3", "done"]
    assert all(found[n]["key"] == 1 for n in found)
    assert found["hangs"]["seconds"] < 30
    assert "said by hangs" in (out / "session.log").read_text()
    assert "[fails] ended with code 3" in script.summary(session.found) and "found works" in script.summary(
        session.found
    )
    session.began = time.monotonic() - 60 * 2.0
    session.run(script.Stage("late", 2, "a fake"))
    assert session.found["stages"]["late"]["state"] == "no time left"


def test_a_dry_run(script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main(["--out", str(tmp_path), "--dry-run", "--stages", "machine"]) == 0
    found = json.loads((tmp_path / "session.json").read_text())
    assert found["dry_run"] and found["stages"]["machine"]["ceilings"]["copy"] > 0
    assert "[machine] done" in capsys.readouterr().out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["session.json", "session.log"]


def test_a_stage_that_is_none(script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        script.main(["--out", str(tmp_path), "--stages", "machine,nothing"])
    assert "'nothing'" in capsys.readouterr().err


def test_every_stage_has_a_home(script: ModuleType) -> None:
    text = (ROOT / "benchmarks/gpu_stages/__main__.py").read_text()
    assert all(f'"{name}"' in text for name in script.NAMES)
    assert sum(s.seconds for s in script.STAGES[:8]) <= 540
