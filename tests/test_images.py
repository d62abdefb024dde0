"""One image file: exact values, every refusal, and damaged files."""

from __future__ import annotations

import os
import struct
import zlib
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


@pytest.mark.parametrize("suffix", ["png", "tif", "bmp", "pgm"])
def test_eight_bit_values_are_exact(tmp_path: Path, suffix: str):
    x = data.load_image(gray8(tmp_path / f"a.{suffix}"))
    assert x.dtype == torch.float32
    assert x.shape == (1, 20, 30)
    assert np.array_equal(x[0].numpy(), RAMP.astype(np.float32) / 255)


@pytest.mark.parametrize(("suffix", "options"), [("jpg", {"quality": 95}), ("webp", {"quality": 95})])
def test_lossy_formats_are_read(tmp_path: Path, suffix: str, options: dict[str, int]):
    flat = np.full((16, 16), 128, dtype=np.uint8)
    x = data.load_image(write(tmp_path / f"a.{suffix}", flat, **options))
    assert x.shape == (1, 16, 16)
    assert float((x - 128 / 255).abs().max()) <= 2 / 255  # lossy, but a flat image keeps its value


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_sixteen_bit_values(tmp_path: Path, suffix: str):
    values = (RAMP * 257).astype(np.uint16)
    values[0, 0] = 1  # lost if read as 8 bits
    x = data.load_image(write(tmp_path / f"a.{suffix}", values))
    assert np.array_equal(x[0].numpy(), (values / 65535).astype(np.float32))


def test_big_endian_sixteen_bit_tiff(tmp_path: Path):
    path = tmp_path / "a.tif"
    Image.frombytes("I;16B", (2, 1), struct.pack(">HH", 258, 65535)).save(path)
    assert np.array_equal(data.load_image(path)[0].numpy(), np.array([[258 / 65535, 1]], dtype=np.float32))


def test_colour_becomes_luma_and_transparency_is_dropped(tmp_path: Path):
    pixels = np.zeros((1, 4, 4), dtype=np.uint8)
    pixels[0, :3, :3] = np.eye(3) * 255
    pixels[0, 3] = (255, 255, 255, 7)
    x = data.load_image(write(tmp_path / "a.png", pixels))
    # one float32 rounding in the weights and one in the product
    assert np.allclose(x[0, 0], [0.299, 0.587, 0.114, 1.0], rtol=0, atol=2e-7)
    assert x.max() <= 1


@pytest.mark.parametrize("mode", ["1", "LA", "P", "CMYK", "RGBA"])
def test_other_modes_agree_with_gray(tmp_path: Path, mode: str):
    gray = Image.fromarray(np.array([[0, 255], [255, 0]], dtype=np.uint8))
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    gray.convert("RGB").convert(mode).save(path) if mode == "CMYK" else gray.convert(mode).save(path)
    assert torch.equal(data.load_image(path), torch.tensor([[[0.0, 1.0], [1.0, 0.0]]]))


def test_float_tiff(tmp_path: Path):
    values = np.array([[0, 0.25], [0.5, 1]], dtype=np.float32)
    assert np.array_equal(data.load_image(write(tmp_path / "a.tif", values))[0].numpy(), values)
    for bad in (2.0, -0.1, np.nan):
        values[0, 0] = bad
        with pytest.raises(DataError, match=r"float values in \[0, 1\]"):
            data.load_image(write(tmp_path / "b.tif", values))


def test_integers_beyond_sixteen_bits(tmp_path: Path):
    with pytest.raises(DataError, match="70000"):
        data.load_image(write(tmp_path / "a.tif", np.array([[70000, 0]], dtype=np.int32)))


@pytest.mark.parametrize("suffix", ["gif", "png"])
def test_other_formats_are_refused_whatever_the_ending(tmp_path: Path, suffix: str):
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(RAMP.astype(np.uint8)).save(path, format="GIF")
    with pytest.raises(DataError, match="PNG, JPEG, TIFF"):
        data.load_image(path)


def test_missing_file_folder_and_unreadable_content(tmp_path: Path):
    with pytest.raises(DataError, match="no image file"):
        data.load_image(tmp_path / "none.png")
    with pytest.raises(DataError, match="is a folder"):
        data.load_image(tmp_path)
    (tmp_path / "empty.png").touch()
    with pytest.raises(DataError, match="is none of these, or is damaged"):
        data.load_image(tmp_path / "empty.png")


def test_every_truncation_of_a_png_is_a_data_error(tmp_path: Path):
    whole = gray8(tmp_path / "a.png").read_bytes()
    end = whole.index(b"IEND") + 4  # the checksum of the empty last chunk may be missing: no pixel depends on it
    cut = tmp_path / "cut.png"
    for n in range(end - 4):
        cut.write_bytes(whole[:n])
        with pytest.raises(DataError, match=r"cut\.png"):
            data.load_image(cut)


def test_a_flipped_bit_in_the_pixels_of_a_png_is_a_data_error(tmp_path: Path):
    whole = bytearray(gray8(tmp_path / "a.png").read_bytes())
    start = whole.index(b"IDAT") + 4
    for position in range(start, whole.index(b"IEND") - 4, 5):
        broken = whole.copy()
        broken[position] ^= 0x10
        (tmp_path / "b.png").write_bytes(broken)
        with pytest.raises(DataError, match=r"b\.png"):
            data.load_image(tmp_path / "b.png")


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("samples")
    return {s: gray8(folder / f"a.{s}").read_bytes() for s in ("png", "jpg", "tif", "bmp", "pgm", "webp")}


@given(
    suffix=st.sampled_from(["png", "jpg", "tif", "bmp", "pgm", "webp"]),
    changes=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=4),
    keep=st.floats(0, 1),
)
def test_damage_gives_an_image_or_a_data_error(samples, tmp_path_factory, suffix, changes, keep):
    raw = bytearray(samples[suffix])
    for position, value in changes:
        raw[position % len(raw)] = value
    path = tmp_path_factory.getbasetemp() / f"damaged.{suffix}"
    path.write_bytes(raw[: max(1, round(len(raw) * (1 - keep / 4)))])
    try:
        x = data.load_image(path)
    except DataError as error:
        assert str(path) in str(error)
    else:
        assert x.ndim == 3
        assert bool(((x >= 0) & (x <= 1)).all())


def png_announcing(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    body = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [8_001, 12_000, 60_000])
def test_decompression_bomb_is_refused_from_its_header(tmp_path: Path, side: int):
    path = tmp_path / "bomb.png"
    path.write_bytes(png_announcing(side, side))
    with pytest.raises(DataError, match="at most 64,000,000 pixels"):
        data.load_image(path)


def test_center_crop(tmp_path: Path):
    path = gray8(tmp_path / "a.png")
    x = data.load_image(path)
    assert torch.equal(data.load_image(path, 10), x[:, 5:15, 10:20])
    assert torch.equal(data.load_image(path, (5, 30)), x[:, 7:12, :])
    assert torch.equal(data.load_image(path, (20, 30)), x)


def test_too_small_for_the_crop_names_both_sizes(tmp_path: Path):
    with pytest.raises(DataError, match="at least 21x21.*20x30"):
        data.load_image(gray8(tmp_path / "a.png"), 21)


@pytest.mark.parametrize("size", [0, -3, True, (3, 0), (3, 4, 5), 2.5, (1.5, 2)])
def test_size_must_be_positive_integers(tmp_path: Path, size):
    with pytest.raises(InputError, match="size must be"):
        data.load_image(gray8(tmp_path / "a.png"), size)


def test_save_and_load(tmp_path: Path):
    x = torch.from_numpy(RAMP.astype(np.float32) / 255)[None]
    assert torch.equal(data.load_image(data.save_image(tmp_path / "a.png", x)), x)
    data.save_image(tmp_path / "a.png", torch.tensor([[-1.0, 2.0]]))
    assert torch.equal(data.load_image(tmp_path / "a.png"), torch.tensor([[[0.0, 1.0]]]))
    assert os.listdir(tmp_path) == ["a.png"]


def test_save_refuses_and_leaves_what_was_there(tmp_path: Path):
    path = gray8(tmp_path / "a.png")
    before = path.read_bytes()
    with pytest.raises(InputError, match="NaN"):
        data.save_image(path, torch.full((4, 4), torch.nan))
    with pytest.raises(InputError, match=r"shape \[2, 1, 4, 4\]"):
        data.save_image(path, torch.zeros(2, 1, 4, 4))
    with pytest.raises(DataError, match="cannot be written"):
        data.save_image(tmp_path / "none" / "a.png", torch.zeros(4, 4))
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(DataError, match="cannot be written"):
        data.save_image(tmp_path / "folder.png", torch.zeros(4, 4))
    assert path.read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["a.png", "folder.png"]
