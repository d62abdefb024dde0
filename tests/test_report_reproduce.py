"""The report of a reproduction, from a made-up folder: whole, and with pieces missing."""

from __future__ import annotations

import html as escaping
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from PIL import Image

from deepreg_fast.data import load_folder
from deepreg_fast.errors import InputError
from deepreg_fast.evaluation.compare import Experiment, evaluation_images
from deepreg_fast.experiments.report import curves, record, tables
from deepreg_fast.experiments.report.pictures import pictures
from deepreg_fast.experiments.report.write import write_report
from deepreg_fast.report import figures
from deepreg_fast.report import format as w
from deepreg_fast.report.figures import Line, Strip, lines_figure, strips_figure
from deepreg_fast.report.html import Report

from .reproduce_folder import write
from .test_report import _Check

NAMES = ("adjoint", "tv", "red", "gs", "beta1", "beta10", "fast", "norm-image")


@pytest.fixture(name="data", scope="module")
def _data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight smooth pictures of 24 x 32; by the split, five are for testing."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for i in range(8):
        coarse = Image.fromarray(rng.integers(40, 215, (5, 6), dtype=np.uint8))
        coarse.resize((32, 24), Image.Resampling.BICUBIC).save(folder / f"{i}.png")
    split = {"train": ["0.png", "1.png", "2.png"], "test": [f"{i}.png" for i in range(3, 8)]}
    (folder / "split.json").write_text(json.dumps(split))
    return folder


@pytest.fixture(name="whole", scope="module")
def _whole(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """A finished run at ratio 1/5 with one ledger row."""
    folder = tmp_path_factory.mktemp("whole")
    problem = {"data": str(data), "split": str(data / "split.json"), "tuning": 2}
    test, _ = evaluation_images(Experiment(**problem))
    write(folder, test, problem, (0.2,), NAMES)
    return folder


@pytest.fixture(name="copy")
def _copy(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "copy"))


@pytest.fixture(name="page", scope="module")
def _page(whole: Path) -> str:
    path = write_report(whole)
    assert path == whole / "report.html"
    return path.read_text(encoding="utf-8")


def change(folder: Path, row: str, f: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "rows" / row / "result.json"
    found = json.loads(path.read_text())
    f(found)
    path.write_text(json.dumps(found))


def text(page: str) -> str:
    """What a reader reads, tags and figures left out."""
    page = re.sub(r"<(style|svg).*?</\1>", "", page, flags=re.DOTALL)
    return escaping.unescape(re.sub(r"<[^>]+>", " ", page)).replace("\u00a0", " ")


def cells(page: str, label: str) -> list[list[str]]:
    """The cells of the table rows that begin with a label."""
    rows = re.findall(r"<tr[^>]*>(.*?)</tr>", page, flags=re.DOTALL)
    split = [[escaping.unescape(c).replace("\u00a0", " ") for c in re.findall(r"<td[^>]*>(.*?)</td>", r)] for r in rows]
    return [r for r in split if r and r[0] == label]


def section(show: Callable[[Report, record.Record], None], folder: Path) -> str:
    report = Report("t", "l")
    show(report, record.read(folder))
    return report.html()


def test_the_page_is_whole_and_fetches_nothing(page: str) -> None:
    check = _Check()
    check.feed(page)
    assert check.open == []
    assert check.links and all(link.startswith(("data:", "#")) for link in check.links)
    assert "http" not in re.sub(r'xmlns(:\w+)?="[^"]*"', "", re.sub(r"<pre>.*?</pre>", "", page, flags=re.DOTALL))
    assert "<script" not in page and "@import" not in page and not re.search(r"url\((?!#)", page)
    labels = re.findall(r'<svg role="img" aria-label="([^"]*)"', page)
    assert len(labels) == page.count("<svg") >= 8 and all(len(label) > 20 for label in labels)
    body = re.sub(r"<style.*?</style>", "", re.sub(r'"data:[^"]*"', "", page), flags=re.DOTALL)
    assert not re.search(r"\b(nan|None|inf)\b", body)


def test_the_page_has_both_themes_and_a_viewport(page: str) -> None:
    assert "prefers-color-scheme: dark" in page and "width=device-width" in page
    drawn = "".join(re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL))
    assert "var(--ink)" in drawn and "var(--series-1)" in drawn
    assert "#ffffff" not in drawn and "#1d2733" not in drawn
    assert page.count("<table") == page.count('<div class="scroll" tabindex="0"><table')


@pytest.mark.parametrize(
    "title",
    [
        "The table",
        "PSNR on the way",
        "The poster's differences",
        "Training",
        "Lipschitz constants",
        "Iterations and time to convergence",
        "Pictures",
        "The ledger of unstated settings",
        "How the recoveries ended",
        "Settings, seeds, machine",
    ],
)
def test_every_section_is_there(page: str, title: str) -> None:
    assert re.search(rf'<h2 id="section-\d+">{escaping.escape(title)}</h2>', page)


def test_headline_row(whole: Path, page: str) -> None:
    row, tv = (json.loads((whole / f"rows/cs5-{n}/result.json").read_text()) for n in ("beta10", "tv"))
    found = cells(page, "bi-level, β = 10")[0]
    apart = np.array(row["psnr"]) - np.array(tv["psnr"])
    assert found[1] == f"{np.mean(row['psnr']):.2f}" and found[2] == f"{np.median(row['psnr']):.2f}"
    assert found[4] == "28.33 / 0.79"
    assert found[5].startswith(f"{apart.mean():+.2f} [") and found[5].endswith("]")
    assert found[6] == f"{(apart > 0).sum()} of 5"
    assert found[7:9] == ["3,057", "2.5 h"]
    assert found[9] == f"{np.median(row['gradients']):.0f}"
    assert found[10] == f"{1e3 * row['seconds'] / 5:.0f}"
    assert found[11] == w.counted(row["status"])
    assert cells(page, "TV, tuned")[0][5] == "–"


def test_sentences(whole: Path, page: str) -> None:
    told = text(page)
    best = record.read(whole).best_bilevel()
    assert best is not None and f"the best bi-level row, “{best.label}”".replace("\u00a0", " ") in told
    assert "missing" not in told.split("How the recoveries ended")[0]


def test_the_posters_differences_stand_beside_ours(whole: Path) -> None:
    a, b = (np.array(json.loads((whole / f"rows/cs5-{n}/result.json").read_text())["psnr"]) for n in ("beta10", "red"))
    page = section(tables.differences, whole)
    (found,) = cells(page, "bi-level, β = 10 − RED")
    ours = (a - b).mean()
    assert found[1].startswith(f"{ours:+.2f} [") and found[4] == "+2.70" and found[5] == w.signed(ours - 2.7)
    assert "Not there, for want of a row: bilevel β = 10 − bilevel β = 3 at 1/5" in text(page)


def test_which_ratio_fits_the_poster(tmp_path: Path, data: Path) -> None:
    write(tmp_path, load_folder(data), {"data": str(data), "split": ""}, (0.2, 0.5), ("tv", "beta10"))
    told = tables.poster_fit(record.read(tmp_path))
    assert told.startswith("The poster's PSNR fits ratio 1/5") and "at ratio 1/2 (1 rows)" in told


def test_overshoot_and_speed_are_read_off_the_curve(copy: Path) -> None:
    curve = {"iterations": [0, 1, 2, 3], "psnr_mean": [11.0, 26.0, 25.15, 25.1], "gradients_mean": [1, 2, 4, 5]}
    change(copy, "cs5-red", lambda r: r.update(trajectory=curve))
    found = cells(section(curves.recovery, copy), "RED")[0]
    assert found == ["RED", "11.00", "26.00", "1", "25.10", "0.90", "2", "5"]


def test_convexity_is_counted(copy: Path) -> None:
    spectrum = {"lambda_max": [0.5, 1.0, 1.5, 2.0, 3.0], "lambda_min": [-1.0] * 5, "beta_hat": [1.0] * 5}
    change(copy, "cs5-beta1", lambda r: r.update(lipschitz=spectrum))
    change(copy, "cs5-beta1", lambda r: r["training"]["stages"][-1]["config"].update(alpha=0.5))
    page = section(curves.lipschitz, copy)
    assert "on 3 of 5 test images for “bi-level, β = 1”" in text(page)
    assert cells(page, "bi-level, β = 1")[0][-1] == "3 of 5"


def test_alpha_comes_from_the_row_whose_weights_are_used(copy: Path) -> None:
    fast, found = "cs5-fast", record.read(copy)
    row = found.named(fast)
    assert row is not None and row.get("training") is None and found.alpha(row) == 0.0
    shutil.rmtree(copy / "rows/cs5-beta10")
    found = record.read(copy)
    row = found.named(fast)
    assert row is not None and found.alpha(row) is None
    assert "Not counted, alpha not being recorded: “β = 10, Anderson”" in text(section(curves.lipschitz, copy))


def test_ledger_compares_with_its_row(whole: Path) -> None:
    a, b = (json.loads((whole / f"rows/cs5-{n}/result.json").read_text()) for n in ("norm-image", "beta10"))
    (found,) = cells(section(tables.ledger, whole), "LayerNorm's axes")
    change_ = np.mean(np.array(a["psnr"]) - np.array(b["psnr"]))
    assert found[1:3] == ["pixel", "image"] and found[3].startswith(f"{w.signed(change_)} [") and found[5] == "1.40 ×"


def test_pictures_are_the_worst_the_median_and_the_best(whole: Path) -> None:
    found = record.read(whole)
    best, tv = found.best_bilevel(), found.tv(0.2)
    assert best is not None and tv is not None
    order = np.argsort(best.psnr - tv.psnr)
    page = section(pictures, whole)
    for title, i in (("Worst", order[0]), ("Median", order[2]), ("Best", order[-1])):
        assert f"<h3>{title}: {3 + i}.png</h3>" in page
    for words in ("the true image", "back-projection", "minimum-norm solution", "error of RED", "Measurements of"):
        assert page.count(words) >= 3
    assert "error of bi-level" in page and "one scale for all maps" in page


def test_pictures_say_why_there_are_none(copy: Path, data: Path) -> None:
    for pattern in ('"data": "[^"]*"', '"split": "[^"]*"'):
        for name in ("results.json", "settings.json"):
            path = copy / name
            path.write_text(re.sub(pattern, pattern.split(":")[0] + ': "gone"', path.read_text()))
    assert "Not shown, because the test images cannot be read: " in text(section(pictures, copy))


def test_pictures_of_other_images_are_refused(copy: Path) -> None:
    path = copy / "settings.json"
    path.write_text(re.sub(r'"test_crop": 0', '"test_crop": 16', path.read_text()))
    assert re.search("images.npz is missing or not of the shape", text(section(pictures, copy)))
    path.write_text(re.sub(r'"test_crop": 16', '"test_crop": 0', path.read_text()))
    best = record.read(copy).best_bilevel()
    assert best is not None
    images = copy / "rows" / best.name / "images.npz"
    with np.load(images) as file:
        np.savez(images, x=file["x"][::-1])
    assert "the images at hand are not those of this run" in text(section(pictures, copy))


# -- what is not there -------------------------------------------------------------------------------------------------


def test_an_unfinished_run_shows_what_there_is(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _without_drawing(monkeypatch)
    (copy / "results.json").unlink()
    shutil.rmtree(copy / "rows/cs5-beta10")
    (copy / "rows/cs5-tv/result.json").unlink()
    (copy / "rows/cs5-gs/result.json").write_text('{"psnr": [1, 2')
    (copy / "rows/cs5-red/result.json").write_text("[1]")
    (copy / "rows/cs5-beta1/images.npz").write_bytes(b"PK half a file")
    told = text(write_report(copy).read_text(encoding="utf-8"))
    for phrase in (
        "results.json (not written yet)",
        "rows/cs5-beta10/result.json (not written yet)",
        "rows/cs5-tv/result.json (not written yet)",
        "rows/cs5-gs/result.json (cannot be read)",
        "rows/cs5-red/result.json (not a JSON object)",
        "Not there to compare with: cs5-beta10",
        "its PSNR (there is no TV row)",
        "Without recovered images (images.npz): bi-level, β = 1.",
    ):
        assert phrase in told, phrase


FIELDS = sorted(
    {
        *(
            "label",
            "group",
            "method",
            "ratio",
            "beta",
            "poster",
            "parameters",
            "mu",
            "psnr_mean",
            "psnr_median",
            "psnr",
        ),
        *(
            "ssim_mean",
            "iterations",
            "gradients",
            "status",
            "seconds",
            "trajectory",
            "converged",
            "lipschitz",
            "command",
        ),
        *("training", "compare", "setting", "value", "unstated", "recovery", "seeds", "machine", "version", "images"),
    }
)


@pytest.mark.parametrize("damage", ["removed", "null", "of another type", "not finite"])
def test_no_field_is_indispensable(copy: Path, damage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Every row lacks other fields, and each field is damaged in some row.
    _without_drawing(monkeypatch)
    names = sorted(p.name for p in (copy / "rows").iterdir())
    for k, key in enumerate(FIELDS):
        for name in {names[k % len(names)], names[(k + 3) % len(names)]}:
            if damage == "removed":
                change(copy, name, lambda r, key=key: r.pop(key, None))
            else:
                value = {"null": None, "of another type": "7", "not finite": float("nan")}[damage]
                change(copy, name, lambda r, key=key, value=value: r.update({key: value}))
    page = write_report(copy).read_text(encoding="utf-8")
    assert "Settings, seeds, machine" in page
    assert not re.search(r">[^<]*\b(nan|None|inf)\b[^<]*<", re.sub(r"<pre>.*?</pre>", "", page, flags=re.DOTALL))


def test_entries_of_lists_may_be_missing(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _without_drawing(monkeypatch)

    def damage(found: dict[str, Any]) -> None:
        found["psnr"][0] = None
        found["trajectory"]["psnr_mean"][3] = None
        found["training"]["curve"]["loss"] = found["training"]["curve"]["loss"][:7]
        found["training"]["curve"]["mu"] = [None] * 5
        found["lipschitz"]["lambda_max"] = []

    change(copy, "cs5-beta10", damage)
    page = write_report(copy).read_text(encoding="utf-8")
    assert cells(page, "bi-level, β = 10")[0][6].endswith(" of 4")
    ended = [r for r in cells(page, "bi-level, β = 10") if r[1] == "1/5"]
    assert ended[0][-1] == "1"


def test_a_run_that_has_only_begun(copy: Path) -> None:
    for path in (copy / "rows").iterdir():
        (path / "result.json").unlink()
    (copy / "results.json").unlink()
    told = text(write_report(copy).read_text(encoding="utf-8"))
    assert "No bi-level row has a result yet" in told and "No row has recorded its training yet." in told
    assert told.count("(not written yet)") == 1 + len(NAMES)


def test_foreign_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="but .* is none; check the path"):
        write_report(tmp_path / "nowhere")
    with pytest.raises(InputError, match="holds neither"):
        write_report(tmp_path)


# -- words and figures -------------------------------------------------------------------------------------------------


def test_figures_of_a_single_point() -> None:
    lines = [Line(name, [1.0], [y], i, smooth=True) for i, (name, y) in enumerate({"a": 1.0, "b" * 40: 1.0}.items())]
    assert "<path" in lines_figure(lines, "x", "y", "xy")
    assert "<path" in strips_figure({"a": [Strip([3.0])]}, "x", log=True, mark=2.0, legend=[("kind", 0)])


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_points_that_a_scale_cannot_show_are_left_out(bad: float, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    monkeypatch.setattr(figures, "_name_ends", lambda axis, lines, height: drawn.extend(lines))
    assert "<path" in lines_figure([Line("a", [1, 2, 3], [3.0, 2.0, bad]), Line("gone", [1], [bad], 1)], "x", "y", "y")
    assert [(n.name, *n.y) for n in drawn] == [("a", 3.0, 2.0)]
    assert "<svg" in lines_figure([Line("gone", [1], [bad])], "x", "y", "xy")


def test_names_at_the_ends_of_lines_do_not_overlap(monkeypatch: pytest.MonkeyPatch) -> None:
    placed = []
    monkeypatch.setattr(Axes, "text", lambda self, x, y, name, **_: placed.append((name, y)))
    ends = {"low": 0.0, "middle": 9.9, "high": 10.0, "highest": 10.1}
    lines_figure([Line(n, [0, 1], [5.0, y], i) for i, (n, y) in enumerate(ends.items())], "x", "y")
    heights = [y for _, y in placed]
    assert [n for n, _ in placed] == list(ends)
    assert np.diff(heights).min() > 0.05 and heights[0] < 0.1 and max(heights) <= 1.0


@pytest.mark.parametrize(
    ("got", "wanted"),
    [
        (w.fixed(-1.005, 1), "−1.0"),
        (w.signed(0.754), "+0.75"),
        (w.duration(8.06), "8.1 s"),
        (w.duration(725), "12 min"),
        (w.duration(11160), "3.1 h"),
        (w.milliseconds(0.0021, 5), "0.4"),
        (w.milliseconds(8.1, 6), "1,350"),
        (w.significant(0.0012345), "0.0012"),
        (w.significant(12.0), "12"),
        (w.ratio(0.2), "1/5"),
        (w.ratio(0.123), "0.123"),
        (w.counted({"max_iterations": 2, "converged": 28}), "28 converged, 2 max iterations"),
        (w.listed(["a", "b", "c"]), "a, b and c"),
        (w.difference({"mean": 0.5, "interval": [-0.1, 1.0]}), "+0.50 [−0.10, +1.00]"),
        (w.fixed(None, 2), "–"),
    ],
)
def test_wording(got: str, wanted: str) -> None:
    assert got == wanted


def test_columns_of_numbers_stand_to_the_right() -> None:
    report = Report("t", "l")
    report.table(("name", "dB", "wins", "state"), [("a", "+1.10 [+1.01, +1.20]", "3 of 5", "4 converged"), "part"])
    heads = re.findall(r'<th scope="col" ([^>]*)>(\w+)</th>', report.html())
    assert [name for attributes, name in heads if not attributes] == ["dB", "wins"]
    assert '<tr class="part"><td colspan="4">part</td></tr>' in report.html()


def _without_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("lines_figure", "strips_figure"):
        monkeypatch.setattr(curves, name, lambda *_, **__: "<svg ></svg>")
