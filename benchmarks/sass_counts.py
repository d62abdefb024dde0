"""Count the machine instructions of the conv chain's launches, without a GPU.

    python benchmarks/sass_counts.py [--json counts.json] [--sm 90] [--norms pixel none] [--channels 16] ...

The package's launches go through Triton's launcher and compiler with a stand-in for the driver; nothing runs.
Instructions are counted in the SASS: loop bodies are weighted by their trip counts, both sides of a branch count, and
called functions (slow paths) do not. Numbers are warp instructions per pixel: those of all programs of a launch,
including pixels of tiles beyond the image's edge, divided by the pixels of the batch.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

# Set before triton is imported. Multiplications and additions are fused, the default of all versions up to 3.9.
os.environ.pop("TRITON_INTERPRET", None)
os.environ["TRITON_DEFAULT_FP_FUSION"] = "1"

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

import deepreg_fast as dr
from deepreg_fast.backend.gpu import conv_chain
from deepreg_fast.backend.gpu.chain_options import ChainOptions

TOOLS = Path(str(triton.__file__)).parent / "backends/nvidia/bin"
CLASSES = {
    "mufu": r"MUFU",
    "global": r"LDG|STG|LD|ST|LDGSTS|ATOMG|RED|LDGDEPBAR",
    "shared": r"LDS|STS|LDSM|STSM",
    "tensor": r"HGMMA|HMMA",
    "barrier": r"BAR|MEMBAR|WARPSYNC|WARPGROUP|DEPBAR|FENCE|ERRBAR|CCTL",
    "control": r"BRA|EXIT|CALL|RET|NOP|BSSY|BSYNC|S2R|S2UR|CS2R|LDC|ULDC|BREAK",
}
"""Classes of instructions by the first word of their name; all others are "alu"."""


class StandIn:
    """Stand-in for the methods of a GPU's driver that Triton calls before a launch."""

    def __init__(self, architecture: int) -> None:
        self._target = GPUTarget("cuda", architecture, 32)

    def get_current_device(self) -> int:
        """The first device."""
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        """The default stream."""
        return device * 0

    def get_current_target(self) -> GPUTarget:
        """The architecture to compile for."""
        return self._target


@dataclass(frozen=True)
class Launch:
    """One launch: the kernel, its grid, its arguments by name, and the compiled kernel."""

    kernel: str
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    compiled: Any


@contextmanager
def recorded(architecture: int) -> Iterator[list[Launch]]:
    """Context that records launches; they are compiled but not run."""
    launches: list[Launch] = []
    run = JITFunction.run

    def record(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        compiled = run(self, *args, grid=grid, warmup=True, **kwargs)
        arguments = dict(zip(self.arg_names, args, strict=False)) | kwargs
        launches.append(Launch(self.fn.__name__, tuple(grid), arguments, compiled))
        return compiled

    driver.set_active(StandIn(architecture))  # pyright: ignore[reportArgumentType] - what of it is asked for
    JITFunction.run = record  # type: ignore[method-assign]
    try:
        yield launches
    finally:
        JITFunction.run = run  # type: ignore[method-assign]


Instruction = tuple[int, str, str, bool]
"""Address, name, operands, and whether it has a predicate."""


def disassembled(cubin: bytes) -> list[Instruction]:
    """The instructions of a cubin with one kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(TOOLS / "cuobjdump"), "-sass", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    lines = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);", text, re.MULTILINE)
    return [(int(at, 16), name, rest, bool(predicate)) for at, predicate, name, rest in lines]


def _flow(code: list[Instruction]) -> list[list[int]]:
    """Control-flow graph: the possible successors of each instruction, by number. A call returns to the next one."""
    index = {at: i for i, (at, *_) in enumerate(code)}
    following = []
    for i, (_, name, operands, predicated) in enumerate(code):
        successors = [i + 1] if i + 1 < len(code) else []
        word = name.split(".")[0]
        if word == "BRA":
            target = index[int(re.findall(r"0x([0-9a-f]+)", operands)[-1], 16)]
            conditional = predicated or bool(re.match(r"!?U?P\d", operands.strip()))
            successors = [target, *(successors if conditional else [])]
        elif word in ("EXIT", "RET") and not predicated:
            successors = []
        following.append(successors)
    return following


def weights(code: list[Instruction], trips: float, inner: float = 1.0) -> dict[int, float]:
    """Number of executions of each reachable instruction, by number. Outer loops make `trips` iterations; nested loops
    make `inner` iterations in each."""
    following = _flow(code)
    reached, pending = set(), [0]
    while pending:
        i = pending.pop()
        if i not in reached:
            reached.add(i)
            pending += following[i]
    predecessors: dict[int, list[int]] = {i: [] for i in reached}
    for i in reached:
        for j in following[i]:
            predecessors[j].append(i)
    loops: dict[int, set[int]] = {}
    for tail in sorted(reached):
        for first in following[tail]:
            if first > tail or not _dominates(first, tail, following):
                continue
            body, pending = loops.setdefault(first, {first}), [tail]
            while pending:
                i = pending.pop()
                if i not in body:
                    body.add(i)
                    pending += predecessors[i]
    count = dict.fromkeys(sorted(reached), 1.0)
    for first, body in loops.items():
        nested = any(first in other for start, other in loops.items() if start != first)
        for i in body:
            count[i] *= inner if nested else trips
    return count


def _dominates(first: int, tail: int, following: list[list[int]]) -> bool:
    """Whether every path from the entry to `tail` passes through `first`."""
    seen, pending = {first}, [0] if first else []
    while pending:
        i = pending.pop()
        if i == tail:
            return False
        if i not in seen:
            seen.add(i)
            pending += following[i]
    return True


def class_of(name: str) -> str:
    """A key of `CLASSES`, or "alu"."""
    word = name.split(".")[0]
    return next((key for key, words in CLASSES.items() if re.fullmatch(words, word)), "alu")


def resources(cubin: bytes) -> dict[str, int]:
    """Registers, stack and local memory of the kernel in a cubin, from its resource tables."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(TOOLS / "cuobjdump"), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {key.lower(): int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}


def trips_of(launch: Launch) -> float:
    """Trip count of a kernel's loop: over rows of taps and groups of channels in a convolution, else over pieces."""
    arguments = launch.arguments
    if launch.kernel == "outer_sums":
        return arguments["pieces"] / launch.grid[1]
    if launch.kernel in ("merge", "add_tiles"):
        return -(-arguments["tiles"] // arguments["BLOCK"])
    if launch.kernel == "total":
        return arguments["BLOCKS"]
    cp = arguments.get("CP", 16)
    return 3 if cp == 16 else 9 * cp // 32


def counted(launch: Launch, pixels: int) -> dict[str, Any]:
    """One row of the table."""
    cubin, warps = launch.compiled.asm["cubin"], launch.compiled.metadata.num_warps
    code = disassembled(cubin)
    count: Counter[str] = Counter()
    for i, weight in weights(code, trips_of(launch)).items():
        count[class_of(code[i][1])] += weight  # type: ignore[assignment] - an average number of iterations
    per_pixel = prod(launch.grid) * warps / pixels
    split = {key: round(count[key] * per_pixel, 2) for key in ("alu", *CLASSES)}
    total = sum(count.values())
    return {
        "kernel": launch.kernel,
        "ways": _ways(launch),
        **resources(cubin),
        "shared_bytes": launch.compiled.metadata.shared,
        "warps": warps,
        "programs": prod(launch.grid),
        "per_warp": round(total, 1),
        "per_pixel": round(total * per_pixel, 2),
        **split,
    }


def _ways(launch: Launch) -> str:
    """The layer and the direction of a launch."""
    words = [n.lower() for n in ("FIRST", "LAST", "FORWARD", "BACKWARD", "ONE") if launch.arguments.get(n)]
    return " ".join(words) or "-"


SWEEPS = ("gradient", "linearize", "hvp", "param_vjp")


def sweeps(arguments: argparse.Namespace, norm: str) -> dict[str, Callable[[], object]]:
    """The selected sweeps, by name."""
    reg = dr.RED(arguments.channels, arguments.depth, norm, head="red")
    x = torch.zeros(arguments.images, 1, arguments.side, arguments.side)
    form, options = reg.kernel_form(), ChainOptions(arguments.precision)
    assert form is not None
    lin = conv_chain.GpuLinearization(reg, form, x, options)
    calls: dict[str, Callable[[], object]] = {
        "gradient": lambda: conv_chain.value_and_grad(form, x, options),
        "linearize": lambda: conv_chain.GpuLinearization(reg, form, x, options),
        "hvp": lambda: lin.hvp(x),
        "param_vjp": lambda: lin.param_vjp(x),
    }
    return {name: calls[name] for name in arguments.sweeps}


COLUMNS = ("reg", "stack", "local", "shared_bytes", "warps", "per_warp", "per_pixel", "alu", *CLASSES)


def main() -> None:
    """Count, print, and save the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sm", type=int, default=90, help="architecture")
    parser.add_argument("--norms", nargs="+", default=["pixel", "none"])
    parser.add_argument("--sweeps", nargs="+", default=list(SWEEPS), choices=SWEEPS)
    parser.add_argument("--channels", type=int, default=16)
    parser.add_argument("--depth", type=int, default=3)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--side", type=int, default=180)
    parser.add_argument("--precision", default="tf32x3")
    parser.add_argument("--json", help="file for the numbers")
    arguments = parser.parse_args()
    pixels = arguments.images * arguments.side**2
    results: dict[str, Any] = {"triton": triton.__version__, **vars(arguments)}
    print(f"Triton {triton.__version__}, sm_{arguments.sm}; warp instructions per pixel", *COLUMNS, sep="\t")
    for norm in arguments.norms:
        with recorded(arguments.sm) as launches:
            for name, call in sweeps(arguments, norm).items():
                launches.clear()
                call()
                lines = [counted(launch, pixels) for launch in launches]
                for line in lines:
                    print(f"{norm} {name}: {line['kernel']} {line['ways']}", *(line[c] for c in COLUMNS), sep="\t")
                total = {c: round(sum(line[c] for line in lines), 1) for c in COLUMNS[6:]}
                print(f"{norm} {name}: all {len(lines)}", *[""] * 6, *total.values(), sep="\t", flush=True)
                results[f"{norm} {name}"] = {"launches": lines, "total": total}
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(results, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
