"""The script for a machine with a GPU keeps what is measured whatever fails, and needs no installed package."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

ROOT = Path(__file__).parents[1]


def _load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / f"benchmarks/{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Its dataclasses look themselves up there.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(name="script", scope="module")
def _script() -> ModuleType:
    return _load("gpu_session")


def arguments(out: Path, **changes: object) -> argparse.Namespace:
    usual = {"call": 1, "data": "", "before": "", "seconds": 120.0, "dry_run": False, "stand_in": False}
    return argparse.Namespace(out=str(out), **{**usual, **changes})


def test_a_checkout_alone_can_be_imported(script: ModuleType, tmp_path: Path) -> None:
    folder = script.site(tmp_path)
    code = "import deepreg_fast, deepreg_fast.kernels, deepreg_fast.cuda; print(deepreg_fast.__file__)"
    environment = script.environment(folder, "dry", tmp_path / "cache")
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == str(folder / "deepreg_fast/__init__.py")


FAKE = """
import os, time
def faults(stage):
    stage.item("first", lambda: stage.say("first: right"))
    stage.item("raises", lambda: [][1])
    stage.item("hangs", lambda: time.sleep(600), seconds=1.0)
    stage.item("dies", lambda: os.kill(os.getpid(), 9))
    stage.item("loses the context", lambda: lose(stage))
    stage.item("last", lambda: stage.say("last: right"))
def lose(stage):
    stage.check_context = gone
    raise RuntimeError("an illegal memory access was encountered")
def gone():
    from gpu_stages.common import DeviceLost
    raise DeviceLost("an illegal memory access was encountered")
def endless(stage):
    stage.item("quick", lambda: stage.say("quick: right"))
    stage.item("slow", lambda: time.sleep(600), seconds=900.0)
def after(stage):
    stage.item("only", lambda: stage.say("only: right"))
"""


@pytest.fixture(name="planted")
def _planted(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stages of a module that is not among the project's, run by the real workers."""
    (tmp_path / "planted.py").write_text(
        "import sys\nimport gpu_stages.__main__ as worker\n"
        "import importlib\nimport fake\n"
        "worker.MODULES = {'faults': 'fake', 'endless': 'fake', 'after': 'fake'}\n"
        "worker.importlib = type('Modules', (), {'import_module': staticmethod(lambda _: fake)})\n"
        "worker.main()\n"
    )
    (tmp_path / "fake.py").write_text(FAKE)
    popen = subprocess.Popen

    def start(command: list[str], **options: object) -> object:
        command = [sys.executable, "-P", str(tmp_path / "planted.py"), *command[-1:]]
        env = {**options["env"]}  # type: ignore[dict-item]
        env["PYTHONPATH"] = os.pathsep.join((str(tmp_path), env["PYTHONPATH"]))
        return popen(command, **{**options, "env": env})  # type: ignore[call-overload]

    monkeypatch.setattr(script.subprocess, "Popen", start)
    monkeypatch.setattr(script, "PATIENCE", {"gpu": 1.0})
    return tmp_path


def run(script: ModuleType, folder: Path, *stages: tuple[str, int, str], **changes: object) -> tuple[dict, str]:
    """A session of planted stages, its record and its summary as they lie on disk."""
    session = script.Session(arguments(folder / "out", **changes), script.site(folder / "site"), folder / "cache")
    session.mode = "gpu"
    session.env = script.environment(folder / "site", "dry", folder / "cache")
    # A dry worker has no CUDA context to make.
    original = script.Worker.__init__
    script.Worker.__init__ = lambda self, mode, env, log: original(self, "dry", env, log)
    try:
        for name, seconds, group in stages:
            session.run(script.Stage(name, seconds, group, "a plant"))
    finally:
        script.Worker.__init__ = original
        session.close()
    out = folder / "out"
    return json.loads((out / "session.json").read_text())["stages"], (out / "summary.txt").read_text()


def test_a_fault_costs_one_line_and_everything_else_is_reported(script: ModuleType, planted: Path) -> None:
    stages, text = run(script, planted, ("faults", 3000, "main"), ("after", 600, "main"), seconds=9000.0)
    items = stages["faults"]["items"]
    assert items["first"] == items["last"] == "done"
    assert items["raises"] == "IndexError: list index out of range"
    assert items["hangs"] == "hung: killed after 1 s"
    assert items["dies"] == "ended its process (status -9)"
    assert "illegal memory access" in items["loses the context"]
    assert stages["faults"]["state"] == "done" and stages["after"]["items"] == {"only": "done"}
    lines = text.splitlines()
    for name in ("raises", "hangs", "dies", "loses the context"):
        assert sum(line.strip().startswith(f"{name}: FAILED: ") for line in lines) == 1, text
    assert sum("right" in line for line in lines) == 3
    assert script._failed(stages["faults"]) and not script._failed(stages["after"])


def test_a_stage_that_is_cut_keeps_what_it_had(
    script: ModuleType, planted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    partial, real = planted / "site/endless.json", time.monotonic
    # The stage's time ends when its slow item has begun, however busy the machine is.
    clock = SimpleNamespace(
        sleep=time.sleep,
        time=time.time,
        monotonic=lambda: real() + (5000.0 if partial.exists() and "slow" in partial.read_text() else 0.0),
    )
    monkeypatch.setattr(script, "time", clock)
    stages, text = run(script, planted, ("endless", 900, "main"), ("after", 60, "main"), seconds=9000.0)
    assert stages["endless"]["state"] == "cut"
    assert stages["endless"]["items"] == {"quick": "done", "slow": "was cut by the stage's limit"}
    assert "quick: right" in text and "only: right" in text


def test_a_session_without_time_says_so(script: ModuleType, planted: Path) -> None:
    stages, _ = run(script, planted, ("after", 60, "main"), seconds=5.0)
    assert stages["after"]["state"] == "no time left"


def test_the_calls_fit_their_time(script: ModuleType) -> None:
    """A call has 330 seconds, of which starting its processes and writing take some."""
    for stages in script.CALLS.values():
        assert sum(s.seconds for s in stages) <= 322
        assert len({s.name for s in stages}) == len(stages)
    assert [s.name for s in script.CALLS[1]][:3] == ["machine", "smoke", "timing"]


def test_every_stage_has_a_home(script: ModuleType) -> None:
    code = (
        "import importlib, json, sys; from gpu_stages.__main__ import MODULES\n"
        "names = json.loads(sys.argv[1])\n"
        "print(all(callable(getattr(importlib.import_module('gpu_stages.' + MODULES[n]), n)) for n in names))"
    )
    names = json.dumps([s.name for stages in script.CALLS.values() for s in stages])
    env = {**os.environ, "PYTHONPATH": str(ROOT / "benchmarks")}
    done = subprocess.run([sys.executable, "-c", code, names], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"


def test_a_dry_run(script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main(["--out", str(tmp_path), "--dry-run", "--stages", "machine"]) == 0
    record = json.loads((tmp_path / "session.json").read_text())
    assert record["mode"] == "dry" and record["stages"]["machine"]["ceilings"]["copy"] > 0
    assert "[machine] done" in capsys.readouterr().out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["session.json", "session.log", "summary.txt"]


def test_a_stage_that_is_none(script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        script.main(["--out", str(tmp_path), "--stages", "machine,nothing"])
    assert "'nothing'" in capsys.readouterr().err


def test_a_damaged_cache_is_a_line(script: ModuleType, tmp_path: Path) -> None:
    archive = tmp_path / "cache.tar.xz"
    archive.write_bytes(b"no archive")
    assert "everything is compiled here" in script.unpack(archive, tmp_path / "cache")
    assert "no prebuilt cache" in script.unpack(tmp_path / "none", tmp_path / "cache")
    with tarfile.open(archive, "w:xz") as tar:
        tar.add(__file__, "triton/KEY/kernel.cubin")
    assert "1 entries" in script.unpack(archive, tmp_path / "cache")
    assert (tmp_path / "cache/triton/KEY/kernel.cubin").exists()


def verdicts(code: str, tmp_path: Path) -> dict[str, str]:
    """The verdicts of `compare` on answers that the code makes."""
    text = (
        "import json, sys, torch; from pathlib import Path\n"
        "from gpu_stages.common import Stage, compare\n"
        f"stage = Stage('smoke', Path({str(tmp_path / 'stage.json')!r}), 60.0, 'dry')\n"
        "exact = torch.linspace(1, 2, 1000, dtype=torch.float64)\n"
        "torchs = exact * (1 + 1e-6)\n"
        f"{code}\n"
        "print(json.dumps(stage.record['verdicts']))"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT / "benchmarks")}
    done = subprocess.run([sys.executable, "-c", text], env=env, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def test_loose_wrong_and_unwritten_answers_are_told_apart(tmp_path: Path) -> None:
    code = (
        "unwritten = exact.clone(); unwritten[7] = float('nan')\n"
        "for name, answer in (('same', torchs), ('twice', exact * (1 + 1.9e-6)), ('loose', exact * (1 + 3.9e-6)),\n"
        "                     ('wrong', exact * (1 + 4.1e-6)), ('unwritten', unwritten)):\n"
        "    compare(stage, name, {'x': answer}, lambda: {'x': torchs}, lambda: {'x': exact})"
    )
    assert verdicts(code, tmp_path) == {
        "same": "ok", "twice": "ok", "loose": "loose", "wrong": "WRONG", "unwritten": "not written"
    }  # fmt: skip


def test_what_is_compiled_anew_is_named(tmp_path: Path) -> None:
    code = (
        "from gpu_stages.compile_log import CompileLog\n"
        "log = CompileLog()\n"
        "log.record('triton tangent', 1.5); log.record('triton tangent', 0.5); log.hits = 7\n"
        "taken = log.take()\n"
        "assert taken == {'cached': 7, 'compiled': {'triton tangent': 1.5, 'triton tangent #2': 0.5}, 'seconds': 2.0}\n"
        "assert log.take() == {'cached': 0, 'compiled': {}, 'seconds': 0}"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT / "benchmarks")}
    subprocess.run([sys.executable, "-c", code], env=env, check=True)


def test_a_summary_counts_verdicts_and_compilations(script: ModuleType) -> None:
    record = {"call": 1, "mode": "gpu", "seconds": 12.0, "notes": ["a note"], "stages": {
        "smoke": {"state": "done", "seconds": 3.0, "summary": ["chain: ok: 1e-7"],
                  "verdicts": {"a": "ok", "b": "loose"},
                  "compile": {"cached": 9, "compiled": {"triton x": 2.0}, "seconds": 2.0}, "warnings": ["UserWarning"],
                  "graphs_off": ["cuda:0"]},
    }}  # fmt: skip
    text = script.summary(record)
    assert "[smoke] done, 3 s; 1 compiled anew in 2.0 s, 9 cached; 1 ok, 1 loose" in text
    for line in ("a note", "chain: ok: 1e-7", "compiled anew: triton x, 2.0 s", "warning: UserWarning", "cuda:0"):
        assert line in text


def test_the_prebuild_names_versions_that_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    prebuild = _load("prebuild")
    assert prebuild.mismatches("") == []
    wrong = prebuild.mismatches("pytest=0.0.1,no-such-package=1,python=3")
    assert len(wrong) == 2 and "pytest must be 0.0.1" in wrong[0] and "missing" in wrong[1]


def test_packing_leaves_intermediate_code_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    prebuild = _load("prebuild")
    entry = tmp_path / "cache/triton/KEY"
    entry.mkdir(parents=True)
    for name in ("k.cubin", "k.json", "__grp__k.json", "k.ttir", "k.ptx"):
        (entry / name).write_text(name)
    assert prebuild.pack(tmp_path / "cache", tmp_path / "out/cache.tar.xz") == 3
    with tarfile.open(tmp_path / "out/cache.tar.xz") as tar:
        assert sorted(Path(n).name for n in tar.getnames()) == ["__grp__k.json", "k.cubin", "k.json"]
