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


def test_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "demo"
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(sys, "argv", ["deepreg-fast", "demo", "--out", str(out), "--steps", "4", "--size", "64"])
    main_code = 0
    try:
        main()
    except SystemExit as error:
        main_code = int(error.code or 0)
    printed = capsys.readouterr().out
    assert main_code == 0
    for method in ("minimum norm", "tv", "bi-level", "shipped weights cs5-beta10"):
        assert re.search(rf"{method} +\d+\.\d\d dB", printed), printed
    assert str((out / "report.html").resolve()) in printed
    text = (out / "report.html").read_text(encoding="utf-8")
    check = _Check()
    check.feed(text)
    assert check.open == []
    assert all(link.startswith(("data:", "#")) for link in check.links)
    assert len(check.images) + text.count("<svg") >= 3
    for image in check.images:
        pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(image.partition(",")[2]))).convert("L"))
        assert pixels.std() > 1.0
    body = re.sub(r"<style.*?</style>", "", text, flags=re.DOTALL)
    for word in (
        "Recovery of held-out images",
        "Training",
        "PSNR against iteration",
        "How the recoveries ended",
        "shipped weights cs5-beta10",
        "beta",
    ):
        assert word in body
    assert not re.search(r"\bnan\b", re.sub(r'"data:[^"]*"', "", body), re.IGNORECASE)


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
