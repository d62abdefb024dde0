"""The shipped weights: their cards, how they are found by name, and what they recover."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

import deepreg_fast as dr
from deepreg_fast.cli.options import default_mu, pgd_options, unlike_training
from deepreg_fast.data import bsd400_registry, bsd400_split, embedded_images, split_sha256
from deepreg_fast.errors import CheckpointError, InputError
from deepreg_fast.evaluation.compare import Method, run
from deepreg_fast.evaluation.tuning import tuned_tv
from deepreg_fast.inverse.data_term import LAM
from deepreg_fast.problem import Problem
from deepreg_fast.weights import cards

from .helpers import random_red
from .test_cli import Run, _run  # noqa: F401 - the fixture `run`

ROOT = Path(__file__).parents[1]
NAME = "cs5-beta10"

ABSOLUTE = re.compile(r"(?<![\w./:])(~?/|[A-Za-z]:\\)\w")


def strings(value: Any) -> list[str]:
    """Every string in a JSON value, keys too."""
    if isinstance(value, dict):
        return [s for k, v in value.items() for s in (k, *strings(v))]
    if isinstance(value, list):
        return [s for v in value for s in strings(v)]
    return [value] if isinstance(value, str) else []


def header(path: Path) -> dict[str, Any]:
    with safe_open(path, framework="pt") as f:
        return {k: json.loads(v) if v.startswith(("{", "[")) else v for k, v in f.metadata().items()}


@pytest.fixture(name="script", scope="module")
def _script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("ship_weights", ROOT / "benchmarks/ship_weights.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", cards.names())
def test_card(name: str) -> None:
    card = cards.card(name)
    assert list(card) == list(cards.FIELDS) and card["name"] == name
    reg, meta = dr.load(name)
    assert meta["card"] == card and meta["mu"] == card["mu"] > 0 and meta["method"] == "bilevel"
    assert card["parameters"] == sum(p.numel() for p in reg.parameters())
    assert card["split_sha256"] == split_sha256("bsd400")
    assert card["data"] == {"name": "BSD400", "images": 370, "test_images": 30}
    last = card["settings"][-1]
    assert set(last) <= set(json.loads(dr.BilevelConfig().to_json()))
    assert card["operator"]["ratio"] == last["ratio"] and card["operator"]["seed"] == last["operator_seed"]
    tv = card["psnr"]["vs_tv"]
    assert tv["interval"][0] < tv["mean"] < tv["interval"][1] and tv["images"] == 30 and 0 <= tv["wins"] <= 30
    assert 20 < card["psnr"]["mean"] < 40 and 0.5 < card["ssim"]["mean"] < 1
    assert card["lipschitz"]["lambda_min"] < card["lipschitz"]["lambda_max"]
    assert re.fullmatch(r"[0-9a-f]{40}", card["commit"]) and "MIT" in card["licence"] and "Nair" in card["citation"]
    for text in ("title", "command", "version"):
        assert card[text]


@pytest.mark.parametrize("name", cards.names())
def test_expectations_cover_what_users_change(name: str) -> None:
    rows = cards.card(name)["expectations"]
    assert all(set(cards.EXPECTATION) <= set(r) for r in rows)
    assert {0.1, 0.5} <= {r["ratio"] for r in rows}
    assert len({r["operator_seed"] for r in rows}) > 1 and max(r["sigma"] for r in rows) > 0
    assert len({tuple(r["size"]) for r in rows}) > 1
    assert all(5 < r[k] < 60 for r in rows for k in ("psnr_mean", "tv_psnr_mean"))


def test_files_are_small_and_name_no_machine() -> None:
    assert NAME in cards.names()
    for name in cards.names():
        path = cards.find(name)
        assert path is not None and path.stat().st_size < 100_000
        found = [s for s in strings(header(path)) if ABSOLUTE.search(s)]
        assert not found, found
    assert ABSOLUTE.search("train --out /home/me/runs") and not ABSOLUTE.search("ratio 1/5, https://a.org/b")


def test_recovers_embedded_photographs_better_than_tuned_tv() -> None:
    train, test = embedded_images(96)
    x, tuning = test.x, train.x[::18]
    A = dr.SRM((1, 96, 96), 0.2)
    reg, meta = dr.load(NAME)
    ours = run(Method("ours", reg, meta["mu"]), A.A(x), A)
    tv = run(tuned_tv(tuning, A.A(tuning), A), A.A(x), A)
    assert isinstance(ours, dr.Solution) and isinstance(tv, dr.Solution)
    assert dr.psnr(ours.x, x).mean() > dr.psnr(tv.x, x).mean()
    assert dr.psnr(ours.x, x).min() > 25


def test_a_file_comes_before_a_shipped_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / NAME).mkdir()
    assert "card" in dr.load(NAME)[1]
    (tmp_path / NAME).rmdir()
    dr.save(random_red(), NAME, {"mine": True})
    assert dr.load(NAME)[1] == {"mine": True}


def test_what_is_no_name() -> None:
    for call in (dr.load, cards.card):
        with pytest.raises(CheckpointError, match=rf"one of the shipped .*{NAME}.*'cs5-beta11' is neither"):
            call("cs5-beta11")
    for path in ("./cs5-beta10", "cs5-beta10.safetensors", f"{NAME}/"):
        with pytest.raises(CheckpointError, match="there is none at|is neither"):
            dr.load(path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": "deepreg-fast-weights-2", "version": "9.1"}, r"newer format 2 of deepreg-fast 9\.1; update"),
        ({"format": "deepreg-fast-weights-0"}, "older format 0 .* release that knows both"),
        ({"format": "other"}, "its format is 'other'"),
        ({"regularizer": "{"}, "must contain its regularizer and meta as JSON"),
        (
            {"regularizer": '{"kind": "red", "colour": 3}', "version": "9.1"},
            r"written by deepreg-fast 9\.1 and this is",
        ),
        ({"regularizer": '{"kind": "red", "colour": 3}'}, "does not fit its class"),
    ],
)
def test_other_releases(tmp_path: Path, change: dict[str, str], words: str) -> None:
    path = tmp_path / "w.safetensors"
    dr.save(random_red(double=False), path)
    with safe_open(path, framework="pt") as f:
        told = f.metadata()
    save_file({"a": torch.zeros(1)}, path, {**told, **change})
    with pytest.raises(InputError, match=words):
        dr.load(path)


def test_mu_where_the_noise_is_larger() -> None:
    card = {**dict.fromkeys(cards.FIELDS), "lam": 40.0, "operator": {"ratio": 0.2, "sigma": 0.0}}
    meta = {"mu": 1e-3, "card": card}
    assert default_mu(meta, 0.0) == default_mu(meta, 1e-3) == 1e-3
    assert default_mu(meta, 0.05) == pytest.approx(0.1)
    assert default_mu({"mu": 1e-3, "card": "mine"}, 0.05) == pytest.approx(LAM * 0.05**2)
    assert default_mu({}, 0.0) == 1e-2
    assert default_mu({"mu": 1e-3, "config": {"sigma": 0.01}}, 0.05) == pytest.approx(0.025)
    # 1843 of 9216 is as near to 0.2 as a number of measurements comes.
    assert unlike_training(meta, Problem(ratio=1843 / 9216)) == ""
    assert unlike_training(meta, Problem(ratio=0.5, sigma=0.05)) == "ratio 0.5 instead of 0.2, sigma 0.05 instead of 0"
    assert unlike_training({"config": {"sigma": 0.1}}, Problem(ratio=0.5, sigma=0.1)) == ""
    assert unlike_training({}, Problem(sigma=1.0)) == ""
    assert unlike_training(meta, Problem("sr2")) == "problem sr2 instead of cs"


def test_info_lists_them_and_prints_a_card(run: Run) -> None:
    found = json.loads(run("info", "--json").out)["weights"]
    assert set(found) == set(cards.names())
    text = run("info").out
    card = cards.card(NAME)
    assert re.search(rf"{NAME} .*0\.2 .*{card['psnr']['mean']:.2f} dB", text)
    assert json.loads(run("info", NAME, "--json").out) == card
    page = run("info", NAME).out
    for word in (card["title"], card["commit"], card["citation"], f"wins {card['psnr']['vs_tv']['wins']} of 30"):
        assert word in page
    for row in card["expectations"]:
        assert f"{row['psnr_mean']:.2f}" in page
    unknown = run("info", "cs5-beta11")
    assert unknown.code == 2 and NAME in unknown.err and unknown.out == ""


def test_weights_tell_how_they_are_recovered() -> None:
    card = cards.card(NAME) | {"recovery": {"acceleration": "anderson", "memory": 10, "max_iterations": 3}}
    assert pgd_options({"card": card}, "", 0, tolerance=1e-3) == dr.PGDOptions(3, 1e-3, "anderson", memory=10)
    assert pgd_options({"card": card}, "fista", 7) == dr.PGDOptions(7, acceleration="fista")
    assert pgd_options({}, "", 0) == dr.PGDOptions(500, acceleration="fista")


def test_recover_and_evaluate_by_name(run: Run, tmp_path: Path) -> None:
    picture = tmp_path / "p.png"
    x = (embedded_images(64).held_out.x[0, 0] * 255).round().byte().numpy()
    Image.fromarray(x).save(picture)
    for sigma, lam in ((0.0, 0.0), (0.1, cards.card(NAME)["lam"] or 0.0)):
        out = tmp_path / str(sigma)
        answer = run("recover", picture, "--weights", NAME, "--sigma", sigma, "--max-iterations", 60, "--out", out)
        assert answer.code == 0 and ("trained for another problem" in answer.err) == (sigma > 0)
        mu = json.loads((out / "results.json").read_text())["mu"]
        assert mu == max(cards.card(NAME)["mu"], lam * sigma**2)
    common = ("evaluate", "--crop", 32, "--limit", 1, "--validation", 1, "--max-iterations", 30, "--json")
    answer = run(*common, "--weights", NAME, "--weights", cards.find(NAME))
    assert answer.code == 0 and answer.err == ""
    result = json.loads(answer.out)
    assert {NAME, f"{NAME}:weights"} <= set(result) and result[NAME]["mu"] == cards.card(NAME)["mu"]
    for command in ("recover", "evaluate"):
        unknown = run(command, *([picture] if command == "recover" else []), "--weights", "cs5-beta11")
        assert unknown.code == 2 and NAME in unknown.err and unknown.out == ""


def test_tune_mu_tunes_what_was_trained_bilevel(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    told = {"method": "bilevel", "mu": 1e-4, "config": {"ratio": 0.2, "sigma": 0.2}}
    dr.save(dr.load(NAME)[0], path, told)
    common = ("evaluate", "--weights", path, "--crop", 32, "--limit", 1, "--validation", 1, "--max-iterations", 30)
    noisy = (*common, "--sigma", 0.2, "--ratio", 0.5, "--json")
    kept, tuned = run(*noisy), run(*noisy, "--tune-mu")
    assert "ratio 0.5 instead of 0.2" in kept.err and "sigma" not in kept.err and tuned.err == ""
    mu, better = (json.loads(a.out)["bilevel"]["mu"] for a in (kept, tuned))
    assert mu == 1e-4 < better


def test_evaluate_knows_bsd400_by_its_names(run: Run, tmp_path: Path) -> None:
    for name in bsd400_registry():
        Image.new("L", (16, 16), 130).save(tmp_path / name)
    common = ("evaluate", "--data", tmp_path, "--validation", 1, "--limit", 2, "--json")

    def taken(*more: object) -> tuple[list[str], str]:
        answer = run(*common, *more)
        assert answer.code == 0
        return json.loads(answer.out)["settings"]["images"], answer.err

    wanted, all_of_them = list(bsd400_split().test[:2]), ["test_001.png", "test_002.png"]
    names, told = taken()
    assert names == wanted and "BSD400" in told and "--split none" in told
    assert taken("--split", "bsd400") == (wanted, "")
    assert taken("--split", "none") == (all_of_them, "")
    (tmp_path / "test_400.png").rename(tmp_path / "z.png")
    assert taken() == (all_of_them, "")


@pytest.fixture(name="row")
def _row(tmp_path: Path) -> Path:
    """A row's folder as a reproduction leaves it, with the paths of its machine."""
    row = tmp_path / "rows" / "tiny"
    config = {"out": "/home/me/rows/tiny/stage-1", "data": "/data/BSD400", "split": "bsd400", "init": "/home/me/w.st"}
    stages = [
        {"folder": "x", "config": json.loads(dr.BilevelConfig(**{**config, "steps": n}).to_json())} for n in (3, 5)
    ]
    dr.save(random_red(double=False), row / "weights.safetensors", {"method": "bilevel", "mu": 0.3, "step": 5})
    result = {
        **{
            "psnr_mean": 25.0,
            "psnr_median": 24.0,
            "ssim_mean": 0.7,
            "ssim": [0.6, 0.7, 0.9],
            "mu": 0.25,
            "scale": None,
            "version": "0.1.0",
        },
        "problem": {"data": "/data/BSD400"},
        "vs_tv": {"mean": 1.23456789, "median": 1.0, "interval": [0.5, 2.0], "wins": 2, "images": 3},
        "lipschitz": {
            "beta_hat_train": 1.0,
            "beta_hat": [1.0, 2.0],
            "lambda_min": [-3, -1.0],
            "lambda_max": [0.5, 1.5],
        },
        "training": {"seconds": 9.0, "stages": stages},
        "recovery": {"acceleration": "anderson", "max_iterations": 500, "tolerance": 1e-4},
        "command": "deepreg-fast reproduce --data /data/BSD400 --out=/home/me/out",
    }
    (row / "result.json").write_text(json.dumps(result))
    entry = {
        "what": "others",
        "images": 3,
        "size": [96, 96],
        "ratio": 0.2,
        "operator_seed": 1,
        "sigma": 0.0,
        "mu": 0.25,
    }
    told = [{**entry, "psnr_mean": 24.0, "tv_psnr_mean": 23.0, "minimum_norm_psnr_mean": 14.0}]
    (row / "generalization.json").write_text(json.dumps(told))
    return row


def test_ship(script: ModuleType, row: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cards, "FOLDER", tmp_path / "shipped")
    monkeypatch.setattr(script, "_commit", lambda: "0" * 40)
    path = script.ship(row, "tiny", "a tiny one", 40.0)
    assert path == tmp_path / "shipped" / "tiny.safetensors" and cards.names() == ("tiny",)
    reg, meta = dr.load("tiny")
    wanted, _ = dr.load(row / "weights.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(reg.parameters(), wanted.parameters(), strict=True))
    card = cards.card("tiny")
    assert list(card) == list(cards.FIELDS) and meta["mu"] == card["mu"] == 0.25 and card["lam"] == 40.0
    assert not [s for s in strings(header(path)) if ABSOLUTE.search(s)]
    assert [s["steps"] for s in card["settings"]] == [3, 5]
    places = {"out": "stage-1", "data": "BSD400", "split": "bsd400", "init": "w.st"}
    assert all(card["settings"][0][k] == v for k, v in places.items())
    assert card["command"] == "deepreg-fast reproduce --data BSD400 --out=out"
    assert card["psnr"] == {"mean": 25.0, "median": 24.0, "vs_tv": {**card["psnr"]["vs_tv"], "mean": 1.2346}}
    assert card["ssim"] == {"mean": 0.7, "median": 0.7} and card["expectations"][0]["minimum_norm_psnr_mean"] == 14.0
    lip = card["lipschitz"]
    assert (lip["beta_hat"], lip["lambda_min"], lip["lambda_max"]) == ({"mean": 1.5, "max": 2.0}, -3, 1.5)


def test_ship_refuses(script: ModuleType, row: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cards, "FOLDER", tmp_path / "shipped")
    result, told = (json.loads((row / f"{n}.json").read_text()) for n in ("result", "generalization"))
    for file, changed, words in (
        ("result", {**result, "scale": 1.3}, "rescaled"),
        ("result", {k: v for k, v in result.items() if k != "recovery"}, "must tell 'recovery'"),
        ("generalization", [{k: v for k, v in told[0].items() if k != "mu"}], r"must tell \['mu'\]"),
    ):
        (row / f"{file}.json").write_text(json.dumps(changed))
        with pytest.raises(InputError, match=words):
            script.ship(row, "tiny", "a tiny one")
        (row / "result.json").write_text(json.dumps(result))
    (row / "generalization.json").unlink()
    with pytest.raises(InputError, match="must be a JSON file"):
        script.ship(row, "tiny", "a tiny one")
    with pytest.raises(InputError, match="A name must be"):
        script.ship(row, "../tiny", "a tiny one")
    assert not (tmp_path / "shipped").exists()
