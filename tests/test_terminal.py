"""What is printed, on any terminal: encodings, widths, closed and missing streams, names as they are, progress."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import deepreg_fast as dr
from deepreg_fast import terminal
from deepreg_fast.cli import bench, main
from deepreg_fast.evaluation import tuning
from deepreg_fast.evaluation.compare import Method
from deepreg_fast.experiments.folder import Folder
from deepreg_fast.experiments.job import Job
from deepreg_fast.experiments.progress import Progress
from deepreg_fast.experiments.settings import Settings
from deepreg_fast.terminal import Pulse, table
from deepreg_fast.training import log

from .helpers import random_red, small_config
from .test_cli import Run, _run

__all__ = ["_run"]


def _call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["deepreg-fast", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def _streams(monkeypatch: pytest.MonkeyPatch, encoding: str) -> tuple[io.BytesIO, io.BytesIO]:
    raw = io.BytesIO(), io.BytesIO()
    for name, buffer in zip(("stdout", "stderr"), raw, strict=True):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(buffer, encoding=encoding))
    return raw


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp437", "cp1252", "utf-8"])
def test_every_encoding_takes_the_card_and_the_help(monkeypatch: pytest.MonkeyPatch, encoding: str) -> None:
    out, err = _streams(monkeypatch, encoding)
    assert _call(monkeypatch, "info", "cs5-beta10") == 0
    text = out.getvalue().decode(encoding)
    assert ("180 × 180" in text) or ("180 x 180" in text)
    assert "28.31" in text and err.getvalue() == b""
    if encoding == "ascii":
        assert _call(monkeypatch, "evaluate", "--help") == 0
    assert _call(monkeypatch, "info", os.fsdecode(b"f\xfcr\xe9")) == 2
    assert b"must be a file or one of" in err.getvalue() and err.getvalue().count(b"\n") == 1


@pytest.mark.parametrize("missing", [("stdout",), ("stderr",), ("stdout", "stderr")])
def test_missing_streams(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, missing: tuple[str, ...]) -> None:
    """As under pythonw, or with `>&-`."""
    for name in missing:
        monkeypatch.setattr(sys, name, None)
    assert _call(monkeypatch, "info", "cs5-beta10") == 0
    for name in missing:
        monkeypatch.setattr(sys, name, None)
    assert _call(monkeypatch, "info", "no-such") == 2


def test_a_training_without_stderr(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for progress in (None, True):
        monkeypatch.setattr(sys, "stderr", None)
        c = small_config(folder, tmp_path / str(progress), steps=2, validate_every=0)
        dr.BilevelTrainer(c, progress=progress).fit()
        assert (tmp_path / str(progress) / "weights.safetensors").exists()


class _Closed(io.RawIOBase):
    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return 1  # only for dup2, which does nothing here

    def write(self, _: Any) -> int:
        raise BrokenPipeError(32, "Broken pipe")


@pytest.mark.parametrize("arguments", [("info", "cs5-beta10"), ("info", "--json"), ("--help",)])
def test_a_closed_pipe_ends_quietly(monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]) -> None:
    _, err = _streams(monkeypatch, "utf-8")
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BufferedWriter(_Closed(), 1), encoding="utf-8"))
    with monkeypatch.context() as patch:
        patch.setattr(os, "dup2", lambda *_: None)
        code = _call(patch, *arguments)
    assert code in (0, 1) and err.getvalue() == b""


def test_a_line_that_cannot_be_told_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for stream in (None, io.TextIOWrapper(io.BufferedWriter(_Closed(), 1), encoding="utf-8")):
        monkeypatch.setattr(sys, "stderr", stream)
        terminal.say("a line")
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr(sys, "stderr", closed)
    terminal.say("a line")
    assert not terminal.is_terminal(closed) and terminal.width(None) is None


TEXTS = st.text(st.characters(exclude_characters="\n"), max_size=12)


@given(st.lists(st.tuples(TEXTS, TEXTS, TEXTS), min_size=1, max_size=4), st.none() | st.integers(1, 60))
def test_no_text_of_a_table_is_cut_off(rows: list[tuple[str, str, str]], columns: int | None) -> None:
    text = table(("name", "PSNR mean", "of"), rows, columns=columns)
    for row in rows:
        for cell in row:
            assert terminal.visible(cell).strip() in text
    assert "\x1b" not in text
    encoded = text.encode("ascii", terminal.ERRORS).decode("ascii")
    assert encoded.isascii()


def test_a_table_that_does_not_fit_has_a_line_for_each_text() -> None:
    rows = [("[v2]net", "28.31", "5 converged"), ("[/x]", "−1.25", "")]
    wide = table(("method", "PSNR", "status"), rows)
    assert wide.splitlines()[2] == "[v2]net  28.31  5 converged" and wide.splitlines()[3] == "[/x]     −1.25"
    narrow = table(("method", "PSNR", "status"), rows, columns=20)
    assert narrow.splitlines() == [
        "method: [v2]net",
        "  PSNR: 28.31",
        "  status: 5 converged",
        "method: [/x]",
        "  PSNR: −1.25",
    ]
    assert table(("method", "PSNR", "status"), rows, columns=27) == wide


def test_facts_go_on_under_their_beginning() -> None:
    pairs = [("torch", "2.14"), ("backend gpu", "not here: there is no device of that kind on this machine")]
    lines = terminal.facts(pairs, 50).splitlines()
    assert lines[0] == "torch        2.14" and all(len(t) <= 50 for t in lines) and lines[2].startswith(" " * 13)
    assert terminal.facts(pairs).splitlines()[1].endswith("on this machine")
    assert terminal.facts(pairs, 24).splitlines()[0] == "torch: 2.14"


@pytest.fixture(name="pictures")
def _pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(2):
        pixels = np.random.default_rng(i).integers(0, 255, (26, 28), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"[red]{i}.png")
    return folder


def test_names_are_shown_as_they_are(run: Run, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Tuning TV would take most of the time and shows no name.
    quick = Method("tv", dr.TV(), 1e-2, dr.PGDOptions(2))
    monkeypatch.setattr(tuning, "tuned_tv", lambda *_: quick)
    names = ("[v2]net", "net[]", "[/x]", "[bold]b", "settings", "a\x1b[31mb", "tv")
    weights: list[object] = []
    for name in names:
        path = tmp_path / f"{name.replace('/', '')}.safetensors"
        dr.save(random_red(scale=0.03, double=False, channels=2), path, {"method": name})
        weights += ["--weights", path]
    options = ("--data", pictures, "--crop", 24, "--validation", 1, "--max-iterations", 3, "--no-tune")
    answer = run("evaluate", *options, *weights)
    assert answer.code == 0, answer.err
    shown = [line.split("  ")[0] for line in answer.out.splitlines()[2:]]
    wanted = [*map(terminal.visible, names[:4]), f"settings:{tmp_path.name}", "a\\x1b[31mb", f"tv:{tmp_path.name}"]
    assert shown == ["adjoint", "minimum_norm", "tv", *wanted] and "\x1b" not in answer.out
    for name in names[:4]:
        wrong = run("evaluate", *options, "--weights", tmp_path / f"{name}.no")
        assert wrong.code == 2 and f"{name}.no" in wrong.err


def test_options_are_named_in_errors(run: Run, pictures: Path) -> None:
    for arguments in (
        ("evaluate", "--data", pictures, "--validation", 0),
        ("evaluate", "--data", pictures, "--validation", 2),
        ("evaluate", "--data", pictures, "--crop", -1),
        ("evaluate", "--data", pictures, "--limit", -1),
        ("bench", "--rounds", 1),
        ("bench", "--depth", 1),
        ("bench", "--norm", "image"),
        ("demo", "--steps", 0),
        ("reproduce", "--workers", -1),
    ):
        answer = run(*arguments)
        option = next(a for a in reversed(arguments) if str(a).startswith("--"))
        assert answer.code == 2 and str(option) in answer.err, answer.err


# -- progress ----------------------------------------------------------------------------------------------------------


def test_the_line_says_what_is_done_and_what_is_left() -> None:
    now = [100.0]
    said: list[str] = []
    pulse = Pulse("train", 400, "steps", 100, clock=lambda: now[0], wall=lambda: 0.0, say=said.append)
    now[0] += 45
    assert pulse.line() == "train: 100 of 400 steps done, 300 left; 45 s so far"
    pulse.done(200, "loss 3.2")
    now[0] += 55
    pulse.beat()
    assert said[0].startswith(
        "train: 200 of 400 steps done, 200 left (loss 3.2); 2 min so far, about 3 min left, until "
    )
    pulse.done(400)
    assert "0 left" in pulse.line() and "about 0 s left" in pulse.line()


def test_lines_come_while_a_part_lasts() -> None:
    """The thread prints, whatever the main one does: here it waits for the third line."""
    import threading

    third = threading.Event()
    said: list[str] = []

    def say(text: str) -> None:
        said.append(text)
        if len(said) == 3:
            third.set()

    with Pulse("bench", 2, "cases", interval=0.001, say=say) as pulse:
        pulse.begin("hvp")
        assert third.wait(60)
    count = len(said)
    assert "(hvp)" in said[2] and count >= 3
    pulse.close()
    assert len(said) == count


def test_a_training_tells_lines_where_there_is_no_terminal(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Pulse] = []

    class Kept(Pulse):
        def __init__(self, *rest: Any, **more: Any) -> None:
            super().__init__(*rest, **more)
            made.append(self)

    monkeypatch.setattr(log, "Pulse", Kept)
    c = small_config(folder, tmp_path / "a", steps=2, validate_every=0)
    dr.BilevelTrainer(c).fit()
    dr.BilevelTrainer(small_config(folder, tmp_path / "b", steps=1, validate_every=0), progress=False).fit()
    assert len(made) == 1 and "2 of 2 steps done, 0 left (loss" in made[0].line()


def test_a_reproduction_tells_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Task:
        name, row, chain = "a evaluation", "a", -1

    now = [0.0]
    progress = Progress(Folder(tmp_path), Settings(()), 4, bars=False, interval=30.0, clock=lambda: now[0])
    progress.start(Task)  # type: ignore[arg-type]
    for seconds in (10.0, 31.0, 40.0, 62.0):
        now[0] = seconds
        progress.look([Task])  # type: ignore[list-item]
    progress.end(Task, "done")  # type: ignore[arg-type]
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "a evaluation: begins" and lines[-1] == "a evaluation: done after 62 s" and len(lines) == 4
    assert lines[1].startswith("reproduce: 0 of 4 tasks done, 4 left (a evaluation: evaluating)")


def test_the_bench_fits_80_columns() -> None:
    from deepreg_fast.bench import Bounds
    from deepreg_fast.bench.runner import Result, Row
    from deepreg_fast.bench.timing import Ratio
    from deepreg_fast.bench.workload import Case

    peers = ("ours", "torch, best eager: channels last", "LearnedRegularizers", "[peer]")
    for chilled in (None, 0.123):
        rows = [Row("hvp pixel", p, 1234.5, 0.034, Ratio(123.45, 120.5, 130.75), 2e-7, chilled, 10**9) for p in peers]
        case = Case("hvp pixel", {}, [], 1e9, 1e6, missing={"JAX": "pip install jax"}, notes={"[peer]": "as it comes"})
        bounds = Bounds(100.0, 80.0, 10.0)
        text = bench._text([Result(case, rows, None, None)], bounds, 80)
        assert max(map(len, text.splitlines())) <= 80
        assert all(p in text for p in peers) and text.count("123.45 [120.50, 130.75]") == len(peers)
        assert "missing: JAX (pip install jax)" in text and "[peer]: as it comes." in text
        narrow = bench._text([Result(case, rows, None, None)], bounds, 30)
        assert narrow.count("times ours [95 %]: 123.45 [120.50, 130.75]") == len(peers)


# -- children -------------------------------------------------------------------------------------------------------


def test_children_import_nothing_of_the_current_folder(tmp_path: Path) -> None:
    """With modules of the user's there that would end the child at once."""
    import subprocess

    for name in ("random", "torch", "numpy", "typing", "deepreg_fast"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('imported from the current folder')")
    (tmp_path / "settings.json").write_text('{"format": "another"}')
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    argv = Job(str(tmp_path), "a", 0).argv()
    pipe = subprocess.PIPE
    # Its stdin stays open: its end is the parent's end.
    with subprocess.Popen(argv, cwd=tmp_path, env=env, stdin=pipe, stderr=pipe, text=True) as process:
        assert process.stderr is not None
        told = process.stderr.read()
        assert process.wait() == 2 and told.startswith("The settings must be of the format"), told
