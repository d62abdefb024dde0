"""`deepreg-fast reproduce --quick` from beginning to end: the rows come out in the order that the method promises."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from deepreg_fast.reproduce import load_settings

ROOT = Path(__file__).parents[1]


def test_the_quick_reproduction(tmp_path: Path) -> None:
    """With the sign of the hypergradient wrong, 80 steps of beta5 end at -28 dB, below everything else. Noisy-ridge
    begins 3.6 dB below TV and ends 1.2 dB above."""
    code = "from deepreg_fast.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "reproduce", "--quick", "--out", "quick", "--workers", "2"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", "")))},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows = {r["name"]: r for r in json.loads((tmp_path / "quick/results.json").read_text())["rows"]}
    assert set(rows) == {r.name for r in load_settings("quick").rows}
    score = {name: r["psnr_mean"] for name, r in rows.items()}
    assert score["tv"] > score["minimum-norm"] > score["adjoint"]
    baselines = max(score["red"], score["gradient-step"], score["adversarial"])
    assert score["noisy-ridge"] > score["noisy-tv"] + 0.5
    assert score["beta5"] > score["beta1"] > baselines > score["minimum-norm"]
    # Lip(grad s) is held: beta1 stays flatter than beta5 on images that nobody trained on.
    assert max(rows["beta1"]["lipschitz"]["beta_hat"]) < min(rows["beta5"]["lipschitz"]["beta_hat"])
    assert (tmp_path / "quick/report.html").stat().st_size > 100_000
