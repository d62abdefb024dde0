"""Run one stage: `python -m gpu_stages NAME --json FILE`."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from pathlib import Path

HOMES = {
    **dict.fromkeys(("machine", "tests", "precision", "sanitizer"), "checks"),
    **dict.fromkeys(("kernels", "compiled", "srm", "loops", "sweep", "warm"), "speed"),
    **dict.fromkeys(("scale", "training"), "scale"),
}


def main() -> None:
    """Find the stage's function and call it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("name", choices=HOMES)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--data", default="")
    parser.add_argument("--options", default="", help="of the stage warm: launch options as JSON")
    parser.add_argument("--dry-run", action="store_true")
    arguments = parser.parse_args()
    if arguments.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"

    from gpu_stages.common import Stage

    stage = Stage(arguments.json, arguments.seconds, arguments.dry_run, arguments.data)
    stage.found["options"] = arguments.options
    module = importlib.import_module(f"gpu_stages.{HOMES[arguments.name]}")
    stage.attempt(arguments.name, lambda: getattr(module, arguments.name)(stage))
    stage.save()
    sys.exit(bool(stage.found.get("errors")))


if __name__ == "__main__":
    main()
