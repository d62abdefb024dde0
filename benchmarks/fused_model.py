"""Count the machine instructions of the fused sweeps by stage, without a GPU, and predict their times.

    python benchmarks/fused_model.py [--json model.json] [--sm 90] [--images 256] [--side 180]

The kernel is that of csrc/cuda/conv_chain.cu. Instructions are counted in the SASS of the loop over steps, for each
pixel of a strip; both sides of a branch count, except stores of zeros, which fill the rows outside an image. The times
are the least that each unit of a GPU needs at the rates of `Device`, and the prediction is the largest of them, with
the assumed rate of issue. Nothing here was measured.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from itertools import product
from pathlib import Path

from deepreg_fast.backend.gpu import fused_chain, nvrtc

STAGES = ("a1", "z2 and gu2", "gu1", "output and next rows")
"""The stages of a step, each of which ends at a barrier."""
Instruction = tuple[int, str, str, bool]
"""Address, name, operands, and whether it has a predicate."""


@dataclass(frozen=True)
class Device:
    """Assumed rates of an H200: cycles per warp instruction of a scheduler, bytes per second."""

    clock: float = 1.9e9
    multiprocessors: int = 132
    schedulers: int = 4
    issue: float = 0.75
    """Warp instructions that a scheduler issues per cycle."""
    tensor: float = 4 / 0.62
    """Cycles of m16n8k16 with halves, 4 at the peak; mma.sync reaches 62 % of it."""
    special: float = 8.0
    """Cycles of a special function of 32 lanes."""
    wavefront: float = 1.0
    """Cycles of a shared-memory access, for the four schedulers together; one of 16 bytes takes four."""
    memory: float = 4.3e12


def tool(name: str) -> str:
    """A program of CUDA's toolkit that comes with Triton."""
    spec = find_spec("triton")
    assert spec is not None and spec.origin is not None, "cuobjdump comes with Triton"
    return str(Path(spec.origin).parent / "backends/nvidia/bin" / name)


def cuobjdump(cubin: bytes, option: str) -> str:
    """What the tool prints about a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool("cuobjdump"), option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def resources(cubin: bytes) -> dict[str, tuple[int, int]]:
    """Registers and bytes of stack of each kernel."""
    pattern = r"Function (\w+):\s+REG:(\d+) STACK:(\d+)"
    return {n: (int(r), int(s)) for n, r, s in re.findall(pattern, cuobjdump(cubin, "--dump-resource-usage"))}


def disassembled(cubin: bytes) -> dict[str, list[Instruction]]:
    """The instructions of each kernel."""
    pattern = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);", re.MULTILINE)
    kernels = {}
    for part in cuobjdump(cubin, "-sass").split("Function : ")[1:]:
        found = pattern.findall(part)
        kernels[part.split()[0]] = [(int(at, 16), name, rest, bool(p)) for at, p, name, rest in found]
    return kernels


def compile_sweep(sweep: str, norm: bool, sm: int, limit: int = 232448) -> tuple[bytes, str, fused_chain.Plan]:
    """The cubin of a sweep over images of 180 columns, the compiler's log, and the launch."""
    how = fused_chain.plan(180, limit)
    cubin, log = nvrtc.compile_sources(nvrtc.sources(fused_chain.SOURCE), how.options(sweep, norm), f"sm_{sm}")
    return cubin, log, how


def loops(code: list[Instruction]) -> list[tuple[int, int]]:
    """First and last instruction of each loop, by its backward branch."""
    index = {at: i for i, (at, *_) in enumerate(code)}
    found = []
    for i, (_, name, operands, _) in enumerate(code):
        targets = re.findall(r"0x([0-9a-f]+)", operands) if name.startswith("BRA") else []
        if targets and index[int(targets[-1], 16)] < i:
            found.append((index[int(targets[-1], 16)], i))
    return found


def stages(code: list[Instruction]) -> dict[str, Counter[str]]:
    """Instructions of a warp and step by stage and by the first word of their name."""
    barriers = [i for i, (_, name, *_) in enumerate(code) if name.startswith("BAR")]
    around = [(a, b) for a, b in loops(code) if sum(a <= i <= b for i in barriers) == len(STAGES)]
    first, last = min(around, key=lambda loop: loop[1] - loop[0])
    # A loop within a stage is that over three columns of taps.
    inner = [(a, b) for a, b in loops(code) if first < a and b < last and any("LDSM" in c[1] for c in code[a:b])]
    edges = [first, *(i for i in barriers if first <= i <= last)]
    counts: dict[str, Counter[str]] = {stage: Counter() for stage in STAGES}
    for stage, a, b in zip(STAGES, edges, edges[1:], strict=False):
        for i in range(a + (a != first), b + 1):
            word, operands = code[i][1].split(".")[0], code[i][2]
            if word == "STS" and operands.rstrip().endswith("RZ"):
                continue
            counts[stage][word + (".128" if word == "LDS" and ".128" in code[i][1] else "")] += (
                3 if any(c <= i <= d for c, d in inner) else 1
            )
    return counts


def per_pixel(counts: dict[str, Counter[str]]) -> dict[str, float]:
    """Warp instructions per pixel of a strip, by stage."""
    return {stage: count.total() / (16 * fused_chain.ROWS) for stage, count in counts.items()}


def predict(counts: dict[str, Counter[str]], images: int, side: int, device: Device, moved: int) -> dict[str, float]:
    """Milliseconds that each unit needs at least, and the prediction; `moved`: bytes per pixel of global memory."""
    how = fused_chain.plan(side, 232448)
    sms = device.multiprocessors
    parts = fused_chain.bands(images, how.strips, side, sms)
    rounds = -(-images * how.strips * parts // sms)
    steps = rounds * -(-(-(-side // parts) + 2 * fused_chain.REACH) // fused_chain.ROWS)
    total = sum(counts.values(), Counter())
    warps = how.blocks
    # A step's seconds for each unit of a multiprocessor.
    scheduler = warps / device.schedulers / device.clock
    shared = total["LDS"] + total["STS"] + 4 * (total["LDS.128"] + total["LDSM"])
    milliseconds = {
        "issue at 1": total.total() * scheduler,
        "issue as assumed": total.total() / device.issue * scheduler,
        "tensor cores": total["HMMA"] * device.tensor * scheduler,
        "special functions": total["MUFU"] * device.special * scheduler,
        "shared memory": shared * device.wavefront * warps / device.clock,
    }
    milliseconds = {unit: 1e3 * steps * seconds for unit, seconds in milliseconds.items()}
    milliseconds["memory"] = 1e3 * images * side**2 * moved / device.memory
    milliseconds["predicted"] = max(milliseconds.values())
    return milliseconds


def main() -> None:
    """Count, predict, print, and save the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sm", type=int, default=90, help="architecture")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--side", type=int, default=180)
    parser.add_argument("--json", help="file for the numbers")
    arguments = parser.parse_args()
    results: dict[str, object] = {**vars(arguments), "device": asdict(Device())}
    for sweep, norm in product(fused_chain.SWEEPS, (True, False)):
        cubin, _, how = compile_sweep(sweep, norm, arguments.sm)
        counts = stages(disassembled(cubin)[fused_chain.kernel_name(sweep, norm)])
        moved = {"hvp": 144, "gradient": 12}[sweep]
        found: dict[str, dict[str, float]] = {
            "instructions per pixel": {**per_pixel(counts), "all": sum(per_pixel(counts).values())},
            "milliseconds": predict(counts, arguments.images, arguments.side, Device(), moved),
        }
        title = f"{sweep}, {'LayerNorm over a pixel' if norm else 'no LayerNorm'}"
        results[title] = {**found, "registers, stack": resources(cubin), "shared": how.shared, "counts": counts}
        print(f"{title}: sm_{arguments.sm}, {how.shared} bytes shared")
        for name, (registers, stack) in resources(cubin).items():
            print(f"  {name}: {registers} registers, {stack} bytes of stack")
        for unit, numbers in found.items():
            print(f"  {unit}:", *(f"{key} {value:.2f}" for key, value in numbers.items()), sep="  ")
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(results, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
