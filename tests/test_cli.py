"""The command line: what it writes, and one sentence with exit code 2 for bad input."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

import deepreg_fast as dr
from deepreg_fast import terminal
from deepreg_fast.cli import info, main
from deepreg_fast.inverse.measurements import load_measurements, save_measurements
from deepreg_fast.machine import may_have_cuda, torch_build
from deepreg_fast.training.checkpoint import load_checkpoint, save_checkpoint

from .helpers import images, random_red


class Answer(NamedTuple):
    code: int
    out: str
    err: str


Run = Callable[..., Answer]


@pytest.fixture(name="run")
def _run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """`deepreg-fast ARGUMENTS` in this process."""

    def run(*arguments: object) -> Answer:
        monkeypatch.setattr(sys, "argv", ["deepreg-fast", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "160")
        # No line of progress, however busy the machine is.
        monkeypatch.setattr(terminal, "INTERVAL", 86400.0)
        code = 0
        try:
            main()
        except SystemExit as error:
            code = int(error.code or 0)
        found = capsys.readouterr()
        return Answer(code, found.out, found.err)

    return run


@pytest.fixture(name="weights")
def _weights(tmp_path: Path) -> Path:
    path = tmp_path / "w.safetensors"
    dr.save(random_red(scale=0.03, double=False, channels=4), path, {"mu": 0.05, "method": "bilevel"})
    return path


@pytest.fixture(name="folder")
def _folder(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(5):
        Image.fromarray((images(24, 24, seed=i) * 255).byte().numpy()).save(folder / f"{i}.png")
    return folder


def test_help_names_every_command(run: Run) -> None:
    answer = run("--help")
    assert answer.code == 0
    for command in ("train", "recover", "evaluate", "demo", "data", "info"):
        assert command in answer.out
    for arguments in (("train", "bilevel"), ("train", "adversarial"), ("recover",), ("evaluate",), ("data", "bsd400")):
        answer = run(*arguments, "--help")
        assert answer.code == 0 and "--out" in answer.out
    assert run("--version").out.strip() == dr.__version__


def test_info(run: Run) -> None:
    facts = json.loads(run("info", "--json").out)
    assert facts["backends"]["reference"] is None
    assert all(facts["backends"][k] for k in ("gpu",) if not torch.cuda.is_available())
    text = run("info").out
    assert dr.__version__ in text and "driver" in text and "cupy-cuda13x" in text
    for reason in filter(None, facts["backends"].values()):
        assert f"not here: {reason[:40]}" in text
    for state in facts["optional"].values():
        assert state[:30] in text


def test_info_agrees_with_torch() -> None:
    """What `info` says without torch is what torch says."""
    assert torch_build() == {"version": str(torch.__version__), "cuda": torch.version.cuda}
    assert may_have_cuda() or not torch.cuda.is_available()
    assert info.facts()["backends"] == dr.backends()


def test_info_lists_the_devices(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties(NamedTuple):
        name: str
        total_memory: int = 150_754_820_096
        major: int = 9
        minor: int = 0

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: Properties(f"GPU number {i}"))
    monkeypatch.setattr(info, "_driver", lambda: "580.65.06")
    found = json.loads(run("info", "--json").out)["cuda"]
    assert found["driver"] == "580.65.06" and found["torch"] == torch.version.cuda
    assert found["devices"][1] == {"name": "GPU number 1", "memory_gib": 140.4, "compute_capability": "9.0"}
    text = run("info").out
    assert "driver 580.65.06; 2 devices" in text and "GPU number 0, 140.4 GiB, compute capability 9.0" in text


def test_a_device_that_is_not_here(
    run: Run, folder: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for command in (
        ("train", "bilevel", "--data", folder, "--validation", 1, "--crop", 16, "--out", tmp_path / "r"),
        ("train", "denoiser", "--data", folder, "--validation", 1, "--crop", 16, "--out", tmp_path / "r"),
        ("recover", folder / "0.png", "--weights", weights, "--out", tmp_path / "o"),
        ("evaluate", "--data", folder, "--validation", 1),
        ("demo", "--out", tmp_path / "d"),
    ):
        for device, word in (("cuda:1", "no CUDA device"), ("tpu", "'auto'")):
            answer = run(*command, "--device", device)
            assert answer.code == 2 and word in answer.err and device in answer.err, answer
            assert answer.out == "" and answer.err.count("\n") <= 2
    assert not any((tmp_path / name).exists() for name in "rod")


@pytest.mark.gpu
@pytest.mark.parametrize("device", [f"cuda:{i}" for i in range(min(2, torch.cuda.device_count()))] or ["cuda"])
def test_every_command_on_a_gpu(run: Run, folder: Path, weights: Path, tmp_path: Path, device: str) -> None:
    """The same answers as on the CPU: recoveries stop at a residual of 1e-4, which leaves far less than 0.05 dB."""
    found: dict[str, Any] = {}
    for name in ("cpu", device):
        out = tmp_path / name.replace(":", "")
        evaluation = ("evaluate", "--weights", weights, "--data", folder, "--validation", 2, "--no-tune", "--json")
        answer = run(*evaluation, "--device", name)
        assert answer.code == 0, answer.err
        figures = json.loads(answer.out)
        assert figures["settings"]["device"].startswith(name)
        answer = run("recover", folder / "0.png", "--weights", weights, "--out", out, "--device", name)
        assert answer.code == 0, answer.err
        results = json.loads((out / "results.json").read_text())
        found[name] = [f["psnr_mean"] for k, f in figures.items() if k != "settings"] + [results["images"][0]["psnr"]]
    assert found[device] == pytest.approx(found["cpu"], abs=0.05)
    run("demo", "--steps", 2, "--size", 64, "--out", tmp_path / "demo", "--device", device)
    assert (tmp_path / "demo" / "report.html").exists()


def test_a_run_goes_on_on_another_device(run: Run, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    common = ("train", "bilevel", "--data", folder, "--validation", 1, "--validation-crop", 16, "--crop", 16)
    first = run(*common, "--channels", 3, "--steps", 2, "--batch", 2, "--device", "auto", "--out", out)
    assert first.code == 0, first.err
    # As if it had come from a machine with a GPU.
    path = out / "last.safetensors"
    tensors, state = load_checkpoint(path)
    state["config"]["device"] = "cuda:7"
    save_checkpoint(path, {k: np.array(v) for k, v in tensors.items()}, state)
    refused = run("train", "bilevel", "--resume", out)
    assert refused.code == 2 and "cuda:7" in refused.err and "'cpu'" in refused.err
    again = run("train", "bilevel", "--resume", out, "--device", "cpu")
    assert again.code == 0, again.err
    assert json.loads((out / "config.json").read_text())["device"] == "cpu"


def test_train_and_resume(run: Run, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    common = ("train", "bilevel", "--data", folder, "--validation", 1, "--validation-crop", 16, "--crop", 16)
    first = run(*common, "--channels", 3, "--steps", 4, "--batch", 2, "--out", out)
    assert first.code == 0 and "Trained 4 steps" in first.out
    again = run(*common, "--out", out)
    assert again.code == 2 and "--resume" in again.err
    more = run("train", "bilevel", "--resume", out)
    assert more.code == 0 and "Trained 4 steps" in more.out
    changed = run("train", "bilevel", "--resume", out, "--beta", 9)
    assert changed.code == 2 and "beta" in changed.err
    file = tmp_path / "settings.json"
    file.write_text((out / "config.json").read_text())
    third = run("train", "bilevel", "--config", file, "--out", tmp_path / "third", "--steps", 2)
    assert third.code == 0 and json.loads((tmp_path / "third" / "config.json").read_text())["crop"] == 16
    for text, word in (("{", "JSON"), ('{"colour": 3}', "colour")):
        file.write_text(text)
        answer = run("train", "bilevel", "--config", file, "--out", tmp_path / "fourth")
        assert answer.code == 2 and word in answer.err
    for method in ("denoiser", "gradient-step", "adversarial"):
        answer = run(
            *("train", method, "--data", folder, "--validation", 1, "--validation-crop", 16, "--crop", 16),
            *("--channels", 3, "--steps", 2, "--batch", 2, "--out", tmp_path / method),
        )
        meta = dr.load(tmp_path / method / "weights.safetensors")[1]
        assert answer.code == 0 and meta["method"] == method.replace("-", "_")


def test_recover_an_image(run: Run, folder: Path, weights: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    answer = run("recover", folder / "0.png", "--weights", weights, "--ratio", 0.5, "--out", out)
    assert answer.code == 0 and "dB" in answer.out
    result = json.loads((out / "results.json").read_text())["images"][0]
    assert result["status"] == "converged" and 5 < result["psnr"] < 60 and 0 < result["ssim"] <= 1
    assert Image.open(out / "0.png").size == (24, 24)
    assert Image.open(out / "figure.png").size[0] > 800
    x = torch.from_numpy(np.asarray(Image.open(folder / "0.png"), np.float32) / 255)[None, None]
    A = dr.SRM((1, 24, 24), 0.5)
    reg, _ = dr.load(weights)
    wanted = dr.recover(A.A(x), A, reg, 0.05, options=dr.PGDOptions(500, 1e-4, "fista"))
    assert np.array_equal(np.load(out / "0.npy"), wanted.x[0].numpy())
    assert result["psnr"] == pytest.approx(float(dr.psnr(wanted.x, x)[0]), abs=1e-9)


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_recover_measurements(run: Run, weights: Path, tmp_path: Path, suffix: str) -> None:
    A, x = dr.SRM((1, 20, 16), 0.5, transform="hadamard", seed=4), images(2, 1, 20, 16, dtype=torch.float32)
    y = dr.add_noise(A.A(x), 0.01, seed=3)
    path = tmp_path / f"y{suffix}"
    save_measurements(path, y, A, 0.01)
    back, B, sigma = load_measurements(path)
    assert torch.equal(back, y) and B.fingerprint() == A.fingerprint() and sigma == 0.01
    out = tmp_path / "out"
    assert run("recover", path, "--weights", weights, "--out", out).code == 0
    rows = json.loads((out / "results.json").read_text())["images"]
    assert len(rows) == 2 and "psnr" not in rows[0] and (out / "y_001.npy").exists()
    by_lam = run("recover", path, "--weights", weights, "--out", tmp_path / "lam", "--lam", 500)
    assert by_lam.code == 0
    assert np.array_equal(np.load(tmp_path / "lam" / "y_001.npy"), np.load(out / "y_001.npy"))
    other = dr.SRM((1, 20, 16), 0.5, seed=5)
    # As if another release drew other signs from the same seed.
    A.describe = other.describe  # type: ignore[method-assign]
    save_measurements(path, y, A, 0.01)
    answer = run("recover", path, "--weights", weights, "--out", out)
    assert answer.code == 2 and "operator" in answer.err


def test_evaluate_on_the_embedded_images(run: Run, weights: Path, tmp_path: Path) -> None:
    out = tmp_path / "evaluation.json"
    arguments = ("evaluate", "--weights", weights, "--crop", 32, "--limit", 2, "--validation", 1, "--out", out)
    answer = run(*arguments, "--json")
    assert answer.code == 0
    result = json.loads(answer.out)
    assert result == json.loads(out.read_text())
    assert {"adjoint", "minimum_norm", "tv", "bilevel", "settings"} == set(result)
    keys = {"psnr_mean", "psnr_median", "ssim_mean", "psnr", "iterations", "gradients", "status"}
    for name in ("minimum_norm", "tv", "bilevel"):
        assert keys <= set(result[name]) and len(result[name]["psnr"]) == 2
        assert result[name]["psnr_mean"] == pytest.approx(np.mean(result[name]["psnr"]))
    assert result["bilevel"]["vs_tv"]["mean"] == pytest.approx(
        result["bilevel"]["psnr_mean"] - result["tv"]["psnr_mean"]
    )
    assert result["tv"]["psnr_mean"] > result["minimum_norm"]["psnr_mean"] > result["adjoint"]["psnr_mean"]
    # A permutation leaves an image's mean to its own coefficient, which this seed does not draw.
    small = ("evaluate", "--crop", 16, *arguments[5:-2])
    permuted = (*small, "--randomizer", "permutation", "--operator-seed", 1, "--json")
    without, kept = run(*permuted, "--no-keep-dc"), run(*permuted)
    assert without.code == 0 and json.loads(without.out)["settings"]["keep_dc"] is False
    scores = [json.loads(a.out)["minimum_norm"]["psnr_mean"] for a in (without, kept)]
    assert scores[1] > scores[0]
    text = run(*small, "--weights", weights)
    assert text.code == 0 and "bilevel" in text.out and "tv" in text.out


def test_evaluate_a_folder_tunes_baselines_on_other_images(run: Run, folder: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        dr.save(random_red(scale=0.03, double=False, channels=2), tmp_path / name / "w.safetensors", {"method": "x"})
    weights = [p for name in "ab" for p in ("--weights", tmp_path / name / "w.safetensors")]
    answer = run(
        "evaluate", *weights, "--data", folder, "--validation", 2, "--crop", 16, "--max-iterations", 30, "--json"
    )
    assert answer.code == 0, answer.err
    result = json.loads(answer.out)
    assert len(result["settings"]["images"]) == 3 and {"x", "x:b"} < set(result)
    too_few = run("evaluate", "--data", folder, "--validation", 5)
    assert too_few.code == 2 and "--validation" in too_few.err


def _cases(tmp: Path, folder: Path, weights: Path) -> dict[str, tuple[tuple[object, ...], str]]:
    """Bad input: arguments, and a word of the sentence."""
    picture = folder / "0.png"
    files = {
        "truncated": weights.read_bytes()[:200],
        "foreign": b"PK\x03\x04 a zip of something",
    }
    for name, data in files.items():
        (tmp / f"{name}.safetensors").write_bytes(data)
    bad_weights = random_red(double=False, channels=4)
    with torch.no_grad():
        next(bad_weights.parameters()).fill_(torch.nan)
    dr.save(bad_weights, tmp / "nan.safetensors")
    (tmp / "corrupt.png").write_bytes(picture.read_bytes()[:80])
    (tmp / "text.png").write_bytes(b"not an image")
    Image.open(picture).save(tmp / "a.gif")
    Image.fromarray(np.zeros((2, 2), np.uint8)).save(tmp / "tiny.png")
    _bomb(tmp / "bomb.png")
    (tmp / "empty").mkdir()
    A = dr.SRM((1, 8, 8), 0.5)
    save_measurements(tmp / "nan.npz", torch.full((1, 32), torch.nan), A)
    (tmp / "short.npz").write_bytes((tmp / "nan.npz").read_bytes()[:100])
    np.savez(tmp / "foreign.npz", y=np.zeros(3))
    (tmp / "file").write_text("")
    recover = ("recover", picture, "--out", tmp / "out", "--weights")
    train = ("train", "bilevel", "--out", tmp / "r", "--data")
    return {
        "no such image": (("recover", tmp / "no.png", "--weights", weights), "no.png"),
        "no such measurements": (("recover", tmp / "no.npz", "--weights", weights), "no.npz"),
        "no such weights": ((*recover, tmp / "no.safetensors"), "no file|none at"),
        "truncated weights": ((*recover, tmp / "truncated.safetensors"), "whole safetensors"),
        "foreign weights": ((*recover, tmp / "foreign.safetensors"), "whole safetensors"),
        "weights that are NaN": ((*recover, tmp / "nan.safetensors"), "NaN"),
        "corrupt image": (("recover", tmp / "corrupt.png", "--weights", weights), "corrupt.png"),
        "text as image": (("recover", tmp / "text.png", "--weights", weights), "text.png"),
        "bomb": (("recover", tmp / "bomb.png", "--weights", weights), "pixels"),
        "format": (("recover", tmp / "a.gif", "--weights", weights), "PNG|png"),
        "too small": (("recover", tmp / "tiny.png", "--weights", weights, "--ratio", 0.5), "3"),
        "NaN measurements": (("recover", tmp / "nan.npz", "--weights", weights), "finite|NaN"),
        "short measurements": (("recover", tmp / "short.npz", "--weights", weights), "whole"),
        "foreign measurements": (("recover", tmp / "foreign.npz", "--weights", weights), "save_measurements"),
        "ratio": ((*recover, weights, "--ratio", 1.5), "ratio"),
        "ratio zero": ((*recover, weights, "--ratio", 0), "ratio"),
        "transform": ((*recover, weights, "--transform", "fourier"), "transform"),
        "mu": ((*recover, weights, "--mu", -1), "mu"),
        "lam without noise": ((*recover, weights, "--lam", 1), "--lam"),
        "acceleration": ((*recover, weights, "--acceleration", "fast"), "acceleration"),
        "unwritable": (("recover", picture, "--weights", weights, "--out", tmp / "file" / "out"), "choose another"),
        "unwritable run": (
            ("train", "bilevel", "--data", folder, "--validation", 1, "--crop", 16, "--out", tmp / "file" / "x"),
            "choose",
        ),
        "missing folder": ((*train, tmp / "none"), "none"),
        "empty folder": ((*train, tmp / "empty"), "empty"),
        "crop too large": (
            ("train", "bilevel", "--data", folder, "--validation", 1, "--crop", 99, "--out", tmp / "r"),
            "crop",
        ),
        "too few images": ((*train, folder), "lower validation"),
        "not a number": ((*train, folder, "--lr", "nan"), "lr"),
        "no split": ((*train, folder, "--split", tmp / "s.json"), "s.json"),
        "nothing to resume": (("train", "bilevel", "--resume", tmp / "empty"), "none"),
        "no settings file": (("train", "bilevel", "--config", tmp / "no.json"), "--config"),
        "unknown option": (("train", "bilevel", "--colour", "red"), "colour"),
        "unknown command": (("trian",), "trian"),
        "demo size": (("demo", "--size", 10), "size"),
    }


def _bomb(path: Path) -> None:
    """A PNG header that announces 60000 x 60000 pixels."""
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 0, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b""))


def test_bad_input_is_one_sentence(run: Run, folder: Path, weights: Path, tmp_path: Path) -> None:
    import re

    before = weights.read_bytes()
    for name, (arguments, word) in _cases(tmp_path, folder, weights).items():
        answer = run(*arguments)
        assert answer.code == 2, (name, answer)
        assert "Traceback" not in answer.err and re.search(word, answer.err), (name, answer.err)
        if name not in ("unknown option", "unknown command"):  # typer draws a box around its own
            assert answer.err.startswith("deepreg-fast: ") and answer.err.count("\n") <= 2, (name, answer.err)
        assert answer.out == "", (name, answer.out)
    assert weights.read_bytes() == before


def test_a_full_disk_leaves_what_was_there(weights: Path) -> None:
    """A write that fails half-way (a file size limit stands in for the full disk) keeps the old file whole."""
    before = weights.read_bytes()
    program = (
        "import resource, signal, sys, deepreg_fast as dr\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try:\n    dr.save(dr.RED(), sys.argv[1])\n"
        "except dr.errors.InputError as error:\n    print(error)\n"
    )
    answer = subprocess.run(
        [sys.executable, "-c", program, str(weights)], capture_output=True, text=True, check=True, env={**os.environ}
    )
    assert "unharmed" in answer.stdout
    assert weights.read_bytes() == before and sorted(p.name for p in weights.parent.iterdir()) == [weights.name]


@pytest.mark.parametrize(
    "arguments",
    [("--help",), ("--version",), ("train", "--help"), ("train", "bilevel", "--help"), ("recover", "--help")]
    + [("evaluate", "--help"), ("reproduce", "--help"), ("demo", "--help"), ("data", "bsd400", "--help")]
    + [("bench", "--help"), ("info",), ("info", "cs5-beta10")],
    ids=" ".join,
)
def test_help_and_info_import_nothing_heavy(arguments: tuple[str, ...]) -> None:
    if arguments[0] == "info" and may_have_cuda():
        pytest.skip("torch has to be asked for the CUDA devices of this machine")
    code = (
        "import sys; from deepreg_fast.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code\n"
        "print(sorted({'torch', 'numpy', 'scipy', 'matplotlib', 'skimage', 'PIL'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert len(done.stdout.splitlines()) > 1
