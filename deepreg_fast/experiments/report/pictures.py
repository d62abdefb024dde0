"""Images of a reproduction's report: measurements, recoveries and errors."""

from __future__ import annotations

import base64
import io
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ...errors import DeepRegError
from ...evaluation.compare import Experiment, Measured, measure
from ...evaluation.metrics import psnr
from ...inverse.data_term import initial_point
from ...operators import SRM
from ...regularizers import TV
from ...report import format as w
from ...report.html import Picture, Report
from .record import DIRECT, Record, Row

SCALES = (0.05, 0.1, 0.2, 0.3, 0.5, 1.0)
"""Candidate limits of the error scale."""


@dataclass
class _Scene:
    """The test images with their measurements, and the recovered images `[N, C, H, W]` by row name."""

    test: Measured
    recovered: dict[str, np.ndarray]
    scale: float


def pictures(report: Report, record: Record) -> None:
    """Add the worst, the median and the best test image of the best bi-level row, ranked by its difference to TV."""
    best = record.best_bilevel()
    if best is None or best.ratio is None or len(best.psnr) == 0:
        report.section("Pictures", "No bi-level row has a result yet, so there is no worst and no best image.")
        return
    tv = record.tv(best.ratio)
    difference = best.psnr - tv.psnr if tv is not None and len(tv.psnr) == len(best.psnr) else None
    by = best.psnr if difference is None else difference
    order = [int(i) for i in np.argsort(by) if np.isfinite(by[i])]
    measure = "its PSNR (there is no TV row)" if difference is None else "its difference to TV"
    report.section(
        "Pictures",
        f"The test images on which “{best.label}” at ratio {w.ratio(best.ratio)} is worst, in the middle, and best by "
        f"{measure}. Each recovered image has its error to the right.",
    )
    scene = _scene(record, best)
    if isinstance(scene, str):
        report.text(scene)
        return
    if not order:
        report.text("Not shown: no image has a finite PSNR.")
        return
    end = scene.scale
    report.scale(
        Picture(png(np.linspace(-end, end, 256)[None], "error", end), "Color bar of the errors.", "", _scale_text(end)),
        (f"−{end:g}", "0", f"+{end:g}"),
    )
    rows = _shown(record, best)
    for title, i in (("Worst", order[0]), ("Median", order[len(order) // 2]), ("Best", order[-1])):
        caption = f"“{best.label}” {w.fixed(float(best.psnr[i]), 2)} dB"
        if difference is not None:
            caption += f", {w.signed(float(difference[i]))} dB against TV"
        report.subsection(f"{title}: {scene.test.names[i]}", f"{caption}.")
        report.pictures(_inputs(scene, i))
        report.pictures([_recovered(scene, r, i, tv) for r in rows if r.name in scene.recovered])
    absent = [r.label for r in rows if r.name not in scene.recovered]
    report.text(f"Without recovered images (images.npz): {w.listed(absent)}." if absent else "")


def _shown(record: Record, best: Row) -> list[Row]:
    """The rows whose images are shown. Images of methods without iterations are recomputed."""
    return [r for r in record.rows if r.ratio == best.ratio and r.group != "ledger" and r.method not in DIRECT]


def _scale_text(end: float) -> str:
    return f"Errors x̂ − x, one scale for all maps; beyond ±{end:g} the color is that of the end."


def _scene(record: Record, best: Row) -> _Scene | str:
    """The data of the images, or a message that says why there are none."""
    try:
        test = measure(_problem(record, best))
    except DeepRegError as error:
        return f"Not shown, because the test images cannot be read: {error}"
    shape = tuple(test.x.shape)
    recovered = {}
    for row in _shown(record, best):
        x = _images(record.folder / "rows" / row.name / "images.npz", shape)
        if x is not None:
            recovered[row.name] = x
    x = recovered.get(best.name)
    if x is None:
        return f"Not shown, because rows/{best.name}/images.npz is missing or not of the shape {list(shape)}."
    recomputed = _psnr(x, test.x)
    if len(recomputed) != len(best.psnr) or not np.nanmax(np.abs(recomputed - best.psnr)) < 0.1:
        return (
            f"Not shown, because the images at hand are not those of this run: with them "
            f"“{best.label}” has {w.fixed(float(np.nanmean(recomputed)), 2)} dB instead of "
            f"{w.fixed(best.number('psnr_mean'), 2)} dB."
        )
    truth = test.x.numpy()
    errors = np.concatenate([np.abs(x - truth).ravel()[::7] for x in recovered.values()])
    quantile = float(np.nanquantile(errors, 0.98))
    scale = next((s for s in SCALES if s >= quantile), SCALES[-1])
    return _Scene(test, recovered, scale)


def _problem(record: Record, row: Row) -> Experiment:
    """The problem of a row: from its settings if recorded, otherwise the problem shared by all rows."""
    row_problem = record.declared.get(row.name, {}).get("problem")
    values = {**record.problem, **(row_problem if isinstance(row_problem, dict) else {"ratio": row.ratio})}
    return Experiment.of(values)


def _images(path: Path, shape: tuple[int, ...]) -> np.ndarray | None:
    """The recovered images of a row, float32 of this shape; None if the file is missing or does not match."""
    try:
        with np.load(path, allow_pickle=False) as file:
            x = np.asarray(file["x"], np.float32)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    return x.reshape(shape) if x.size == int(np.prod(shape)) else None


def _psnr(x: np.ndarray, truth: torch.Tensor) -> np.ndarray:
    return psnr(torch.from_numpy(x), truth).numpy()


def _inputs(scene: _Scene, i: int) -> list[Picture]:
    """The truth, the measurements in the plane of the transform, `A^T y`, and the minimum-norm solution."""
    test, name = scene.test, scene.test.names[i]
    y, A, x = test.y[i : i + 1], test.A, test.x[i : i + 1]
    minimum_norm = initial_point(y, A, TV())
    shown = A.as_image(y)[0]
    coefficients = f"{A.measurements:,} of {x.numel():,} coefficients, the darker the larger"
    quality = f"{w.fixed(float(psnr(minimum_norm, x)[0]), 2)} dB"
    return [
        Picture(png(x[0], "gray"), f"{name}, the true image", "Truth", name),
        Picture(
            _measured(y[0], A), f"Measurements of {name}: size of the kept coefficients", "y, as log |y|", coefficients
        )
        if isinstance(A, SRM)
        else Picture(
            png(shown, "stretched"), f"Measurements of {name}", "Measured", " × ".join(map(str, shown.shape[-2:]))
        ),
        Picture(png(A.A_adjoint(y)[0], "stretched"), f"{name}: back-projection", "Aᵀy", "stretched"),
        Picture(png(minimum_norm[0], "gray"), f"{name}: minimum-norm solution", "Minimum norm", quality),
    ]


def _recovered(scene: _Scene, row: Row, i: int, tv: Row | None) -> Picture:
    x, truth = scene.recovered[row.name][i], scene.test.x[i].numpy()
    name, value = scene.test.names[i], float(_psnr(x[None], scene.test.x[i : i + 1])[0])
    caption = f"{w.fixed(value, 2)} dB"
    if tv is not None and tv is not row and i < len(tv.psnr):
        caption += f", {w.signed(value - float(tv.psnr[i]))} against TV"
    error = png(x - truth, "error", scene.scale), f"{name}: error of {row.label}"
    return Picture(png(x, "gray"), f"{name} recovered by {row.label}, {caption}", row.label, caption, error)


def _measured(y: torch.Tensor, A: SRM) -> str:
    """The measurements at their positions in the plane of the transform; unmeasured coefficients are blue-gray."""
    size = np.log10(np.abs(y.numpy()) + 1e-6)
    low, high = np.quantile(size, [0.02, 0.999])
    level = np.clip((high - size) / max(high - low, 1e-9), 0.0, 1.0)
    # The planes of several channels are one above the other.
    channels, h, width = A.image_shape
    plane = np.tile(np.array([214, 222, 232], np.uint8), (channels * h * width, 1))
    rows = A.rows.numpy()
    plane[rows] = np.round(255 * level[:, None]).astype(np.uint8)
    return _uri(Image.fromarray(plane.reshape(channels * h, width, 3)))


def png(image: np.ndarray | torch.Tensor, kind: str, end: float = 1.0) -> str:
    """A data URI of an image `[H, W]` or `[C, H, W]`: "gray" (or in color, of three channels) from 0 to 1, "stretched"
    to its range, "error" from -end to end, the mean of the channels."""
    image = np.nan_to_num(np.asarray(image, np.float64))
    if image.ndim == 3 and (kind == "error" or len(image) != 3):
        image = image.mean(0)
    if kind == "error":
        from matplotlib import colormaps

        level = np.round(255 * np.clip((image + end) / (2 * end), 0.0, 1.0)).astype(np.uint8)
        indexed = Image.fromarray(level, "L")
        indexed.putpalette((colormaps["RdBu"](np.arange(256))[:, :3] * 255).round().astype(np.uint8).tobytes())
        return _uri(indexed)
    low, high = (0.0, 1.0) if kind == "gray" else (float(image.min()), float(image.max()))
    level = np.clip((image - low) / max(high - low, 1e-9), 0.0, 1.0)
    values = np.round(255 * level).astype(np.uint8)
    return _uri(Image.fromarray(values) if values.ndim == 2 else Image.fromarray(values.transpose(1, 2, 0).copy()))


def _uri(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
