"""The benchmark checks answers before it times them, and knows when its times mean nothing."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import deepreg_fast as dr
from deepreg_fast import bench
from deepreg_fast.bench import peers, peers_deepinv, peers_learned, timing
from deepreg_fast.bench import runner as running
from deepreg_fast.bench.calibrate import loosest
from deepreg_fast.bench.workload import Case, flat
from deepreg_fast.cli import app
from deepreg_fast.errors import InputError
from deepreg_fast.inverse.adjoint import adjoint_named, solve_adjoint

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
    (result,) = bench.run(bench.Workload(), ["c"], rounds=5)
    assert result.wrong is not None and ("peer" if fault == "peer" else "ours") in result.wrong
    assert (result.timing is None) == (fault != "late")


@needs_kernels
@pytest.mark.parametrize("name", list(bench.CASES))
@pytest.mark.parametrize("norm", ["none", "pixel"])
def test_every_case_agrees_with_float64(name: str, norm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_compiler(reg: dr.RED) -> None:
        raise RuntimeError("half a minute is too long for a test")

    monkeypatch.setattr(peers, "compiled_grad", no_compiler)
    for case in bench.CASES[name](bench.Workload(2, 24, 16, 3, norm)):
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


@pytest.mark.parametrize(
    ("target", "tolerance"), [(2.2e-4, 2.15e-4), (1.1e-4, 1e-4), (1.0, 1e-2), (4.7e-3, 4.64e-3), (1e-12, 1e-7)]
)
def test_a_peer_gets_the_loosest_tolerance_that_answers_as_well(target: float, tolerance: float) -> None:
    found = loosest(lambda t: t, target)
    assert found.tolerance == pytest.approx(tolerance, rel=0.01)
    assert (found.error <= target) == (target > 1e-12)


def test_a_peer_that_answers_nan_reaches_nothing() -> None:
    assert loosest(lambda t: float("nan"), 1.0).error == float("inf")


@pytest.mark.parametrize("norm", ["none", "pixel"])
def test_what_is_solved_has_a_solution(norm: str) -> None:
    """A system on which CG stops at negative curvature would be timed for giving up."""
    p = bench.Workload(2, 48, 16, 3, norm)
    xs, A, mu = p.images(1), dr.SRM((1, 48, 48)), torch.full((2,), 0.1)

    def status(reg: dr.RED) -> list[int]:
        return solve_adjoint(
            reg.linearize(xs[0]), A, mu, p.images(2)[0], adjoint_named("cg", 200, 1e-4)
        ).status.tolist()

    assert status(p.solvable(xs, 0.9)) == [int(dr.Status.CONVERGED)] * 2
    if norm == "pixel":
        assert status(p.regularizer()) == [int(dr.Status.NEGATIVE_CURVATURE)] * 2


@needs_kernels
@pytest.mark.skipif(
    peers_deepinv.unsupported_reason() is not None, reason=f"deepinv: {peers_deepinv.unsupported_reason()}"
)
@pytest.mark.parametrize(
    ("name", "peer"), [("cg", "deepinv, CG"), ("cg", "deepinv, MINRES"), ("recover", "deepinv, PGD")]
)
def test_deepinv_answers_as_well_as_ours(name: str, peer: str) -> None:
    (case,) = bench.CASES[name](bench.Workload(2, 24))
    errors = running._errors(case)
    assert case.tolerance is not None and errors[peer] <= case.tolerance and not case.missing
    assert "tolerance" in case.notes[peer]


def test_missing_peers_say_how_to_get_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepinv.optim", None)
    reason = peers_deepinv.unsupported_reason()
    assert reason is not None and "torchvision" in reason
    assert "git clone" in (peers_learned.unsupported_reason(None) or "")
    assert "deepinv" in (peers_learned.unsupported_reason(Path("anywhere")) or "")


def test_a_path_that_is_no_checkout_is_one_sentence(tmp_path: Path) -> None:
    arguments = ["bench", "--cases", "step", "--learned-regularizers", str(tmp_path)]
    error = CliRunner().invoke(app, arguments).exception
    assert isinstance(error, InputError) and "\n" not in str(error)
    for word in ("training_methods/bilevel_training.py", str(tmp_path), "clone https://"):
        assert word in str(error)


FAKE = """
import torch


def bilevel_training(prior, physics, fidelity, mu, train, val, lower_level_tol_train, minres_tol, lr, **more):
    assert len(val) == 1 and not list(val) and lr == 0
    print("chatter")
    (x,) = train
    y = physics(x)
    grad = lambda z: physics.A_adjoint_A(z) - physics.A_adjoint(y) + mu * prior.grad(z)
    z = physics.A_dagger(y)
    for _ in range(600):
        z = z - 0.8 * grad(z).detach()
    z = z.detach().requires_grad_()
    g, b = grad(z), 2 * (z - x).detach() / len(x)
    q = torch.zeros_like(b)
    for _ in range(600):
        q = q + 0.8 * (b - torch.autograd.grad(g, z, q, retain_graph=True)[0])
    for p in prior.parameters():
        p.grad = -torch.autograd.grad(g, p, q, retain_graph=True)[0]
"""


@pytest.fixture(name="checkout")
def _checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two files that are called like theirs, and as much of deepinv as the wrapping needs."""
    for name, text in (("training_methods/bilevel_training.py", FAKE), ("evaluation/nmAPG.py", "")):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(text)

    class LinearPhysics:
        def __call__(self, x: torch.Tensor) -> torch.Tensor:
            return self.A(x)  # type: ignore[attr-defined]

    class Stub:
        pass

    stub = Stub()
    stub.LinearPhysics, stub.L2 = LinearPhysics, Stub  # type: ignore[attr-defined]
    for name in ("deepinv.physics", "deepinv.optim"):
        monkeypatch.setitem(sys.modules, name, stub)
    monkeypatch.setattr(peers_deepinv, "unsupported_reason", lambda: None)
    return tmp_path


def test_a_checkout_is_called_for_our_gradient(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = sys.modules.setdefault("evaluation", sys)  # a module of the same name stays where it is
    assert peers_learned.check(checkout) == checkout.resolve() and peers_learned.unsupported_reason(checkout) is None
    p = bench.Workload(2, 16, 4)
    (x, *_), A = p.images(5), dr.SRM((1, 16, 16))
    reg = p.solvable([x], 0.9)
    got = peers_learned.Learned(checkout, reg, A, 0.1).step(x, 1e-4, 1e-4)
    expected = dr.hypergradient(x, A.A(x), A, reg, 0.1).theta
    assert [g.shape for g in got] == [e.shape for e in expected.values()]
    want = flat(list(expected.values()))
    assert float((flat(got) - want).norm() / want.norm()) < 1e-3
    assert all(q.grad is None for q in reg.parameters()) and capsys.readouterr().out == ""
    assert sys.modules["evaluation"] is mine and "training_methods" not in sys.modules
    assert str(checkout) not in sys.path
    del sys.modules["evaluation"]
