"""Outputs beside inputs, and measurement files as they come: damaged, in float64, with endings in capitals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import deepreg_fast as dr
from deepreg_fast.cli.options import default_mu, pgd_options
from deepreg_fast.errors import DataError, InputError
from deepreg_fast.inverse.measurements import FORMAT, load_measurements, save_measurements

from .helpers import images, random_red
from .test_cli import Run, _run, _weights

__all__ = ["_run", "_weights"]


def _picture(path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 255, (24, 28), dtype=np.uint8)
    Image.fromarray(pixels).save(path, format="PNG")
    return path


def _files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("name", ["picture.png", "picture.PNG", "figure.png", "Figure.jpg", "results.png"])
@pytest.mark.parametrize("place", [".", "sub/..", "link"])
def test_recover_does_not_write_over_its_source(run: Run, weights: Path, tmp_path: Path, name: str, place: str) -> None:
    (tmp_path / "d" / "sub").mkdir(parents=True)
    (tmp_path / "d" / "link").symlink_to(tmp_path / "d")
    source = _picture(tmp_path / "d" / name)
    before = _files(tmp_path / "d")
    answer = run("recover", source, "--weights", weights, "--out", tmp_path / "d" / place, "--max-iterations", 2)
    assert answer.code == 2 and "name another --out or rename the source" in answer.err, answer
    assert _files(tmp_path / "d") == before


def test_recover_next_to_its_source_where_no_name_is_the_same(run: Run, weights: Path, tmp_path: Path) -> None:
    source = tmp_path / "picture.jpg"
    shutil.copy(_picture(tmp_path / "a.png"), source)
    before = source.read_bytes()
    answer = run("recover", source, "--weights", weights, "--out", tmp_path, "--max-iterations", 2)
    assert answer.code == 0 and (tmp_path / "picture.png").exists() and source.read_bytes() == before


def test_recover_whose_folder_is_a_file(run: Run, weights: Path, tmp_path: Path) -> None:
    A = dr.SRM((1, 16, 16), 0.5)
    save_measurements(tmp_path / "m.npz", A.A(images(1, 1, 16, 16, dtype=torch.float32)), A)
    before = _files(tmp_path)
    answer = run("recover", tmp_path / "m.npz", "--weights", weights, "--out", tmp_path / "m.npz")
    assert answer.code == 2 and "must be a folder" in answer.err and _files(tmp_path) == before


def test_evaluate_does_not_write_over_what_it_reads(run: Run, weights: Path, tmp_path: Path) -> None:
    folder = tmp_path / "d"
    folder.mkdir()
    for i in range(3):
        _picture(folder / f"{i}.png")
    (tmp_path / "split.json").write_text(json.dumps({"train": ["0.png", "1.png"], "test": ["2.png"]}))
    before = _files(tmp_path)
    common = ("evaluate", "--data", folder, "--split", tmp_path / "split.json", "--weights", weights, "--validation", 1)
    for out in (weights, tmp_path / "split.json", folder / "1.png", folder / "1.PNG"):
        answer = run(*common, "--out", out)
        assert answer.code == 2 and "must not replace inputs" in answer.err, answer
    assert _files(tmp_path) == before


def test_runs_are_not_put_into_the_folder_of_images(run: Run, tmp_path: Path) -> None:
    for i in range(3):
        _picture(tmp_path / f"{i}.png")
    before = _files(tmp_path)
    for command in (("train", "bilevel", "--crop", 16, "--validation", 0), ("reproduce", "--quick")):
        answer = run(*command, "--data", tmp_path, "--out", tmp_path / "." / "")
        assert answer.code == 2 and "another folder" in answer.err, answer
    assert _files(tmp_path) == before


@pytest.mark.parametrize("suffix", [".npz", ".NPZ", ".safetensors", ".SafeTensors"])
def test_float64_measurements_with_float32_weights(run: Run, weights: Path, tmp_path: Path, suffix: str) -> None:
    A, x = dr.SRM((1, 20, 16), 0.5), images(2, 1, 20, 16)
    for dtype in (torch.float64, torch.float32):
        save_measurements(tmp_path / f"{str(dtype)[6:]}{suffix}", A.A(x).to(dtype), A)
    found = []
    for name in ("float64", "float32"):
        out = tmp_path / name
        answer = run("recover", tmp_path / f"{name}{suffix}", "--weights", weights, "--out", out, "--max-iterations", 5)
        assert answer.code == 0, answer.err
        assert ("float64 and the weights float32" in answer.err) == (name == "float64")
        found.append(np.load(out / f"{name}_001.npy"))
    assert found[0].dtype == np.float32 and np.array_equal(found[0], found[1])


def test_float64_weights(run: Run, tmp_path: Path) -> None:
    dr.save(random_red(scale=0.03, channels=2), tmp_path / "w.safetensors", {"mu": 0.05})
    source = _picture(tmp_path / "a.png")
    answer = run(
        *("recover", source, "--weights", tmp_path / "w.safetensors", "--out", tmp_path / "o", "--max-iterations", 3)
    )
    assert answer.code == 0, answer.err
    assert json.loads((tmp_path / "o" / "results.json").read_text())["images"][0]["psnr"] > 0


def _damaged() -> dict[str, dict[str, Any]]:
    A = dr.SRM((1, 8, 8), 0.5)
    good = {
        "y": np.zeros((1, 32), np.float32),
        "format": FORMAT,
        "operator": json.dumps(A.describe()),
        "fingerprint": A.fingerprint(),
        "sigma": "0.0",
    }
    changes: dict[str, dict[str, Any]] = {f"no {k}": {k: None} for k in good}
    changes |= {
        "operator is no JSON": {"operator": "{"},
        "operator is a list": {"operator": "[]"},
        "operator is unknown": {"operator": '{"kind": "ct"}'},
        "operator has a wrong shape": {"operator": json.dumps({**A.describe(), "image_shape": [1, 8]})},
        "operator has a negative size": {"operator": json.dumps({**A.describe(), "image_shape": [1, -8, 8]})},
        "sigma is a text": {"sigma": '"a"'},
        "sigma is negative": {"sigma": "-1"},
        "sigma is NaN": {"sigma": "NaN"},
        "y is a vector": {"y": np.zeros(32, np.float32)},
        "y is of another length": {"y": np.zeros((1, 31), np.float32)},
        "y is whole numbers": {"y": np.zeros((1, 32), np.int64)},
        "y is complex": {"y": np.zeros((1, 32), np.complex64)},
        "y is empty": {"y": np.zeros((0, 32), np.float32)},
        "y is NaN": {"y": np.full((1, 32), np.nan, np.float32)},
    }
    return {name: {**good, **change} for name, change in changes.items()}


@pytest.mark.parametrize("name", list(_damaged()))
def test_damaged_measurements_are_one_sentence(run: Run, weights: Path, tmp_path: Path, name: str) -> None:
    arrays = {k: np.array(v) for k, v in _damaged()[name].items() if v is not None}
    np.savez(tmp_path / "m.npz", allow_pickle=False, **arrays)
    answer = run("recover", tmp_path / "m.npz", "--weights", weights, "--out", tmp_path / "o")
    assert answer.code == 2 and answer.err.startswith("deepreg-fast: ") and answer.err.count("\n") == 1, answer
    assert "Traceback" not in answer.err and not list((tmp_path / "o").glob("*"))


def test_every_truncation_of_a_measurement_file(tmp_path: Path) -> None:
    A = dr.SRM((1, 8, 8), 0.5)
    for suffix in (".npz", ".safetensors"):
        path = tmp_path / f"m{suffix}"
        save_measurements(path, torch.zeros(1, 32), A)
        text = path.read_bytes()
        for n in range(0, len(text), 37):
            path.write_bytes(text[:n])
            with pytest.raises(InputError, match="m"):
                load_measurements(path)


def test_what_cannot_be_measurements_is_not_written(tmp_path: Path) -> None:
    A = dr.SRM((1, 8, 8), 0.5)
    for y in (torch.zeros(32), torch.zeros(1, 31), torch.zeros(1, 32, dtype=torch.int64), np.zeros((1, 32))):
        with pytest.raises(DataError, match="Measurements must be"):
            save_measurements(tmp_path / "m.npz", y, A)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="sigma"):
        save_measurements(tmp_path / "m.npz", torch.zeros(1, 32), A, -1.0)
    assert not list(tmp_path.iterdir())


def test_notes_of_a_weight_file_that_are_none() -> None:
    for meta in ({"mu": "much"}, {"mu": -1.0}, {"mu": 1.0, "config": {"sigma": "some"}}):
        with pytest.raises(InputError, match="of the weight file"):
            default_mu(meta, 0.0)
    assert default_mu({"config": []}, 0.0) == 1e-2
    assert pgd_options({"recovery": 3}, "", 0).acceleration == "fista"
