"""Summary of a row's trainings from their logs: cost, settings and a thinned curve."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from .folder import Folder
from .settings import Chain, Row

POINTS = 400
_COLUMNS = ("loss", "val_psnr", "beta_hat", "mu")


def training(folder: Folder, row: Row, chain: Chain) -> dict[str, Any]:
    """Seconds, steps and settings of the chain's stages, and the training curve. `seconds_all` includes the chains that
    were not chosen."""
    stages, lines, steps_done = [], [], 0
    for stage in chain.stages:
        stage_lines = _lines(folder.stage(row, stage) / "metrics.jsonl")
        stages.append(
            {
                "folder": stage.folder,
                "steps": stage.config["steps"],
                "seconds": _seconds(stage_lines),
                "config": stage.config,
            }
        )
        lines += [{**line, "step": line["step"] + steps_done} for line in stage_lines]
        steps_done += stage.config["steps"]
    seconds = sum(s["seconds"] for s in stages)
    images = sum(s["steps"] * s["config"]["batch"] for s in stages)
    seconds_all = sum(_seconds(_lines(folder.stage(row, s) / "metrics.jsonl")) for c in row.chains for s in c.stages)
    return {
        "seconds": seconds,
        "seconds_all": seconds_all,
        "steps": steps_done,
        "images_per_second": images / seconds if seconds else None,
        "stages": stages,
        "curve": _thinned(lines),
    }


def _lines(path: Path) -> list[dict[str, Any]]:
    """The valid lines of a log."""
    return list(_parsed(path.read_text(encoding="utf-8").splitlines())) if path.exists() else []


def _parsed(texts: list[str]) -> Iterator[dict[str, Any]]:
    for text in texts:
        try:
            yield json.loads(text)
        except ValueError:
            continue


def _seconds(lines: list[dict[str, Any]]) -> float:
    return float(sum(line.get("seconds", 0.0) for line in lines))


def _thinned(lines: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """At most `POINTS` points, each the mean over an equal number of steps; None if nothing was logged."""
    out: dict[str, list[Any]] = {"step": [], **{k: [] for k in _COLUMNS}}
    for part in np.array_split(np.arange(len(lines)), min(POINTS, len(lines))) if lines else []:
        part_lines = [lines[i] for i in part]
        out["step"].append(part_lines[-1]["step"])
        for key in _COLUMNS:
            values = [line[key] for line in part_lines if key in line]
            out[key].append(float(np.mean(values)) if values else None)
    return out


def last_line(path: Path, size: int = 4096) -> dict[str, Any]:
    """The newest line of a log with a loss; empty if there is none."""
    try:
        with open(path, "rb") as f:
            f.seek(0, 2)
            f.seek(max(0, f.tell() - size))
            texts = f.read().decode("utf-8", "replace").splitlines()
    except OSError:
        return {}
    return next((d for d in reversed(list(_parsed(texts))) if isinstance(d, dict) and "loss" in d), {})
