"""The benchmark checks answers before it times them, and knows when its times mean nothing."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import deepreg_fast as dr
from deepreg_fast import bench
from deepreg_fast.bench import peers, timing
from deepreg_fast.bench import runner as running
from deepreg_fast.bench.cases import Case
from deepreg_fast.cli import app

needs_kernels = pytest.mark.skipif(dr.backends()["cpu"] is not None, reason="the C++ extension is not built")


def test_ratios_are_those_of_paired_rounds() -> None:
    drift = np.linspace(1, 3, 21)
    r = bench.ratio(2.0 * drift, drift)
    assert (r.median, r.low, r.high) == (2.0, 2.0, 2.0)
    noisy = bench.ratio(np.r_[np.full(15, 2.0), np.full(6, 9.0)], np.ones(21))
    assert noisy.low <= noisy.median == 2.0 <= noisy.high


@pytest.mark.parametrize(("same", "planted", "word"), [(1.0, 1.1, None), (1.06, 1.1, "twice"), (1.0, 1.01, "planted")])
def test_a_run_that_cannot_see_ten_percent_is_void(same: float, planted: float, word: str | None) -> None:
    ours = np.random.default_rng(0).normal(1.0, 0.01, 41)
    found = timing._void({"ours": ours, timing.CONTROL: same * ours, timing.PLANTED: planted * ours})
    assert found is None if word is None else found is not None and word in found


def test_candidates_take_turns_with_rotating_inputs() -> None:
    seen: dict[str, list[int]] = {"ours": [], "peer": []}
    found = bench.interleave({n: lambda k, n=n: seen[n].append(k) for n in seen}, 5)
    assert set(found.seconds) == {"ours", "peer", timing.CONTROL, timing.PLANTED}
    assert all(len(s) == 5 and (s > 0).all() for s in found.seconds.values())
    # The last round's repeated calls each took the next input.
    assert set(seen["peer"]) >= set(range(5)) and seen["peer"][-2:] == [max(seen["peer"]) - 1, max(seen["peer"])]


@pytest.mark.parametrize("fault", ["ours", "peer", "nan", "late"])
def test_a_wrong_answer_is_never_timed(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = [torch.ones(4, dtype=torch.float64)] * 3
    calls = {"ours": 0}

    def ours(k: int) -> torch.Tensor:
        calls["ours"] += 1
        wrong = fault == "ours" or (fault == "late" and calls["ours"] > 10)
        return torch.full((4,), torch.nan if fault == "nan" else 1.1 if wrong else 1.0)

    candidates = {
        "ours": ours,
        "judge": lambda k: torch.ones(4),
        "peer": lambda k: torch.full((4,), 1.0 + (fault == "peer")),
    }
    case = Case("c", candidates, exact, judge="judge")
    monkeypatch.setattr(running, "CASES", {"c": lambda problem: iter([case])})
    (result,) = bench.run(bench.Problem(), ["c"], rounds=5)
    assert result.wrong is not None and ("peer" if fault == "peer" else "ours") in result.wrong
    assert (result.timing is None) == (fault != "late")


@needs_kernels
@pytest.mark.parametrize("name", list(bench.CASES))
@pytest.mark.parametrize("norm", ["none", "pixel"])
def test_every_case_agrees_with_float64(name: str, norm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_compiler(reg: dr.RED) -> None:
        raise RuntimeError("half a minute is too long for a test")

    monkeypatch.setattr(peers, "compiled_grad", no_compiler)
    for case in bench.CASES[name](bench.Problem(2, 24, 16, 3, norm)):
        assert "half a minute" in case.missing.get("torch.compile", "") or name != "gradient"
        assert running._judge(case, running._errors(case)) is None
        assert case.candidates.keys() >= {"ours", "torch, reference"}


@needs_kernels
def test_the_command(tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["bench", "--cases", "hvp,walsh", "--rounds", "3", "--batch", "2", "--size", "24", "--out", str(out)]
    answer = CliRunner().invoke(app, arguments)
    assert answer.exit_code == 0 and "walsh prox" in answer.output and "GFLOP/s" in answer.output
    found = json.loads((out / "results.json").read_text())
    assert set(found["cases"]) == {"hvp", "walsh forward", "walsh adjoint", "walsh prox"}
    assert found["machine"]["torch"] == torch.__version__ and found["bounds"]["copy"] > 0
    lines = list(csv.DictReader((out / "results.csv").open()))
    assert {line["candidate"] for line in lines} >= {"ours", "torch, best", "a copy of the image"}
    assert (out / "roofline.svg").read_text().startswith("<svg")
    assert CliRunner().invoke(app, ["bench", "--cases", "nothing"]).exit_code != 0
