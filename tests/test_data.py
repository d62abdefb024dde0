"""Folders, splits, the validation part, augmentation, and the embedded images."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from deepreg_fast import data
from deepreg_fast.errors import DataError, InputError

RAMP = (np.arange(20 * 30, dtype=np.int64).reshape(20, 30) * 7) % 256


def write(path: Path, pixels: np.ndarray, **options: object) -> Path:
    Image.fromarray(pixels).save(path, **options)
    return path


def gray8(path: Path) -> Path:
    return write(path, RAMP.astype(np.uint8))


def test_load_folder_sorts_and_ignores_what_is_no_image(tmp_path: Path):
    for i, name in enumerate(["c.png", "a.PNG", "b.bmp"]):
        write(tmp_path / name, np.full((4, 6), 10 * i, dtype=np.uint8))
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / ".hidden.png").write_text("x")
    (tmp_path / "sub.png").mkdir()
    got = data.load_folder(tmp_path)
    assert got.names == ("a.PNG", "b.bmp", "c.png")
    assert got.shape == (1, 4, 6)
    assert torch.equal(got.x[:, 0, 0, 0] * 255, torch.tensor([10.0, 20.0, 0.0]))
    assert data.load_folder(tmp_path, names=["c.png", "a.PNG"]).names == ("c.png", "a.PNG")
    assert data.load_folder(tmp_path, size=3).x.shape == (3, 1, 3, 3)


def test_load_folder_refusals(tmp_path: Path):
    with pytest.raises(DataError, match="no data folder"):
        data.load_folder(tmp_path / "none")
    with pytest.raises(DataError, match="holds none"):
        data.load_folder(tmp_path)
    path = gray8(tmp_path / "a.png")
    with pytest.raises(DataError, match="not one"):
        data.load_folder(path)
    with pytest.raises(DataError, match=r"2 are missing, first 'x\.png'"):
        data.load_folder(tmp_path, names=["a.png", "y.png", "x.png"])
    with pytest.raises(DataError, match="empty"):
        data.load_folder(tmp_path, names=[])
    with pytest.raises(InputError, match="came twice"):
        data.load_folder(tmp_path, names=["a.png", "a.png"])
    write(tmp_path / "b.png", np.zeros((9, 9), dtype=np.uint8))
    with pytest.raises(DataError, match=r"a\.png has 20x30 pixels and b\.png has 9x9"):
        data.load_folder(tmp_path)
    with pytest.raises(DataError, match=r"at least 10x10.*b\.png has 9x9"):
        data.load_folder(tmp_path, size=10)
    (tmp_path / "c.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(DataError, match=r"c\.png"):
        data.load_folder(tmp_path, size=9)


def test_image_set_checks_and_subset():
    images = torch.rand(3, 1, 2, 2)
    full = data.ImageSet(("a", "b", "c"), images)
    part = full.subset(["c", "a"])
    assert part.names == ("c", "a")
    assert torch.equal(part.x, images[[2, 0]])
    with pytest.raises(DataError, match="'z'"):
        full.subset(["z"])
    with pytest.raises(InputError, match="2 names came for 3"):
        data.ImageSet(("a", "b"), images)


def test_load_split(tmp_path: Path):
    path = tmp_path / "split.json"
    path.write_text(json.dumps({"train": ["a.png", "b.png"], "test": ["c.png"]}))
    assert data.load_split(path) == data.Split(("a.png", "b.png"), ("c.png",))
    assert data.load_split("bsd400") == data.bsd400_split()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "keys are others"),
        ('{"train": []}', "keys are others"),
        ('{"train": "a", "test": []}', "under 'train'"),
        ('{"train": [], "test": [3]}', "under 'test'"),
        ('{"train": ["../a.png"], "test": []}', "under 'train'"),
        ('{"train": ["a.png"], "test": ["a.png"]}', "comes twice"),
    ],
    ids=lambda t: t[:30],
)
def test_bad_splits(tmp_path: Path, text: str, words: str):
    (tmp_path / "split.json").write_text(text)
    with pytest.raises(DataError, match=words):
        data.load_split(tmp_path / "split.json")


def test_missing_and_binary_split(tmp_path: Path):
    with pytest.raises(DataError, match="cannot be read"):
        data.load_split(tmp_path / "none.json")
    (tmp_path / "b.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="cannot be read"):
        data.load_split(tmp_path / "b.json")


def test_the_shipped_split_and_registry_name_the_same_400_files():
    split, registry = data.bsd400_split(), data.bsd400_registry()
    assert (len(split.train), len(split.test)) == (370, 30)
    assert {*split.train, *split.test} == set(registry) == {f"test_{i:03d}.png" for i in range(1, 401)}
    assert all(len(bytes.fromhex(h)) == 32 for h in registry.values())
    assert len(set(registry.values())) == 400


def test_carve_validation_is_the_same_everywhere():
    names = [f"test_{i:03d}.png" for i in range(1, 51)]
    train, held = data.carve_validation(names, 5, seed=0)
    # written down once: another Python, platform or order of names must give the same
    assert held == ("test_010.png", "test_018.png", "test_033.png", "test_039.png", "test_040.png")
    assert set(data.carve_validation(names[::-1], 5, seed=0)[1]) == set(held)
    assert [n for n in names if n not in held] == list(train)
    assert data.carve_validation(names, 5, seed=1)[1] != held
    assert data.carve_validation(names, 0) == (tuple(names), ())


def test_carve_validation_refusals():
    for count in (-1, 3, 1.5):
        with pytest.raises(InputError, match="count must be"):
            data.carve_validation(["a", "b", "c"], count)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="twice"):
        data.carve_validation(["a", "a", "c"], 1)


def test_the_four_augmentations():
    x = torch.arange(12.0).reshape(1, 1, 3, 4)
    flips = [x, x.flip(3), x.flip(2), torch.rot90(x, 2, (2, 3))]
    for k, expected in enumerate(flips):
        assert torch.equal(data.augment(x, k), expected)
        assert torch.equal(data.augment(data.augment(x, k), k), x)
    assert data.AUGMENTATIONS == 4
    for a, b in itertools.combinations(flips, 2):
        assert not torch.equal(a, b)


@given(st.integers(0, 3), st.integers(1, 9), st.integers(1, 9))
def test_augment_only_moves_pixels(k: int, h: int, w: int):
    x = torch.arange(2.0 * h * w).reshape(2, 1, h, w)
    y = data.augment(x, k)
    assert y.shape == x.shape
    assert torch.equal(y.flatten(1).sort(1).values, x.flatten(1))


@pytest.mark.parametrize("k", [-1, 4, 1.0, True])
def test_augment_refuses_other_numbers(k):
    with pytest.raises(InputError, match="k must be an integer"):
        data.augment(torch.zeros(1, 1, 2, 2), k)


@pytest.mark.parametrize("size", [48, (64, 96), 180])
def test_embedded_images(size):
    train, held_out = data.embedded_images(size, train_crops=5, held_out_crops=2)
    h, w = (size, size) if isinstance(size, int) else size
    assert train.x.shape == (40, 1, h, w)
    assert held_out.x.shape == (6, 1, h, w)
    pictures = [{name.rpartition("-")[0] for name in s.names} for s in (train, held_out)]
    assert not pictures[0] & pictures[1]
    assert set(Counter(name.rpartition("-")[0] for name in train.names).values()) == {5}
    both = torch.cat([train.x, held_out.x])
    assert both.dtype == torch.float32
    assert float(both.min()) >= 0
    assert float(both.max()) <= 1
    assert float(both.flatten(1).std(1).min()) > 0.005  # none is blank
    assert len({image.numpy().tobytes() for image in both}) == len(both)
    again = data.embedded_images(size, train_crops=5, held_out_crops=2)
    assert torch.equal(again.train.x, train.x)


def test_embedded_images_refusals(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(DataError, match=r"301x301 came and .* take a smaller size"):
        data.embedded_images(301)
    with pytest.raises(InputError, match="train_crops"):
        data.embedded_images(32, train_crops=0)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DataError, match="pip install scikit-image"):
        data.embedded_images(32)
