"""What deepinv's import needs where torchvision's C++ does not fit torch, as beside a CPU wheel of torch."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import torch

_KEPT: list[torch.library.Library] = []


def define() -> None:
    """Define `torchvision::nms` and `qnms`, without which torchvision's import fails; deepinv never calls them."""
    spec = find_spec("torchvision")
    if spec is None or spec.origin is None or find_spec("deepinv") is None or _KEPT:
        return
    for library in Path(spec.origin).parent.glob("_C*"):
        try:
            torch.ops.load_library(str(library))
        except OSError:
            continue
        return
    shim = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        shim.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _KEPT.append(shim)
