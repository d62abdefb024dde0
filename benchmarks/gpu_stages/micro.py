"""Rates, per multiprocessor and clock, of the instructions on which the design of a fused kernel depends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from gpu_stages.common import Stage

TURNS, EACH = 512, 8
"""Iterations of a kernel's loop, instructions per iteration."""
WORK = {
    "ffma": (32, "multiply-adds"),
    "mufu_ex2": (32, "exponentials"),
    "ldmatrix_x4": (512, "bytes"),
    "mma_f16_m16n8k16": (2 * 16 * 8 * 16, "flops"),
    "mma_tf32_m16n8k8": (2 * 16 * 8 * 8, "flops"),
    "wgmma_f16_m64n16k16_ss": (2 * 64 * 16 * 16 // 4, "flops"),
    "wgmma_tf32_m64n16k8_rs": (2 * 64 * 16 * 8 // 4, "flops"),
    "wgmma_f16_m64n48k16_ss": (2 * 64 * 48 * 16 // 4, "flops"),
}
"""Work of one instruction of one warp; a warpgroup's product counts as a quarter for each of its warps."""


def micro(stage: Stage) -> None:
    """Compile (or load from the cache) and measure with 4, 8 and 12 warps per multiprocessor."""
    from deepreg_fast.backend.gpu import nvrtc

    source = {"micro.cu": Path(__file__).with_name("micro.cu").read_text(encoding="utf-8")}
    if stage.mode == "dry":
        stage.say(f"{len(WORK)} kernels, measured on a device only")
        return
    cubin = _cubin(nvrtc, source)
    if not stage.on_gpu:
        stage.say(f"{len(WORK)} kernels compiled, {len(cubin) // 1024} KiB")
        return
    import cupy.cuda

    module: Any = cupy.cuda.function.Module()
    module.load(cubin)
    blocks = torch.cuda.get_device_properties(stage.device).multi_processor_count
    sink = torch.zeros(blocks, device=stage.device)
    clocks = torch.zeros(blocks, dtype=torch.int64, device=stage.device)
    for name in WORK:
        function = module.get_function(name)
        stage.item(name, lambda n=name, f=function: _measure(stage, n, f, sink, clocks), 3.0)


def _cubin(nvrtc: Any, source: dict[str, str]) -> bytes:
    """Compile through the cache of the package's sources; warpgroup products need the architecture-specific target."""
    sources = nvrtc.sources
    nvrtc.sources = lambda _: source
    try:
        return nvrtc.compiled("micro.cu", (), "sm_90a")
    finally:
        nvrtc.sources = sources


def _measure(stage: Stage, name: str, function: Any, sink: torch.Tensor, clocks: torch.Tensor) -> None:
    (work, unit), rates = WORK[name], []
    for warps in (4, 8, 12):
        arguments = (np.uint64(sink.data_ptr()), np.uint64(clocks.data_ptr()), np.int32(TURNS))
        for _ in range(3):
            function((len(clocks),), (32 * warps,), arguments)
        stage.synchronize()
        elapsed = float(clocks.double().median())
        rates.append(warps * TURNS * EACH * work / elapsed)
    stage.record.setdefault("rates", {})[name] = rates
    shown = " / ".join(f"{r:.0f}" for r in rates)
    stage.say(f"{name}: {shown} {unit} a clock and multiprocessor with 4 / 8 / 12 warps")
