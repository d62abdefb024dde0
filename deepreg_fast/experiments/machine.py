"""Description of the machine that computed a result."""

from __future__ import annotations

from typing import Any

import torch

from ..bench.machine import describe as describe_host


def describe(device: torch.device) -> dict[str, Any]:
    """Processor, cores, versions, and the name of the GPU if one was used."""
    host = {k: v for k, v in describe_host().items() if k != "peers"}
    return {**host, "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"}
