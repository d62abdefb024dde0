"""A reproduction: settings, graph, folder, faults, and a whole run on small images."""

from __future__ import annotations

import copy
import csv
import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import deepreg_fast as dr
from deepreg_fast.errors import CheckpointError, DataError, InputError
from deepreg_fast.experiments import Settings, load_settings, parse
from deepreg_fast.experiments.folder import Folder, agree, locked
from deepreg_fast.experiments.job import FATAL, Job
from deepreg_fast.experiments.results import collect
from deepreg_fast.experiments.scheduler import plan
from deepreg_fast.experiments.settings import changes
from deepreg_fast.experiments.training_curves import POINTS, _thinned

from . import forked

ROOT = Path(__file__).parents[1]

SMALL = {"crop": 16, "channels": 4, "steps": 12, "batch": 2, "warmup": 2, "validation_crop": 16, "validate_every": 6}
TINY: dict[str, Any] = {
    "problem": {"tuning": 2},
    "defaults": {"bilevel": {**SMALL, "inner_iterations": 6}, "denoiser": SMALL},
    "row": [
        {"name": "adjoint", "method": "adjoint"},
        {"name": "minimum-norm", "method": "minimum_norm"},
        {"name": "tv", "method": "tv", "recovery": {"max_iterations": 30}},
        {
            "name": "red",
            "method": "denoiser",
            "choose": {"noise_level": [0.03, 0.1]},
            "recovery": {"max_iterations": 10},
        },
        {
            "name": "beta1",
            "method": "bilevel",
            "train": {"beta": 1.0},
            "poster": {"psnr": 26.34, "ssim": 0.71},
            "recovery": {"max_iterations": 20},
        },
        {
            "name": "beta3",
            "method": "bilevel",
            "init": "beta1",
            "stages": [{"beta": 2.0}, {"beta": 3.0, "steps": 8}],
            "recovery": {"max_iterations": 20},
        },
        {
            "name": "beta3-scaled",
            "method": "bilevel",
            "weights": "beta3",
            "ratio": 0.5,
            "tune": ["mu", "scale"],
            "recovery": {"max_iterations": 10},
        },
    ],
}


def table(**changed: Any) -> dict[str, Any]:
    """`TINY` with rows changed: `table(beta1={"tune": ["mu"]})`, None removes one."""
    found = copy.deepcopy(TINY)
    for name, change in changed.items():
        row = next(r for r in found["row"] if r["name"] == name.replace("_", "-"))
        found["row"].remove(row) if change is None else row.update(change)
    return found


def only(*names: str) -> dict[str, Any]:
    return {**TINY, "row": [copy.deepcopy(r) for r in TINY["row"] if r["name"] in names]}


def to_toml(found: dict[str, Any]) -> str:
    """The tables as TOML (inline, which JSON's scalars and lists are too)."""

    def inline(v: Any) -> str:
        if isinstance(v, dict):
            return "{ " + ", ".join(f"{k} = {inline(w)}" for k, w in v.items()) + " }"
        return "[" + ", ".join(map(inline, v)) + "]" if isinstance(v, list) else json.dumps(v)

    lines = [f"{k} = {inline(found[k])}" for k in ("problem", "defaults")]
    for row in found["row"]:
        lines += ["[[row]]", *(f"{k} = {inline(v)}" for k, v in row.items())]
    assert tomllib.loads("\n".join(lines)) == found
    return "\n".join(lines)


# -- settings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"beta1": {"poser": {"psnr": 1.0}}}, r"Row 'beta1' must have no setting 'poser'; did you mean 'poster'\?"),
        ({"beta1": {"train": {"betta": 1.0}}}, r"Row 'beta1' must have no setting 'betta'; did you mean 'beta'\?"),
        ({"beta1": {"train": {"beta": -1.0}}}, r"Row 'beta1': beta must be a number in \[0, inf\], but is -1.0"),
        ({"beta1": {"train": {"beta": "x"}}}, r"Row 'beta1': beta must be a number"),
        ({"beta1": {"train": {"ratio": 0.3}}}, r"Row 'beta1' must not set 'ratio': the problem's settings belong in"),
        ({"beta1": {"train": {"device": "cuda"}}}, r"must not set 'device'"),
        ({"beta3": {"stages": []}}, r"Row 'beta3': stages must be a list of tables, but is \[\]"),
        ({"beta3": {"stages": [{}, {"beta": -1}]}}, r"Row 'beta3', stage 2: beta must be"),
        ({"beta3": {"stages": [{"ratio": 0.5}, {"ratio": 0.5}]}}, r"Row 'beta3', stage 2 must not set 'ratio'"),
        ({"beta3": {"stages": [{"ratio": 2.0}, {}]}}, r"Row 'beta3', stage 1: ratio must be"),
        ({"beta3": {"init": "beta2"}}, r"Row 'beta3': init must name a row, but there is no 'beta2'; did you mean"),
        ({"beta3": {"init": "beta3"}}, r"in a circle, but beta3 -> beta3; remove"),
        ({"beta1": {"init": "beta3"}}, r"in a circle, but beta1 -> beta3 -> beta1; remove"),
        ({"beta3": {"init": "red"}}, r"Row 'beta3' must begin from a row of its own method 'bilevel', but 'red' is"),
        ({"beta3": {"name": "beta1", "init": ""}}, r"Rows must have different names, but 'beta1' comes twice"),
        ({"beta3": {"name": "Beta 3"}}, r"must have a name of a-z, 0-9 and hyphens, but has 'Beta 3'"),
        ({"beta1": {"method": "bi-level"}}, r"Row 'beta1': method must be one of adjoint, .*, but is 'bi-level'"),
        ({"tv": {"train": {"steps": 3}}}, r"Row 'tv': tv has nothing to train, so it must not set train"),
        ({"tv": {"tune": []}}, r"Row 'tv': tv must not set tune; its tuning is fixed"),
        ({"adjoint": {"recovery": {"tolerance": 1.0}}}, r"adjoint solves nothing, so it must not set recovery"),
        ({"beta1": {"recovery": {"acceleration": "nesterov"}}}, r"acceleration must be one of 'none', 'fista'"),
        ({"beta1": {"recovery": {"steps": 3}}}, r"Row 'beta1': recovery must have no setting 'steps'"),
        ({"beta1": {"tune": ["gain"]}}, r"Row 'beta1': tune must be a list of 'mu' and 'scale', but is \['gain'\]"),
        ({"beta1": {"group": "ours"}}, r"Row 'beta1': group must be one of 'paper', 'beyond', 'ledger'"),
        ({"beta1": {"ratio": 1.5}}, r"Row 'beta1': ratio must be a number in \(0, 1\]"),
        ({"beta3_scaled": {"train": {"steps": 3}}}, r"must either take the weights of a row or train, but sets"),
        ({"red": {"choose": {"noise_level": 0.1}}}, r"Row 'red': choose.noise_level must be a list of values"),
        ({"beta1": {"poster": {"psnr": "high"}}}, r"Row 'beta1': poster.psnr must be a number"),
    ],
)
def test_wrong_settings_are_named(changed: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        parse(table(**changed))


@pytest.mark.parametrize(
    ("found", "sentence"),
    [
        ({"problem": {}}, r"must have at least one \[\[row\]\]"),
        ({**TINY, "rows": []}, r"The settings must have no setting 'rows'; did you mean 'row'\?"),
        ({**TINY, "problem": {"ratio": 0}}, r"\[problem\]: ratio must be a number"),
        ({**TINY, "problem": {"croop": 0}}, r"\[problem\] must have no setting 'croop'"),
        ({**TINY, "defaults": {"red": {}}}, r"\[defaults\] must have no setting 'red'"),
        (
            {**TINY, "defaults": {"bilevel": {"depth": 1}}},
            r"\[defaults.bilevel\]: depth must be an integer, at least 2",
        ),
        ({**TINY, "problem": 3}, r"\[problem\] must be a table of settings, but is 3"),
    ],
)
def test_wrong_tables_are_named(found: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        parse(found)


def test_files_that_are_no_settings(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--settings must be one of bsd400, quick, ledger or a TOML file, but"):
        load_settings("bsd401")
    (tmp_path / "x.toml").write_text("row = [")
    with pytest.raises(InputError, match=r"must be a TOML file, but is not one"):
        load_settings(tmp_path / "x.toml")


@pytest.mark.parametrize("name", ["bsd400", "quick", "ledger"])
def test_shipped_settings(name: str) -> None:
    found = load_settings(name)
    assert Settings.from_json(found.to_json()) == found
    assert any(r.method == "tv" for r in found.rows)
    for row in found.rows:
        if not row.compare:
            continue
        base = found[row.compare]
        differing = changes(base, dataclasses.replace(row, name=base.name))
        assert [d.partition(":")[0].rpartition(".")[2] for d in differing if not d.startswith("problem.")] == [
            row.setting
        ]
        assert differing[-1].endswith(f"-> {row.value!r}")


def test_defaults_and_resolution() -> None:
    found = parse(TINY)
    assert found["beta1"].tune == () and found["red"].tune == ("mu",)
    assert [s.folder for s in found["beta3"].chains[0].stages] == ["1", "2"]
    easier = parse(table(beta3={"stages": [{"ratio": 1.0, "sigma": 0.1}, {}]}))["beta3"].chains[0].stages
    assert [(s.config["ratio"], s.config["sigma"]) for s in easier] == [(1.0, 0.1), (0.2, 0.0)]
    assert [c.values for c in found["red"].chains] == [{"noise_level": 0.03}, {"noise_level": 0.1}]
    assert [c.last.folder for c in found["red"].chains] == ["noise_level-0.03", "noise_level-0.1"]
    config = found["beta3"].chains[0].last.config
    assert (config["beta"], config["steps"], config["crop"], config["validation"]) == (3.0, 8, 16, 2)
    assert not {"out", "data", "device", "threads", "init"} & set(config)
    assert found["beta3-scaled"].problem.ratio == 0.5 and found["beta3"].problem.ratio == 0.2


def test_another_problem_for_all_rows(tmp_path: Path) -> None:
    path = tmp_path / "tiny.toml"
    path.write_text(to_toml(table(tv={"sigma": 0.02}, beta3={"stages": [{"ratio": 1.0}, {"beta": 3.0}]})))
    rows = {r.name: r for r in load_settings(path, "sr2", 0.01).rows}
    # What varies the SRM makes no sense here.
    assert set(rows) == {r["name"] for r in TINY["row"]} - {"beta3-scaled"}
    assert {r.problem.problem for r in rows.values()} == {"sr2"}
    assert {n: r.problem.sigma for n, r in rows.items()} == {n: 0.02 if n == "tv" else 0.01 for n in rows}
    for row in rows.values():
        for chain in row.chains:
            assert [(s.config["problem"], s.config["sigma"]) for s in chain.stages] == [("sr2", 0.01)] * len(
                chain.stages
            )
    assert [r.problem.problem for r in load_settings(path).rows] == ["cs"] * len(TINY["row"])
    path.write_text(to_toml({**TINY, "problem": {"problem": "sr2", "ratio": 0.3}}))
    with pytest.raises(InputError, match=r"\[problem\]: ratio must be left out for problem 'sr2'"):
        load_settings(path)


def test_selection_brings_what_a_row_begins_from() -> None:
    found = parse(TINY)
    assert [r.name for r in found.select(("beta3-scaled",)).rows] == ["beta1", "beta3", "beta3-scaled"]
    assert [r.name for r in found.select(("tv",)).rows] == ["tv"]
    with pytest.raises(InputError, match=r"--rows must name rows of the settings, but there is no 'tw'"):
        found.select(("tw",))
    with pytest.raises(InputError, match=r"must have rows of that choice"):
        found.select((), "ledger")


def test_the_longest_way_comes_first(tmp_path: Path) -> None:
    found = parse(TINY)
    tasks = plan(Folder(tmp_path), found, found)
    by_urgency = sorted(tasks, key=lambda n: -tasks[n].urgency)
    assert by_urgency[:2] == ["beta1 training", "beta3 training"]
    assert tasks["beta3 training"].needs == ("beta1 training",)
    assert tasks["beta3-scaled evaluation"].needs == ("beta3 training",)
    assert set(tasks["red evaluation"].needs) == {f"red training noise_level-{v}" for v in (0.03, 0.1)}


# -- the folder ----------------------------------------------------------------------------------------------------


def test_changed_settings_are_refused_and_named(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "out")
    agree(folder, parse(TINY))
    before = folder.settings.read_text()
    other = table(beta1={"train": {"beta": 1.5}}, beta3={"stages": [{"beta": 2.0}, {"beta": 3.0, "steps": 9}]})
    other["row"][0]["label"] = "another label"
    for name in ("beta1", "beta3", "adjoint"):
        (folder.path / "rows" / name).mkdir(parents=True)
    with pytest.raises(InputError) as error:
        agree(folder, parse(other))
    text = str(error.value)
    assert "row 'beta1' (beta: 1.0 -> 1.5)" in text
    assert "row 'beta3' (stage 2: steps: 8 -> 9)" in text
    assert "adjoint" not in text and "nothing was changed" in text
    assert folder.settings.read_text() == before
    with pytest.raises(InputError, match=r"row 'beta1' \(validation: 2 -> 3; problem.tuning: 2 -> 3\)"):
        agree(folder, parse({**TINY, "problem": {"tuning": 3}}))


def test_new_rows_and_rows_not_begun_are_taken_over_or_dropped(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "out")
    agree(folder, parse(only("tv", "beta1")))
    (folder.path / "rows/tv").mkdir(parents=True)
    found = agree(folder, parse({**TINY, "row": [*only("beta1", "adjoint")["row"]]}).with_data("elsewhere"))
    assert [r.name for r in found.rows] == ["adjoint", "beta1", "tv"]
    assert [r.name for r in agree(folder, parse(only("adjoint"))).rows] == ["adjoint", "tv"]
    changed = table(beta1={"train": {"beta": 9.0}})
    assert agree(folder, parse(changed))["beta1"].chains[0].last.config["beta"] == 9.0


def test_a_setting_that_is_newer_than_the_folder_has_its_default() -> None:
    row = parse(TINY)["beta1"]
    older = json.loads(Settings((row,)).to_json())
    del older["rows"][0]["chains"][0]["stages"][0]["config"]["adjoint_tolerance"]
    old = Settings.from_json(json.dumps(older)).rows[0]
    assert changes(old, row) == []
    row.chains[0].last.config["adjoint_tolerance"] = 0.3
    assert changes(old, row) == ["adjoint_tolerance: 0.1 -> 0.3"]


def test_folders_of_another_version_are_refused(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    folder.settings.write_text(parse(TINY).to_json().replace("reproduction-1", "reproduction-0"))
    with pytest.raises(InputError, match=r"must be of the format 'deepreg-fast-reproduction-1', but is of"):
        agree(folder, parse(TINY))
    folder.settings.write_text("{}")
    with pytest.raises(InputError, match=r"must be what a reproduction wrote, but cannot be read"):
        agree(folder, parse(TINY))
    folder.settings.unlink()
    (tmp_path / "rows").mkdir()
    with pytest.raises(CheckpointError, match=r"must be there beside the rows of a reproduction, but is not"):
        agree(folder, parse(TINY))


def test_foreign_weights_and_results_are_refused(tmp_path: Path) -> None:
    found, folder = parse(TINY), Folder(tmp_path)
    row = found["beta1"]
    weights = folder.trained(row, row.chains[0])
    weights.parent.mkdir(parents=True)
    weights.write_bytes(b"not weights")
    with pytest.raises(CheckpointError, match=r"must be a whole safetensors file, but cannot be read"):
        plan(folder, found, found)
    folder.result(row).write_text('{"psnr": [1.0]}')
    with pytest.raises(CheckpointError, match=r"must be a result of this version, but cannot be read"):
        collect(folder, found)


def test_training_curves_are_thinned() -> None:
    lines = [{"step": k + 1, "loss": float(k), "mu": 0.1} for k in range(1000)]
    lines.insert(500, {"step": 500, "val_psnr": 20.0})
    curve = _thinned(lines)
    assert len(curve["step"]) == POINTS and curve["step"][-1] == 1000
    assert [v for v in curve["val_psnr"] if v is not None] == [20.0]
    assert (curve["step"][0], curve["loss"][0]) == (3, 1.0)
    assert _thinned([]) == {"step": [], "loss": [], "val_psnr": [], "beta_hat": [], "mu": []}


# -- whole runs, as processes ----------------------------------------------------------------------------------------


class Shell:
    """The command in a folder of its own, with modules that are broken on purpose."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.settings(TINY)
        site = folder / "site"
        site.mkdir()
        (site / "sitecustomize.py").write_text(_SITE)
        path = os.pathsep.join(p for p in (str(site), str(ROOT), os.environ.get("PYTHONPATH", "")) if p)
        self.env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}

    def settings(self, found: dict[str, Any]) -> None:
        (self.folder / "tiny.toml").write_text(to_toml(found))

    def _options(self, *options: str) -> list[str]:
        return [
            "reproduce",
            "--settings",
            "tiny.toml",
            "--data",
            "pictures",
            "--out",
            "out",
            "--workers",
            "1",
            *options,
        ]

    def run(self, *options: str, report: bool = False, **env: str) -> subprocess.CompletedProcess[str]:
        """The command in forks of this process, to its end; without the report's figures if it is not told."""
        process = self.start(*options, report=report, **env)
        _, text = process.communicate()
        return subprocess.CompletedProcess(options, process.returncode, "", text)

    def start(self, *options: str, report: bool = False, **env: str) -> Any:
        """The command in forks of this process, begun."""
        env = {**self.env, **env} if report else {**self.env, **env, "TEST_NO_REPORT": "1"}
        return forked.start(self._options(*options), env=env, cwd=self.folder, site=_SITE)

    def start_processes(self, *options: str) -> subprocess.Popen[str]:
        """The command as users start it, begun."""
        return subprocess.Popen(
            [sys.executable, "-c", "from deepreg_fast.cli import main; main()", *self._options(*options)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            cwd=self.folder,
            env=self.env,
            start_new_session=True,
        )

    def results(self) -> dict[str, dict[str, Any]]:
        found = json.loads((self.folder / "out/results.json").read_text())
        return {r["name"]: r for r in found["rows"]}


_SITE = """
import errno, os
limit = int(os.environ.get("TEST_FULL_DISK", "0"))
if limit:
    fsync, count = os.fsync, 0
    def full(fd):
        global count
        count += 1
        if count > limit:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return fsync(fd)
    os.fsync = full
if os.environ.get("TEST_ENDLESS"):
    import signal
    replace = os.replace
    def endless(source, target):
        while os.path.basename(target) == "results.json":
            signal.pause()
        return replace(source, target)
    os.replace = endless
"""


@pytest.fixture(name="shell")
def _shell(tmp_path: Path, folder: Path) -> Shell:
    shutil.copytree(folder, tmp_path / "pictures")
    return Shell(tmp_path)


@pytest.fixture(name="whole", scope="module")
def _whole(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Shell:
    """The tiny settings, run through."""
    path = tmp_path_factory.mktemp("whole")
    shutil.copytree(folder, path / "pictures")
    shell = Shell(path)
    done = shell.run(report=True)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return shell


def timeless(results: dict[str, Any]) -> dict[str, Any]:
    """Results without what differs between two runs: times, command and machine."""
    if isinstance(results, dict):
        drop = ("seconds", "seconds_all", "images_per_second", "machine", "command")
        return {k: timeless(v) for k, v in results.items() if k not in drop}
    return [timeless(v) for v in results] if isinstance(results, list) else results


def test_a_whole_run(whole: Shell) -> None:
    found = whole.results()
    assert list(found) == [r["name"] for r in TINY["row"]]
    assert (whole.folder / "out/report.html").stat().st_size > 100_000
    for name, r in found.items():
        assert len(r["psnr"]) == len(r["images"]) == 6 and sum(r["status"].values()) == 6
        assert r["psnr_mean"] == pytest.approx(np.mean(r["psnr"]))
        assert r["command"].startswith("deepreg-fast reproduce --settings tiny.toml") and r["version"] == dr.__version__
        with np.load(whole.folder / "out/rows" / name / "images.npz") as kept:
            assert kept["x"].shape == (6, 1, 24, 24) and kept["x"].dtype == np.float16
    assert found["adjoint"]["trajectory"] is None and found["adjoint"]["lipschitz"] is None
    assert found["tv"]["lipschitz"] is None and found["red"]["lipschitz"] is None
    assert found["tv"]["vs_tv"] is None and found["beta3-scaled"]["vs_tv"] is None
    assert found["beta1"]["vs_tv"]["mean"] == pytest.approx(found["beta1"]["psnr_mean"] - found["tv"]["psnr_mean"])
    assert found["red"]["chosen"]["noise_level"] in (0.03, 0.1)
    assert found["beta1"]["poster"] == {"psnr": 26.34, "ssim": 0.71}
    assert (found["beta1"]["beta"], found["beta3"]["beta"]) == (1.0, 3.0)
    assert found["beta3-scaled"]["training"] is None and found["beta3-scaled"]["ratio"] == 0.5


def test_curves_of_a_row(whole: Shell) -> None:
    found = whole.results()["beta3"]
    plain, own, training = found["trajectory"], found["converged"], found["training"]
    assert plain["iterations"] == list(range(51)) and len(plain["psnr_mean"]) == len(plain["gradients_mean"]) == 51
    assert plain["psnr_mean"][0] == pytest.approx(own["psnr_mean"][0])
    assert all(b >= a for a, b in zip(plain["gradients_mean"], plain["gradients_mean"][1:], strict=False))
    assert plain["gradients_mean"][0] == 1.0
    assert own["psnr_mean"][-1] == pytest.approx(found["psnr_mean"], abs=1e-6)
    assert [s["folder"] for s in training["stages"]] == ["1", "2"] and training["steps"] == 20
    assert training["curve"]["step"][-1] == 20 and len(training["curve"]["loss"]) <= POINTS
    logged = [json.loads(t) for t in (whole.folder / "out/rows/beta3/2/metrics.jsonl").read_text().splitlines()]
    assert training["stages"][1]["seconds"] == pytest.approx(sum(d.get("seconds", 0.0) for d in logged))
    estimate = found["lipschitz"]
    assert len(estimate["beta_hat"]) == 6 and estimate["beta_hat_train"] > 0
    for low, high, ascended in zip(estimate["lambda_min"], estimate["lambda_max"], estimate["beta_hat"], strict=True):
        assert low <= high
        assert ascended > 0.5 * max(abs(low), abs(high))


def test_a_row_is_evaluated_as_the_command_does(whole: Shell) -> None:
    found = whole.results()["beta1"]
    weights = "out/rows/beta1/weights.safetensors"
    options = ("--weights", weights, "--data", "pictures", "--validation", "2", "--max-iterations", "20", "--json")
    code = "from deepreg_fast.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "evaluate", *options],
        capture_output=True,
        text=True,
        cwd=whole.folder,
        env=whole.env,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["bilevel"]["psnr"] == found["psnr"]
    assert told["bilevel"]["gradients"] == found["gradients"]


def test_nothing_tells_of_the_machine(whole: Shell) -> None:
    texts = [whole.folder / "out" / f"{n}" for n in ("results.json", "results.csv", "settings.json")]
    texts += list((whole.folder / "out/rows").glob("*/*.json"))
    texts += list((whole.folder / "out/rows").rglob("*.safetensors"))
    assert len(texts) > 15
    for path in texts:
        data = path.read_bytes()
        assert str(whole.folder).encode() not in data and str(Path.home()).encode() + b"/" not in data, path


def test_the_csv_has_a_line_for_each_row(whole: Shell) -> None:
    with open(whole.folder / "out/results.csv", newline="") as f:
        lines = list(csv.DictReader(f))
    assert [d["name"] for d in lines] == [r["name"] for r in TINY["row"]]
    by_name = whole.results()
    for d in lines:
        assert float(d["psnr_mean"]) == by_name[d["name"]]["psnr_mean"]


def test_what_is_finished_is_not_done_again(whole: Shell) -> None:
    def times() -> dict[Path, int]:
        return {p: p.stat().st_mtime_ns for p in (whole.folder / "out/rows").rglob("*") if p.is_file()}

    before = times()
    (whole.folder / "out/report.html").unlink()
    done = whole.run("--report-only", report=True)
    assert (whole.folder / "out/report.html").stat().st_size > 100_000
    assert done.returncode == 0 and times() == before
    done = whole.run()
    assert done.returncode == 0 and times() == before, done.stderr
    assert "begins" not in done.stderr


@pytest.mark.parametrize(
    "moments",
    [
        ("beta1/train/metrics.jsonl", "beta3/2/metrics.jsonl"),
        pytest.param(
            (
                "beta1",
                "beta1/train/metrics.jsonl",
                "beta1/train/weights.safetensors",
                "beta3/1/metrics.jsonl",
                "beta3/2",
                "beta3/2/metrics.jsonl",
                "beta3/weights.safetensors",
                "beta1/result.json",
            ),
            marks=pytest.mark.long,
        ),
    ],
    ids=("twice", "again and again"),
)
def test_a_run_that_is_killed(whole: Shell, shell: Shell, moments: tuple[str, ...]) -> None:
    """SIGKILL for the whole group where a file has come; the results are those of the run that was left alone."""
    rows = ("--rows", "beta3,tv")
    for moment in moments:
        # It waits before its last file: no machine is too fast for the kill.
        process = shell.start(*rows, TEST_ENDLESS="1")
        while not (shell.folder / "out/rows" / moment).exists():
            assert process.poll() is None, (moment, process.stderr and process.stderr.read())
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    assert not (shell.folder / "out/results.json").exists()
    done = shell.run(*rows)
    assert done.returncode == 0, done.stderr
    found, wanted = shell.results(), whole.results()
    assert set(found) == {"tv", "beta1", "beta3"}
    for name in found:
        assert timeless(found[name]) == timeless(wanted[name])


def test_a_stop_leaves_checkpoints_and_no_process(shell: Shell) -> None:
    shell.settings(only("beta1") | {"defaults": {"bilevel": {**SMALL, "steps": 1_000_000, "validate_every": 0}}})
    process = shell.start_processes()
    log = shell.folder / "out/rows/beta1/train/metrics.jsonl"
    while not (log.exists() and len(log.read_text().splitlines()) > 3):
        assert process.poll() is None, process.stderr and process.stderr.read()
        time.sleep(0.1)
    process.terminate()
    assert process.wait() == 130
    assert process.stderr is not None and "the same command goes on from here" in process.stderr.read()
    steps = json.loads(log.read_text().splitlines()[-1])["step"]
    from deepreg_fast.training.checkpoint import load_checkpoint

    assert load_checkpoint(log.with_name("last.safetensors"))[1]["step"] == steps
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


def test_a_reproduction_of_another_problem(shell: Shell) -> None:
    done = shell.run("--rows", "tv,beta1", "--problem", "inpaint", "--sigma", "0.01", report=True)
    assert done.returncode == 0, done.stderr
    results = shell.results()
    assert set(results) == {"tv", "beta1"} and all(r["problem"]["problem"] == "inpaint" for r in results.values())
    assert results["beta1"]["ratio"] == 1.0 and results["tv"]["psnr_mean"] > 15.0
    text = (shell.folder / "out/report.html").read_text(encoding="utf-8")
    assert "Measurements of" in text and ">Worst: " in text
    assert shell.run("--rows", "tv", "--problem", "nonsense").returncode == 2


def test_two_reproductions_refuse_each_other(shell: Shell) -> None:
    with locked(shell.folder / "out/lock", "The reproduction"):
        done = shell.run()
    assert done.returncode == 2
    assert re.fullmatch(
        r"deepreg-fast: The reproduction in out must be written by one process at a time, but another one is at work "
        r"there; wait for it, or name another folder with --out\.\n",
        done.stderr,
    )


def test_a_failing_row_does_not_stop_the_others(shell: Shell) -> None:
    shell.settings(table(beta1={"train": {"crop": 64}}, red=None, tv=None))
    done = shell.run()
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "beta1 training failed: Training crops must fit the images, but crop is 64" in done.stderr
    assert "beta3 training failed: it needs 'beta1 training', which failed." in done.stderr
    assert set(shell.results()) == {"adjoint", "minimum-norm"}


def test_a_full_disk_is_a_sentence_and_what_is_there_stays(whole: Shell, shell: Shell) -> None:
    shell.settings(only("tv", "beta1"))
    done = shell.run(TEST_FULL_DISK="4")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert re.search(
        r"(full; free space and run the same command again|No space left on device; free space)", done.stderr
    )
    done = shell.run()
    assert done.returncode == 0, done.stderr
    for name, found in shell.results().items():
        assert timeless(found) == timeless(whole.results()[name])


def test_vanished_images_are_a_sentence(shell: Shell) -> None:
    shell.settings(only("adjoint"))
    assert shell.run().returncode == 0
    shutil.rmtree(shell.folder / "pictures")
    done = shell.run()
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "There is no data folder pictures" in done.stderr
    assert set(shell.results()) == {"adjoint"}
    # In the middle of a run it is a child that meets it.
    job = Job("out", "adjoint", -1)
    child = subprocess.Popen(
        job.argv(), stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=shell.folder, env=shell.env
    )
    assert child.wait(600) == FATAL
    assert child.stderr is not None and "There is no data folder pictures" in child.stderr.read()
    with pytest.raises(DataError):
        dr.data.image_names(shell.folder / "pictures")  # type: ignore[attr-defined]
