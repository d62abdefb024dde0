"""What the trainings of a row wrote down: cost, settings, and a curve of few points."""

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
    """Seconds, steps and settings of the chain's stages, and the training curve; `seconds_all` with the chains that
    were not chosen."""
    stages, lines, before = [], [], 0
    for stage in chain.stages:
        found = _lines(folder.stage(row, stage) / "metrics.jsonl")
        stages.append(
            {
                "folder": stage.folder,
                "steps": stage.config["steps"],
                "seconds": _seconds(found),
                "config": stage.config,
            }
        )
        lines += [{**line, "step": line["step"] + before} for line in found]
        before += stage.config["steps"]
    seconds = sum(s["seconds"] for s in stages)
    images = sum(s["steps"] * s["config"]["batch"] for s in stages)
    everything = sum(_seconds(_lines(folder.stage(row, s) / "metrics.jsonl")) for c in row.chains for s in c.stages)
    return {
        "seconds": seconds,
        "seconds_all": everything,
        "steps": before,
        "images_per_second": images / seconds if seconds else None,
        "stages": stages,
        "curve": _thinned(lines),
    }


def _lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a log."""
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
    """At most `POINTS` points, each the means over as many steps; None where nothing was logged."""
    out: dict[str, list[Any]] = {"step": [], **{k: [] for k in _COLUMNS}}
    for part in np.array_split(np.arange(len(lines)), min(POINTS, len(lines))) if lines else []:
        some = [lines[i] for i in part]
        out["step"].append(some[-1]["step"])
        for key in _COLUMNS:
            values = [line[key] for line in some if key in line]
            out[key].append(float(np.mean(values)) if values else None)
    return out


def last_line(path: Path, size: int = 4096) -> dict[str, Any]:
    """The newest line of a log that tells a loss; empty if there is none."""
    try:
        with open(path, "rb") as f:
            f.seek(0, 2)
            f.seek(max(0, f.tell() - size))
            texts = f.read().decode("utf-8", "replace").splitlines()
    except OSError:
        return {}
    return next((d for d in reversed(list(_parsed(texts))) if isinstance(d, dict) and "loss" in d), {})
