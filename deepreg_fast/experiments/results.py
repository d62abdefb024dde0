"""Results of all rows: differences to TV, `results.json` and `results.csv`."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from .._version import __version__
from ..errors import CheckpointError
from ..evaluation.compare import paired
from ..files import write_atomically
from .folder import Folder
from .settings import FORMAT, Row, Settings

_COLUMNS = (
    *("name", "label", "group", "method", "ratio", "beta", "parameters", "mu", "scale"),
    *("psnr_mean", "psnr_median", "ssim_mean", "seconds"),
)


def collect(folder: Folder, settings: Settings) -> list[dict[str, Any]]:
    """Write `results.json` and `results.csv` from the rows that have a result, with their differences to TV on the same
    problem. Returns the results.

    Raises
    ------
    CheckpointError
        If a result is damaged.
    """
    result_of = {r.name: _read(folder.result(r)) for r in settings.rows if folder.result(r).exists()}
    rows = [r for r in settings.rows if r.name in result_of]
    for row in rows:
        result = result_of[row.name]
        # Update the row's texts, which may have changed since; its numbers stay.
        texts = {
            **{k: getattr(row, k) for k in ("label", "group", "poster")},
            **{k: getattr(row, k) or None for k in ("compare", "setting", "unstated")},
            "value": row.value if row.compare else None,
            "vs_tv": _against_tv(row, rows, result_of),
        }
        if any(result.get(k) != v for k, v in texts.items()):
            result.update(texts)
            write_atomically(folder.result(row), json.dumps(result).encode())
    results = [result_of[r.name] for r in rows]
    first = settings.rows[0].problem
    summary = {
        "format": FORMAT,
        "version": __version__,
        "command": results[-1]["command"] if results else "",
        "machine": results[-1]["machine"] if results else {},
        "problem": asdict(first),
        "images": results[0]["images"] if results else [],
        "rows": results,
    }
    write_atomically(folder.path / "results.json", json.dumps(summary, indent=1).encode())
    write_atomically(folder.path / "results.csv", _csv(results).encode())
    return results


def _read(path: Path) -> dict[str, Any]:
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        _ = result["psnr"], result["command"], result["machine"], result["images"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} must be a result of this version, but cannot be read ({error!r}); remove it to evaluate the "
            "row again (its training is kept)."
        ) from error
    return result


def _against_tv(row: Row, rows: list[Row], results: dict[str, Any]) -> dict[str, Any] | None:
    """Paired differences to the TV row on the same problem."""

    def same(other: Row) -> bool:
        return replace(other.problem, tuning=row.problem.tuning) == row.problem

    tv = next((r for r in rows if r.method == "tv" and same(r)), None)
    if tv is None or tv is row:
        return None
    return paired(np.array(results[row.name]["psnr"]), np.array(results[tv.name]["psnr"]))


def _csv(results: list[dict[str, Any]]) -> str:
    """CSV with one line per row."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    tv = ("mean", "median", "low", "high", "wins", "images")
    writer.writerow(
        [
            *_COLUMNS,
            *(f"vs_tv_{k}" for k in tv),
            "gradients_mean",
            "not_converged",
            "training_seconds",
            "training_steps",
        ]
    )
    for r in results:
        v, t = r["vs_tv"], r["training"] or {}
        against = [v["mean"], v["median"], *v["interval"], v["wins"], v["images"]] if v else [""] * len(tv)
        failures = sum(n for k, n in r["status"].items() if k != "converged")
        writer.writerow(
            [
                *("" if r[k] is None else r[k] for k in _COLUMNS),
                *against,
                float(np.mean(r["gradients"])),
                failures,
                t.get("seconds", ""),
                t.get("steps", ""),
            ]
        )
    return out.getvalue()
