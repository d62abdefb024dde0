"""`deepreg-fast reproduce --quick` from beginning to end: every training learns what its method promises."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from deepreg_fast.experiments import load_settings

from . import forked
from .test_reproduce import ROOT, to_toml


def _environment() -> dict[str, str]:
    path = os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH", "")) if p)
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def _rows(folder: Path, process: Any) -> dict[str, dict[str, Any]]:
    """The rows of a reproduction that has begun, by name."""
    _, text = process.communicate()
    assert process.returncode == 0, text
    assert (folder / "quick/report.html").stat().st_size > 100_000
    rows = {r["name"]: r for r in json.loads((folder / "quick/results.json").read_text())["rows"]}
    assert set(rows) == {r.name for r in load_settings("quick").rows}
    return rows


def _smaller() -> dict[str, Any]:
    """The quick settings with the same rows on smaller images, and trainings of a few steps."""
    found = tomllib.loads((ROOT / "deepreg_fast/experiments/quick.toml").read_text(encoding="utf-8"))
    found["problem"] |= {"test_crop": 24, "tuning": 1}
    few = {"crop": 16, "batch": 2, "steps": 12, "warmup": 4, "lr": 2e-3, "validation": 2, "validation_crop": 24}
    for defaults in found["defaults"].values():
        defaults |= {**few, "validate_every": 6}
    for row in found["row"]:
        if row["method"] not in ("adjoint", "minimum_norm"):
            row["recovery"] = {**row.get("recovery", {}), "max_iterations": 40 if row["method"] == "tv" else 15}
        row.get("train", {}).update({k: few[k] for k in ("steps", "warmup") if k in row.get("train", {})})
    rows = {r["name"]: r for r in found["row"]}
    rows["red"]["train"] = {"steps": 60, "lr": 6e-3}
    for name in ("gradient-step", "adversarial"):
        rows[name]["tune"] = []
    rows["noisy-ridge"]["train"] |= {"batch": 4, "steps": 30}
    return found


def test_the_quick_reproduction_on_smaller_images(tmp_path: Path) -> None:
    """Every row from its training to the report. With the sign of the hypergradient wrong, noisy-ridge does not learn.

    That RED learns by a hypergradient, and that the penalty holds its slope, tests/test_training.py shows."""
    (tmp_path / "smaller.toml").write_text(to_toml(_smaller()), encoding="utf-8")
    options = ["reproduce", "--settings", "smaller.toml", "--out", "quick", "--workers", "1"]
    rows = _rows(tmp_path, forked.start(options, env=_environment(), cwd=tmp_path))
    score = {name: r["psnr_mean"] for name, r in rows.items()}
    assert score["tv"] > score["minimum-norm"] > score["adjoint"]
    assert score["red"] > score["minimum-norm"] + 8.0
    val: dict[str, list[float]] = {}
    for name, row in rows.items():
        assert all(map(math.isfinite, row["psnr"])), name
        if row["method"] == "bilevel":
            val[name] = [v for v in row["training"]["curve"]["val_psnr"] if v is not None]
            assert len(val[name]) == row["training"]["steps"] // 6, name
    assert val["noisy-ridge"][-1] > val["noisy-ridge"][0] + 0.5


@pytest.mark.long
def test_the_quick_reproduction(tmp_path: Path) -> None:
    """With the sign of the hypergradient wrong, beta1 and beta5 validate at -34 and -29 dB after 200 steps. Untrained,
    they recover the minimum norm, 12.5 dB below where they end. Noisy-ridge begins 3.6 dB below TV and ends 1.2 dB
    above.

    Nothing is claimed of the order of RED, beta1 and beta5: it differs between processors, whose rounding so short a
    training amplifies to tenths of a dB (RED before beta1 by 0.07 dB with AVX2).
    """
    program = [sys.executable, "-c", "from deepreg_fast.cli import main; main()"]
    process = subprocess.Popen(
        [*program, "reproduce", "--quick", "--out", "quick", "--workers", "2"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env=_environment(),
    )
    rows = _rows(tmp_path, process)
    score = {name: r["psnr_mean"] for name, r in rows.items()}
    assert score["tv"] > score["minimum-norm"] > score["adjoint"]
    assert score["noisy-ridge"] > score["noisy-tv"] + 0.5
    assert min(score["beta1"], score["beta5"], score["red"]) > score["minimum-norm"] + 10.0
    # Lip(grad s) is held: beta1 stays flatter than beta5 on images that nobody trained on.
    assert max(rows["beta1"]["lipschitz"]["beta_hat"]) < min(rows["beta5"]["lipschitz"]["beta_hat"])
