"""Folders of other people's pictures: any names, any sizes, turned photographs."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import deepreg_fast as dr
from deepreg_fast import data
from deepreg_fast.errors import DataError, InputError
from deepreg_fast.evaluation.compare import Experiment, evaluation_images
from deepreg_fast.training.samples import load_samples

BSD68 = ((32, 48), (48, 32))
SET12 = ((26, 26), (51, 51))


def _picture(path: Path, height: int = 24, width: int = 24, seed: int = 0) -> Path:
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def _mixed(folder: Path, sizes: tuple[tuple[int, int], ...], count: int = 6) -> Path:
    folder.mkdir()
    for i in range(count):
        _picture(folder / f"{i}.png", *sizes[i % len(sizes)], seed=i)
    return folder


def _config(folder: Path, **more: object) -> dr.BilevelConfig:
    small = {"data": str(folder), "out": str(folder) + "-run", "crop": 16, "validation": 2, "validation_crop": 30}
    return dr.BilevelConfig(**{**small, **more})  # type: ignore[arg-type]


@pytest.mark.parametrize("sizes", [BSD68, SET12, ((16, 99), (99, 16), (20, 20))])
def test_training_crops_from_images_of_any_size(tmp_path: Path, sizes: tuple[tuple[int, int], ...]) -> None:
    """Every sample is a part of its image, turned by its orientation, and all places of an image occur."""
    folder = _mixed(tmp_path / "d", sizes)
    samples, validation = load_samples(_config(folder, validation=0))
    assert samples.size == (16, 16) and validation.shape[0] == 0
    for i in range(len(samples)):
        picture, k = divmod(i, 4)
        top, left = int(samples.top[i]), int(samples.left[i])
        x = samples.images.x[picture]
        assert top + 16 <= x.shape[-2] and left + 16 <= x.shape[-1]
        crop = data.load_image(folder / samples.images.names[picture])[:, top : top + 16, left : left + 16]
        assert torch.equal(samples.batch(np.array([i])), data.augment(crop[None], k))
    many = load_samples(_config(_mixed(tmp_path / "many", sizes, 30), validation=0))[0]
    far = [int(t) + 16 - min(h for h, _ in sizes) for t in many.top]
    assert max(far) > 0


def test_validation_images_of_any_size(tmp_path: Path) -> None:
    folder = _mixed(tmp_path / "d", BSD68)
    validation = load_samples(_config(folder))[1]
    assert validation.shape == (2, 1, 30, 30)
    assert load_samples(_config(folder, validation_crop=99))[1].shape == (2, 1, 32, 32)
    with pytest.raises(DataError, match="set validation_crop"):
        load_samples(_config(folder, validation_crop=0, validation=5))
    with pytest.raises(DataError, match="set crop"):
        load_samples(_config(folder, crop=0))
    with pytest.raises(DataError, match=r"crop is 40 and .*\.png is (32 x 48|48 x 32); use a smaller crop"):
        load_samples(_config(folder, crop=40))


def test_samples_of_one_size_are_what_they_were(tmp_path: Path) -> None:
    """Runs of earlier releases go on: places and fingerprints of folders of one size do not change."""
    folder = tmp_path / "d"
    folder.mkdir()
    for i in range(3):
        Image.fromarray(np.full((20, 24), 40 * i, np.uint8)).save(folder / f"{i}.png")
    samples = load_samples(_config(folder, validation=0))[0]
    rng = np.random.Generator(np.random.PCG64([0, 1]))
    assert np.array_equal(samples.top, rng.integers(0, 5, 12)) and np.array_equal(samples.left, rng.integers(0, 9, 12))
    assert samples.fingerprint == "d54399e5ee4b65c3d66a95dd164e30dff42f6e4f7ec11ef2262ac922731758b2"


def test_fingerprints_of_mixed_folders_tell_the_shapes(tmp_path: Path) -> None:
    prints = set()
    for i, sizes in enumerate((((16, 32), (32, 16)), ((32, 16), (16, 32)), ((16, 32), (16, 32)))):
        folder = tmp_path / str(i)
        folder.mkdir()
        for k, (h, w) in enumerate(sizes):
            Image.fromarray(np.zeros((h, w), np.uint8)).save(folder / f"{k}.png")
        prints.add(load_samples(_config(folder, validation=0))[0].fingerprint)
    assert len(prints) == 3


@pytest.mark.parametrize("sizes", [BSD68, SET12])
def test_evaluation_crops_from_images_of_any_size(tmp_path: Path, sizes: tuple[tuple[int, int], ...]) -> None:
    folder = _mixed(tmp_path / "d", sizes)
    test, tuning = evaluation_images(Experiment(data=str(folder), test_crop=26, tuning=2))
    assert test.shape == (1, 26, 26) and tuning.shape == (2, 1, 26, 26) and len(test) == 4
    for name, x in zip(test.names, test.x, strict=True):
        assert torch.equal(x, data.load_image(folder / name, 26))
    with pytest.raises(DataError, match=r"give a --crop"):
        evaluation_images(Experiment(data=str(folder), tuning=2))
    with pytest.raises(DataError, match=r"take a smaller --crop .*or leave this image out"):
        evaluation_images(Experiment(data=str(folder), test_crop=50, tuning=2))


def test_testing_and_tuning_images_of_two_sizes(tmp_path: Path) -> None:
    folder = _mixed(tmp_path / "d", ((24, 24),))
    held = data.carve_validation(data.image_names(folder), 2)[1]
    for name in held:
        _picture(folder / name, 30, 24)
    with pytest.raises(DataError, match=r"one shape.*24x24.*30x24.*--crop"):
        evaluation_images(Experiment(data=str(folder), tuning=2))


def test_a_small_folder_is_tuned_on_another_one(tmp_path: Path) -> None:
    small, other = _mixed(tmp_path / "small", ((24, 24),), 1), _mixed(tmp_path / "other", BSD68, 5)
    problem = Experiment(data=str(small), tuning=3)
    with pytest.raises(InputError, match=r"holds 1; name another folder to tune on \(--tune-on"):
        evaluation_images(problem)
    test, tuning = evaluation_images(problem, str(other))
    assert test.names == ("0.png",) and tuning.shape == (3, 1, 24, 24)
    assert evaluation_images(Experiment(data=str(small), tuning=9), str(other))[1].shape[0] == 5
    assert evaluation_images(problem, "embedded")[1].shape == (3, 1, 24, 24)
    for same in (str(small), f"{small}/", str(small / ".." / "small")):
        with pytest.raises(InputError, match="--tune-on must be another folder"):
            evaluation_images(problem, same)
    with pytest.raises(DataError, match="at least 60x60"):
        evaluation_images(Experiment(data=str(_mixed(tmp_path / "large", ((60, 60),), 2))), str(other))
    embedded = evaluation_images(Experiment(test_crop=24, tuning=2), str(other))
    assert embedded[1].shape == (2, 1, 24, 24) and len(embedded[0]) > 2


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "webp"])
def test_turned_photographs_are_upright(tmp_path: Path, orientation: int, suffix: str) -> None:
    """Bright above, dark below, as the tag says where above is."""
    upright = np.repeat(np.linspace(250, 10, 32).astype(np.uint8)[:, None], 16, 1)
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.T,
        6: np.rot90(upright),
        7: np.rot90(upright, 2).T,
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(np.ascontiguousarray(stored)).save(path, exif=exif)
    x = data.load_image(path)
    assert x.shape == (1, 32, 16)
    assert float((x[0] - torch.from_numpy(upright / 255.0)).abs().max()) < 0.05


@pytest.mark.parametrize("exif", [b"", b"Exif\0\0", b"Exif\0\0MM\0*\0\0\0\x08\0\x01", bytes(range(200))])
def test_a_damaged_tag_turns_nothing(tmp_path: Path, exif: bytes) -> None:
    Image.fromarray(np.zeros((8, 4), np.uint8)).save(tmp_path / "a.png", exif=exif)
    assert data.load_image(tmp_path / "a.png").shape == (1, 8, 4)


def test_sixteen_bit_photographs_are_turned(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.arange(8, dtype=np.uint16).reshape(2, 4) * 5000).save(tmp_path / "a.png", exif=exif)
    assert data.load_image(tmp_path / "a.png").shape == (1, 4, 2)


NAMES = ("Zoë.png", "é1.png", "e.png", "für.png", "z.png")


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_either_unicode_form_gives_the_same_parts(tmp_path: Path, form: str) -> None:
    """Order, validation part, samples and fingerprint do not depend on the form that a system stores."""
    folders = []
    for kind in ("NFC", form):
        folder = tmp_path / f"d{len(folders)}"
        folder.mkdir()
        for i, name in enumerate(NAMES):
            _picture(folder / unicodedata.normalize(kind, name), seed=i)
        folders.append(folder)
    a, b = (load_samples(_config(f, validation=2)) for f in folders)
    assert a[0].fingerprint == b[0].fingerprint and torch.equal(a[1], b[1])
    assert [unicodedata.normalize("NFC", n) for n in b[0].images.names] == list(a[0].images.names)
    listed = [unicodedata.normalize("NFC" if form == "NFD" else "NFD", n) for n in NAMES]
    assert torch.equal(data.load_folder(folders[1], names=listed).x, data.load_folder(folders[0], names=NAMES).x)


def test_two_names_that_differ_by_their_form_are_two(tmp_path: Path) -> None:
    for i, form in enumerate(("NFC", "NFD")):
        _picture(tmp_path / unicodedata.normalize(form, "é.png"), seed=i)
    names = data.image_names(tmp_path)
    if len(names) == 1:
        pytest.skip("this file system stores one form")
    assert [torch.equal(data.load_folder(tmp_path, names=[n]).x[0], data.load_image(tmp_path / n)) for n in names]
    kept, held = data.carve_validation(names, 1)
    assert len({*kept, *held}) == 2 and data.carve_validation(names[::-1], 1)[1] == held


def test_names_that_are_no_text(tmp_path: Path) -> None:
    name = os.fsdecode(b"f\xfcr.png")
    try:
        _picture(tmp_path / name)
    except OSError:
        pytest.skip("this file system takes texts only")
    for i in range(3):
        _picture(tmp_path / f"{i}.png", seed=i + 1)
    samples, _ = load_samples(_config(tmp_path, validation=1))
    assert len(samples.fingerprint) == 64
    seeds = [data.carve_validation(data.image_names(tmp_path), 2, seed)[1] for seed in range(9)]
    assert any(name in held for held in seeds) and any(name not in held for held in seeds)
    assert name in evaluation_images(Experiment(str(tmp_path), tuning=1))[0].names + (name,)
