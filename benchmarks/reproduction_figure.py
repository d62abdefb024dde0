"""Figure of the README: mean PSNR of the headline rows against the number of gradients of their recovery.

python benchmarks/reproduction_figure.py --results benchmarks/results/reproduction/results.json.gz --out docs/psnr.svg
"""

from __future__ import annotations

import argparse
import gzip
import json
from pathlib import Path

from deepreg_fast.files import write_atomically
from deepreg_fast.report.figures import Line, lines_figure

ROWS = {
    "cs5-ridge-net": "ridge and network",
    "cs5-ridge-weak": "weakly convex ridge",
    "cs5-full-size": "residual head",
    "cs5-beta10": "β = 10",
    "cs5-beta3": "β = 3",
    "cs5-beta1": "β = 1",
    "cs5-tv": "TV",
    "cs5-red": "RED",
    "cs5-gradient-step": "gradient-step",
}


def main() -> None:
    """Draw the rows that are in the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    content = options.results.read_bytes()
    if options.results.suffix == ".gz":
        content = gzip.decompress(content)
    rows = {r["name"]: r for r in json.loads(content)["rows"]}
    curves = {label: rows[name]["converged"] for name, label in ROWS.items() if name in rows}
    lines = [
        Line(label, curve["gradients"], curve["psnr_mean"], None if label == "TV" else i)
        for i, (label, curve) in enumerate(curves.items())
        if curve
    ]
    svg = lines_figure(lines, "gradients of r (log scale)", "mean PSNR (dB)", "x", opaque=True)
    write_atomically(options.out, svg.encode())


if __name__ == "__main__":
    main()
