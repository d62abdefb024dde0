"""`deepreg-fast info`: what is here, what is missing, and how to get it."""

from __future__ import annotations

import json
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any

import typer

_OPTIONAL = {
    "triton": "pip install 'deepreg-fast[gpu]' on Linux with an NVIDIA GPU",
    "cupy-cuda13x": "pip install 'deepreg-fast[gpu]' on Linux with an NVIDIA GPU",
}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def facts() -> dict[str, Any]:
    """Everything that `info` tells, as JSON values."""
    import torch

    from .. import __version__, backends
    from ..backend.cpu import instruction_set

    return {
        "version": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "backends": backends(),
        "kernels on the cpu": None if backends()["cpu"] else instruction_set(),
        "optional": {p: _version(p) or f"missing: {how}" for p, how in _OPTIONAL.items()},
    }


def info(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Print versions, the backends with the reason why one cannot run, and missing optional parts."""
    found = facts()
    if as_json:
        print(json.dumps(found))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, box=None, pad_edge=False)
    for key in ("version", "python", "torch", "cpu", "threads", "cuda"):
        table.add_row(key, str(found[key] or "none"))
    for name, reason in found["backends"].items():
        table.add_row(f"backend {name}", "ready" if reason is None else f"not here: {reason}")
    for name, state in found["optional"].items():
        table.add_row(name, state)
    Console().print(table, markup=False)
