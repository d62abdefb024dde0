"""The loop of `problems.py` and `color.py` over noises and problems, which continues from the output file."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from typing import Any

import torch

import deepreg_fast as dr
from deepreg_fast.bench.machine import describe
from deepreg_fast.files import write_atomically

Case = Callable[[str, float, argparse.Namespace], dict[str, Any]]


def run_cases(case: Case, arguments: argparse.Namespace, recorded: Sequence[str]) -> None:
    """Compute `case(problem, sigma, arguments)` where `arguments.out` lacks it. `recorded` names the arguments that the
    file stores with each case."""
    record = json.loads(arguments.out.read_text()) if arguments.out.exists() else {"cases": []}
    record["machine"], record["versions"] = describe(), {"torch": torch.__version__, "deepreg_fast": dr.__version__}
    settings = {k: getattr(arguments, k) for k in recorded}
    for noise in arguments.noise:
        for problem in arguments.problems:
            if any(c["problem"] == problem and abs(c["sigma"] * 255 - noise) < 1e-9 for c in record["cases"]):
                continue
            computed = case(problem, noise / 255, arguments) | {"settings": settings}
            record["cases"].append(computed)
            write_atomically(arguments.out, json.dumps(record, indent=1).encode())
            scores = ", ".join(f"{n} {r['psnr_mean']:.2f}" for n, r in computed["results"].items())
            print(f"{problem}, {noise:g}/255: {scores}", flush=True)
