"""The demo and its report."""

from __future__ import annotations

import base64
import io
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deepreg_fast.cli import main
from deepreg_fast.experiments import demo as demo_module
from deepreg_fast.experiments.demo import run_demo
from deepreg_fast.report.figures import psnr_figure
from deepreg_fast.report.html import Report


class _Check(HTMLParser):
    """Every element is closed, and nothing is fetched from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.images: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "img", "br", "link", "hr"):
            self.open.append(tag)
        for key, value in attrs:
            if key in ("src", "href"):
                self.links.append(value or "")
            if tag == "img" and key == "src":
                self.images.append(value or "")
            if tag == "img":
                assert dict(attrs).get("alt") is not None

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def _demo(out: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> int:
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(sys, "argv", ["deepreg-fast", "demo", "--out", str(out), *options])
    try:
        main()
    except SystemExit as error:
        return int(error.code or 0)
    return 0


def test_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "demo"
    assert _demo(out, monkeypatch, "--steps", "4", "--size", "64") == 0
    printed = capsys.readouterr().out
    for method in ("minimum norm", "tv", "trained here", "shipped cs5-ridge-net"):
        assert re.search(rf"{method} +\d+\.\d\d dB", printed), printed
    last = printed.splitlines()[-3:]
    against = r"\d+\.\d\d dB, ([+-]\d+\.\d\d) dB against tuned TV, .* \d of 6 held-out images"
    assert re.search(rf"trained here in \d+ s reaches {against}", last[0])
    # The shipped weights are 3 dB above TV.
    shipped = re.search(rf"cs5-ridge-net reach {against}", last[1])
    assert shipped is not None and float(shipped[1]) > 1.5
    assert last[2] == f"The report is in {(out / 'report.html').resolve()}"
    text = (out / "report.html").read_text(encoding="utf-8")
    check = _Check()
    check.feed(text)
    assert check.open == []
    assert all(link.startswith(("data:", "#")) for link in check.links)
    # The original and three recoveries of each of 6 images, as many details of one, 16 filters; three charts.
    assert len(check.images) == 4 * 6 + 4 + 16 and text.count("<svg") == 3
    for image in check.images:
        pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(image.partition(",")[2]))).convert("L"))
        assert pixels.std() > 1.0
    body = re.sub(r"<style.*?</style>", "", text, flags=re.DOTALL)
    sections = [s.partition("</h2>")[0].rpartition(">")[2] for s in body.split("<h2")[1:]]
    assert sections == [
        "Original and recoveries",
        "All methods",
        "Recovery and training",
        "The other held-out images",
        "What was learned",
        "How the recoveries ended",
        "Settings",
    ]
    # Pictures come first, and each recovery tells its PSNR.
    first = body.partition("All methods</h2>")[0]
    assert first.count("<img") == 8 and "<svg" not in first and len(re.findall(r"\d\d\.\d\d dB", first)) >= 3
    assert not re.search(r"\bnan\b", re.sub(r'"data:[^"]*"', "", body), re.IGNORECASE)


@pytest.mark.parametrize("problem", ["inpaint", pytest.param("sr3", marks=pytest.mark.long)])
def test_demo_of_another_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, problem: str) -> None:
    monkeypatch.setattr(demo_module, "TUNING_LIMIT", 5)
    monkeypatch.setattr(demo_module, "TUNING", 2)
    out = tmp_path / "demo"
    assert _demo(out, monkeypatch, "--steps", "2", "--size", "65", "--problem", problem) == 0
    check = _Check()
    check.feed((out / "report.html").read_text(encoding="utf-8"))
    assert check.open == []
    # The measurements, too, of each of 6 images; a blank one would be a mistake of the page.
    assert len(check.images) == 5 * 6 + 4 + 16
    measured = Image.open(io.BytesIO(base64.b64decode(check.images[1].partition(",")[2])))
    assert measured.size == ((60, 60) if problem == "inpaint" else (20, 20))
    assert np.asarray(measured.convert("L")).std() > 10.0
    assert _demo(out, monkeypatch, "--problem", "deblur") == 2


@pytest.mark.long
def test_the_regularizer_that_the_demo_trains_beats_tuned_tv(tmp_path: Path) -> None:
    """By 1.7 dB at its size when this was written; half of it is left to other processors."""
    results = run_demo(tmp_path / "demo", progress=False).results
    assert results["trained here"]["vs_tv"]["mean"] > 0.8
    assert results["trained here"]["vs_tv"]["wins"] >= 4
    assert results["shipped cs5-ridge-net"]["vs_tv"]["mean"] > 2.0


def test_report_escapes_what_it_is_given(tmp_path: Path) -> None:
    report = Report("a < b", "x & y")
    report.section("<script>", "1 < 2")
    report.table(("<i>", "b"), [("<b>", "&")])
    report.figure(psnr_figure({"m": ([1, 2], [10.0, 12.0])}), 'caption <c> "d"')
    report.write(tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "<script>" not in text and "<i>" not in text and "<b>" not in text and "&lt;script&gt;" in text
    assert '<svg role="img" aria-label="caption &lt;c&gt; &quot;d&quot;" ' in text
    assert "<figcaption>caption &lt;c&gt;" in text
