"""Worker of `gpu_session.py`: reads stages from standard input, one JSON object per line, and runs them."""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

MODULES = {
    **dict.fromkeys(("machine", "tests", "precision", "memcheck", "racecheck"), "checks"),
    **dict.fromkeys(("peers", "loops", "compiled", "compile_ahead"), "peers"),
    **dict.fromkeys(("scale", "training"), "scale"),
    **{name: name for name in ("smoke", "timing", "micro", "ncu")},
}


def _run(request: dict[str, Any], log: Any, mode: str) -> None:
    from gpu_stages.common import STICKY, DeviceLost, Stage, one_line

    stage = Stage(
        request["stage"], Path(request["path"]), request["seconds"], mode, request["data"], frozenset(request["skip"]),
        log=log,
    )  # fmt: skip
    if stage.path.exists():
        # An earlier process started the stage.
        stage.record = json.loads(stage.path.read_text(encoding="utf-8"))
    lost = False
    try:
        module = importlib.import_module(f"gpu_stages.{MODULES[stage.name]}")
        getattr(module, stage.name)(stage)
    except DeviceLost as error:
        stage.say(f"the CUDA context is lost: {error}")
        lost = True
    except Exception as error:
        import traceback

        traceback.print_exc()
        stage.record.setdefault("items", {})[stage.name] = one_line(error)
        stage.say(f"{stage.name}: FAILED: {one_line(error)}")
    stage.note_compiled()
    from deepreg_fast.batched import graphs

    lost_graphs = [str(device) for device in getattr(graphs, "_NO_GRAPH", ())]
    if lost_graphs:
        stage.say(f"CUDA graphs are off on {', '.join(lost_graphs)}: a capture failed (see the warnings)")
    stage.save(graphs_off=lost_graphs, state="lost" if lost else "done", running=None)
    if lost:
        os._exit(STICKY)


def main() -> None:
    """Serve stages until the input ends."""
    mode = sys.argv[1]
    if mode == "stand-in":
        from gpu_stages import stand_in

        stand_in.install()
    from gpu_stages.compile_log import CompileLog

    log = CompileLog().start()
    began = time.monotonic()
    if mode == "gpu":
        import torch

        # Create the CUDA context in advance, so that the first stage does not wait for it.
        torch.zeros(1, device="cuda")
    print(f"worker ready after {time.monotonic() - began:.1f} s", flush=True)
    for line in sys.stdin:
        _run(json.loads(line), log, mode)


if __name__ == "__main__":
    main()
