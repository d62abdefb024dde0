"""`deepreg-fast info`: versions, available backends, missing optional packages and how to install them."""

from __future__ import annotations

import json
import os
import platform
import re
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import typer

from ..machine import NO_CUDA, extension, instruction_set, may_have_cuda, torch_build

_OPTIONAL = {
    "triton": "pip install 'deepreg-fast[gpu]' on Linux with an NVIDIA GPU",
    "cupy-cuda13x": "pip install 'deepreg-fast[gpu]' on Linux with an NVIDIA GPU",
}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _driver() -> str | None:
    """The version of NVIDIA's driver, as its kernel module reports it."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
    except OSError:
        return None
    match = re.search(r"\b\d{3,}\.\d+(\.\d+)?\b", text)
    return match.group() if match else None


def _cuda() -> dict[str, Any]:
    """The CUDA version of torch's build, the driver, and the devices that torch sees."""
    driver = _driver()
    if driver is None and not may_have_cuda():
        return {"torch": torch_build()["cuda"], "driver": None, "devices": []}
    import torch

    devices = []
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        p = torch.cuda.get_device_properties(i)
        gib = round(p.total_memory / 2**30, 1)
        devices.append({"name": p.name, "memory_gib": gib, "compute_capability": f"{p.major}.{p.minor}"})
    return {"torch": torch.version.cuda, "driver": driver, "devices": devices}


def _backends() -> dict[str, str | None]:
    """`deepreg_fast.backends()`, without importing torch if there can be no CUDA device."""
    if not may_have_cuda():
        module, reason = extension()
        return {"gpu": NO_CUDA, "cpu": None if module is not None else reason, "reference": None}
    from ..backend import backends

    return backends()


def facts() -> dict[str, Any]:
    """Everything that `info` prints, as JSON values."""
    from .. import __version__
    from ..weights import cards

    backends = _backends()
    return {
        "version": __version__,
        "python": platform.python_version(),
        "torch": torch_build()["version"],
        "machine": platform.machine(),
        "processors": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "cuda": _cuda(),
        "backends": backends,
        "kernels on the cpu": None if backends["cpu"] else instruction_set(),
        "optional": {p: _version(p) or f"missing: {how}" for p, how in _OPTIONAL.items()},
        "weights": {n: _brief(cards.card(n)) for n in cards.names()},
    }


def _brief(card: dict[str, Any]) -> dict[str, Any]:
    """The entry of one card in the list of shipped weights."""
    return {
        "title": card["title"],
        "ratio": card["operator"]["ratio"],
        "psnr_mean": card["psnr"]["mean"],
        "vs_tv_mean": card["psnr"]["vs_tv"]["mean"],
    }


def info(
    name: Annotated[str, typer.Argument(help="Shipped weights: their model card.", show_default=False)] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Print versions, backends (with the reason if one cannot run), missing optional packages and shipped weights.

    With the name of shipped weights, print their model card instead.

    Example: deepreg-fast info cs5-beta10
    """
    if name:
        from .card import show

        show(name, as_json)
        return
    values = facts()
    if as_json:
        print(json.dumps(values))
        return
    from ..terminal import facts as listed
    from ..terminal import width

    rows = [(key, str(values[key])) for key in ("version", "python", "torch", "machine", "processors")]
    cuda = values["cuda"]
    built = f"torch is built with {cuda['torch']}" if cuda["torch"] else "torch is built without it"
    rows.append(("cuda", f"{built}; driver {cuda['driver'] or 'none'}; {len(cuda['devices'])} devices"))
    for i, d in enumerate(cuda["devices"]):
        rows.append((f"cuda:{i}", f"{d['name']}, {d['memory_gib']} GiB, compute capability {d['compute_capability']}"))
    for name, reason in values["backends"].items():
        rows.append((f"backend {name}", "ready" if reason is None else f"not here: {reason}"))
    rows += values["optional"].items()
    columns = width(sys.stdout)
    print(listed(rows, columns))
    print(_weights(values["weights"], columns))


def _weights(briefs: dict[str, dict[str, Any]], columns: int | None) -> str:
    """A table of the shipped weights."""
    from ..terminal import table

    rows = [
        (name, b["title"], f"{b['ratio']:g}", f"{b['psnr_mean']:.2f} dB", f"{b['vs_tv_mean']:+.2f}")
        for name, b in briefs.items()
    ]
    return table(("shipped weights", "what", "ratio", "PSNR mean", "vs TV"), rows, columns=columns)
