"""Color images from file to report: loading, writing, training, evaluation, recovery and the command line."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import deepreg_fast as dr
from deepreg_fast import data
from deepreg_fast.errors import InputError
from deepreg_fast.evaluation.compare import Experiment, measure
from deepreg_fast.experiments.report.pictures import png
from deepreg_fast.inverse.measurements import save_measurements
from deepreg_fast.inverse.problem import build_operator
from deepreg_fast.problem import PROBLEMS, Problem

from .helpers import images, log_lines, random_red, small_config
from .test_cli import Run, _run  # noqa: F401 - a fixture


@pytest.fixture(name="colors", scope="module")
def _colors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight smooth color pictures of 30 x 30 pixels."""
    folder, rng = tmp_path_factory.mktemp("colors"), np.random.default_rng(1)
    for i in range(8):
        coarse = Image.fromarray(rng.integers(0, 255, (5, 5, 3), dtype=np.uint8))
        coarse.resize((30, 30), Image.Resampling.BICUBIC).save(folder / f"{i}.png")
    return folder


RGB = np.random.default_rng(0).integers(0, 255, (5, 7, 3), dtype=np.uint8)


def test_colors_are_kept(tmp_path: Path) -> None:
    wanted = torch.from_numpy(RGB.astype(np.float32) / 255).permute(2, 0, 1)
    for name in ("a.png", "a.tif", "a.bmp", "a.ppm"):
        Image.fromarray(RGB).save(tmp_path / name)
        x = data.load_image(tmp_path / name, color=True)
        assert x.is_contiguous() and torch.equal(x, wanted)
        luma = data.load_image(tmp_path / name)
        weights = torch.tensor([0.299, 0.587, 0.114])[:, None, None]
        assert luma.shape == (1, 5, 7) and torch.allclose(luma, (weights * x).sum(0, keepdim=True), atol=1e-6)
    assert torch.equal(data.load_image(tmp_path / "a.png", size=(3, 4), color=True), wanted[:, 1:4, 1:5])


def test_transparency_orientation_palettes_and_gray_files(tmp_path: Path) -> None:
    wanted = torch.from_numpy(RGB.astype(np.float32) / 255).permute(2, 0, 1)
    alpha = np.concatenate([RGB, np.full((5, 7, 1), 30, np.uint8)], 2)
    Image.fromarray(alpha).save(tmp_path / "alpha.png")
    assert torch.equal(data.load_image(tmp_path / "alpha.png", color=True), wanted)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    Image.fromarray(RGB).save(tmp_path / "turned.png", exif=exif)
    turned = data.load_image(tmp_path / "turned.png", color=True)
    assert turned.shape == (3, 7, 5) and torch.equal(turned, torch.rot90(wanted, -1, (1, 2)))
    Image.fromarray(RGB).quantize(16).save(tmp_path / "palette.png")
    assert data.load_image(tmp_path / "palette.png", color=True).std(0).max() > 0.1
    Image.fromarray(RGB[..., 0].astype(np.uint16) * 257).save(tmp_path / "gray16.png")
    gray = data.load_image(tmp_path / "gray16.png", color=True)
    assert gray.shape == (3, 5, 7) and torch.equal(gray[:1].expand(3, 5, 7), gray)
    assert torch.equal(gray[:1], data.load_image(tmp_path / "gray16.png"))


def test_written_colors_are_read_again(tmp_path: Path) -> None:
    x = torch.from_numpy(RGB.astype(np.float32) / 255).permute(2, 0, 1)
    data.save_image(tmp_path / "x.png", x)
    assert Image.open(tmp_path / "x.png").mode == "RGB"
    assert torch.equal(data.load_image(tmp_path / "x.png", color=True), x)
    with pytest.raises(InputError, match=r"gray \[1, H, W\] or \[H, W\] or color \[3, H, W\]"):
        data.save_image(tmp_path / "y.png", x[:2])


def test_folders_and_embedded_images(colors: Path) -> None:
    whole = data.load_folder(colors, color=True)
    assert whole.shape == (3, 30, 30) and len(whole) == 8
    train, held_out = data.embedded_images(32, 2, 1, color=True)
    assert train.x.shape == (6, 3, 32, 32) and held_out.names == ("chelsea-0", "coffee-0")
    gray = data.embedded_images(32, 2, 1).train
    i = gray.names.index("rocket-1")
    weights = torch.tensor([0.299, 0.587, 0.114])[:, None, None]
    luma = (weights * train.x[train.names.index("rocket-1")]).sum(0, keepdim=True)
    assert torch.allclose(luma, gray.x[i], atol=1e-6)


def test_a_problem_says_whether_its_images_are_in_color(colors: Path) -> None:
    assert Problem(color=True).image_channels == 3 and Problem().image_channels == 1
    assert "in color" in Problem("sr2", color=True).describe()
    measured = measure(Experiment("deblur-gaussian", color=True, data=str(colors), tuning=2))
    assert measured.x.shape == (6, 3, 30, 30) and measured.x_tuning.shape == (2, 3, 30, 30)
    assert measured.A.image_shape == (3, 30, 30)
    tuned_elsewhere = measure(Experiment(color=True, data=str(colors), tuning=2), tune_on="embedded")
    assert tuned_elsewhere.x_tuning.shape == (2, 3, 30, 30)


@pytest.mark.parametrize("name", PROBLEMS)
def test_every_problem_measures_color_images(name: str) -> None:
    """Each channel is measured like a gray image; an SRM has rows of its own for each."""
    A, x = build_operator(Problem(name, color=True), (3, 30, 30)), images(1, 3, 30, 30)
    gray = build_operator(Problem(name), (1, 30, 30))
    assert A.image_shape == (3, 30, 30)
    y = A.A(x)
    assert y.shape[1:] == A.measurement_shape
    if name != "cs":
        wanted = torch.cat([gray.normal(x[:, c : c + 1]) for c in range(3)], 1)
        assert torch.allclose(A.A_adjoint(y), wanted, atol=1e-9)


@pytest.mark.parametrize("options", [{}, {"regularizer": "ridge", "filters": 6, "kernel_size": 3}])
def test_training_in_color(options: dict[str, object], colors: Path, tmp_path: Path) -> None:
    """The regularizer takes three channels, and the loss falls."""
    few = {"channels": 2, "steps": 10, "validate_every": 0, "batch": 3, "beta": 0.0, "xi": 0.0, "lr": 2e-2}
    c = small_config(colors, tmp_path, color=True, **(few | options))
    trainer = dr.BilevelTrainer(c, progress=False)
    assert trainer.samples.shape == (3, 16, 16) and trainer.A.image_shape == (3, 16, 16)
    trainer.fit()
    loss = [d["mse_loss"] for d in log_lines(tmp_path) if "mse_loss" in d]
    assert np.mean(loss[-4:]) < np.mean(loss[:4])
    reg, meta = dr.load(tmp_path / "weights.safetensors")
    assert reg.image_channels == 3 and meta["config"]["color"] is True
    assert reg.value_and_grad(torch.rand(1, 3, 9, 9))[1].shape == (1, 3, 9, 9)


@pytest.mark.parametrize("trainer", [dr.DenoiserTrainer, dr.GradientStepTrainer, dr.AdversarialTrainer])
def test_baselines_in_color(trainer: type, colors: Path, tmp_path: Path) -> None:
    c = dr.BaselineConfig(
        out=str(tmp_path), data=str(colors), color=True, steps=2, crop=16, batch=2, validation=0, channels=2
    )
    assert trainer(c, progress=False).fit().image_channels == 3
    assert dr.load(tmp_path / "weights.safetensors")[0].image_channels == 3


def test_training_on_embedded_photographs_in_color(tmp_path: Path) -> None:
    c = dr.BaselineConfig(out=str(tmp_path), color=True, steps=1, crop=16, batch=2, validation=3, channels=2)
    trainer = dr.DenoiserTrainer(c, progress=False)
    assert trainer.validation.shape[:2] == (3, 3) and len({n.split("-")[0] for n in trainer.samples.images.names}) == 2


def test_the_command_line_in_color(run: Run, colors: Path, tmp_path: Path) -> None:
    weights = tmp_path / "w.safetensors"
    dr.save(random_red(scale=0.03, double=False, channels=4), weights, {"mu": 0.05, "method": "bilevel"})
    common = ("--problem", "denoise", "--sigma", 0.02, "--color")
    out = tmp_path / "out"
    answer = run("recover", colors / "0.png", "--weights", weights, *common, "--out", out, "--mu", 0.01)
    assert answer.code == 0 and "dB" in answer.out
    x = data.load_image(colors / "0.png", color=True)[None]
    A = build_operator("denoise", (3, 30, 30))
    options = dr.PGDOptions(500, 1e-4, "fista")
    reg = dr.PerChannel(dr.load(weights)[0])
    wanted = dr.recover(dr.add_noise(A.A(x), 0.02, seed=1), A, reg, 0.01, options=options)
    assert np.array_equal(np.load(out / "0.npy"), wanted.x[0].numpy())
    assert Image.open(out / "0.png").mode == "RGB" and Image.open(out / "0.png").size == (30, 30)
    figure = np.asarray(Image.open(out / "figure.png").convert("RGB")).astype(int)
    assert (figure.max(2) - figure.min(2)).max() > 60, "the figure shows colors"
    row = json.loads((out / "results.json").read_text())["images"][0]
    assert row["psnr"] == pytest.approx(float(dr.psnr(wanted.x, x)[0]), abs=1e-9)
    answer = run(
        *("evaluate", "--weights", weights, "--data", colors, "--validation", 1, "--limit", 2),
        *(*common, "--max-iterations", 60, "--json"),
    )
    result = json.loads(answer.out)
    assert answer.code == 0 and result["settings"]["color"] is True
    assert len(result["bilevel"]["psnr"]) == len(result["tv"]["psnr"]) == 2
    answer = run(
        *("train", "bilevel", "--data", colors, "--out", tmp_path / "run", "--color", "--steps", 2, "--crop", 16),
        *("--channels", 2, "--validation", 1, "--validation-crop", 16, "--batch", 2, "--inner-iterations", 4),
    )
    assert answer.code == 0
    trained = tmp_path / "run" / "weights.safetensors"
    answer = run("recover", colors / "0.png", "--weights", trained, "--out", tmp_path / "gray")
    assert answer.code == 2 and "takes images of 3 channels, but they have 1" in answer.err


def test_complex_measurements_on_the_command_line(run: Run, tmp_path: Path) -> None:
    """Gray weights recover a complex image by its real and imaginary parts; the PNG shows the magnitude."""
    weights = tmp_path / "w.safetensors"
    dr.save(random_red(scale=0.03, double=False, channels=4), weights, {"mu": 0.05})
    A = dr.MRI(torch.rand(1, 16, 12, generator=torch.Generator().manual_seed(0)) < 0.6)
    y = A.A(images(1, 2, 16, 12, dtype=torch.float32) - 0.5)
    save_measurements(tmp_path / "y.npz", y, A)
    answer = run("recover", tmp_path / "y.npz", "--weights", weights, "--mu", 0.01, "--out", tmp_path / "out")
    assert answer.code == 0
    wanted = dr.recover(
        y, A, dr.RealImag(dr.load(weights)[0]), 0.01, options=dr.PGDOptions(500, 1e-4, acceleration="fista")
    )
    assert np.array_equal(np.load(tmp_path / "out" / "y.npy"), wanted.x[0].numpy())
    assert Image.open(tmp_path / "out" / "y.png").mode == "L"


def test_pictures_of_reports_are_in_color() -> None:
    def decoded(uri: str) -> np.ndarray:
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))))

    x = RGB.transpose(2, 0, 1) / 255
    assert np.array_equal(decoded(png(x, "gray")), RGB)
    assert decoded(png(x[:1], "gray")).shape == (5, 7) and decoded(png(x - 0.5, "error", 0.5)).shape == (5, 7)
    assert decoded(png(0.5 * x, "stretched")).max() == 255
