"""Compile every Triton kernel that ships, without a GPU, and print what each needs: `python tests/aot.py`.

One JSON line per variant and architecture: registers per thread, bytes of stack and local memory (spilled registers),
bytes of shared memory, or the compiler's error. Triton's interpreter replaces the compiler for a whole process, so that
tests run this file in a process of its own (`tests/test_aot.py`).
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

# Before triton is imported. Multiplications and additions are fused, as every version up to 3.9 does unasked.
os.environ.pop("TRITON_INTERPRET", None)
os.environ["TRITON_DEFAULT_FP_FUSION"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1]))

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from deepreg_fast import kernels
from deepreg_fast.kernels.variants import Variant

TOOLS = Path(str(triton.__file__)).parent / "backends/nvidia/bin"
ARCHITECTURES = (80, 90, 100) if (TOOLS / "ptxas-blackwell").exists() else (80, 90)


@triton.jit
def spilling(x, y, N: tl.constexpr):
    """256 values in each thread of one warp, all wanted at once: they cannot lie in 255 registers."""
    i = tl.arange(0, N)
    v = tl.load(x + i)
    tl.debug_barrier()
    tl.store(y, tl.sum(v * v))
    tl.debug_barrier()
    tl.store(y + i, v)


SPILLING = Variant(spilling, {"x": "*fp32", "y": "*fp32"}, {"N": 32 * 256}, num_warps=1, num_stages=1)


def modules() -> list[str]:
    """The modules of `deepreg_fast.kernels`, such as `conv_chain.pixel_norm`."""
    found = pkgutil.walk_packages(kernels.__path__, f"{kernels.__name__}.")
    return sorted(m.name.removeprefix(f"{kernels.__name__}.") for m in found if not m.ispkg)


def variants(module: str) -> list[Variant]:
    """What a module ships; `spilling` is the kernel of this file that must be caught."""
    if module == "spilling":
        return [SPILLING]
    if module not in modules():
        raise SystemExit(f"The module must be one of {', '.join(modules())}, but is {module!r}.")
    found = importlib.import_module(f"deepreg_fast.kernels.{module}")
    return found.variants() if hasattr(found, "variants") else []


def resources(cubin: bytes) -> dict[str, int]:
    """Registers, stack and local memory of the one kernel in a cubin, as its own tables say."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(TOOLS / "cuobjdump"), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {key.lower(): int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}


def compiled(variant: Variant, architecture: int) -> dict[str, int]:
    """What one variant needs on one architecture."""
    names = variant.kernel.arg_names
    signature = {n: "constexpr" if n in variant.constexprs else variant.signature[n] for n in names}
    # Tensors of torch start at multiples of 16 bytes; the launcher tells the compiler so, too.
    attrs: dict[Any, Any] = {
        (i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature[n].startswith("*")
    }
    source = ASTSource(variant.kernel, signature, {(names.index(n),): v for n, v in variant.constexprs.items()}, attrs)
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages, "maxnreg": variant.maxnreg}
    done = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    return {**resources(done.asm["cubin"]), "shared": done.metadata.shared}


def row(task: tuple[str, int, int]) -> dict[str, object]:
    """The line of variant number `i` of a module."""
    module, i, architecture = task
    variant, start = variants(module)[i], time.perf_counter()
    about: dict[str, object] = {"module": module, "kernel": variant.kernel.__name__, "sm": architecture}
    shown = {k: getattr(v, "__name__", v) for k, v in variant.constexprs.items()}
    about |= {"constexprs": shown, "warps": variant.num_warps, "stages": variant.num_stages}
    try:
        about |= compiled(variant, architecture)
    except Exception as error:  # of whatever type: the table shows it
        about["error"] = f"{type(error).__name__}: {error}"
    return about | {"seconds": round(time.perf_counter() - start, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("modules", nargs="*", help="modules of kernels/, or 'spilling'; all of kernels/ if none")
    parser.add_argument("--sm", type=int, nargs="+", default=ARCHITECTURES, help="architectures")
    given = parser.parse_args()
    tasks = [
        (module, i, architecture)
        for module in given.modules or modules()
        for i, architecture in product(range(len(variants(module))), given.sm)
    ]
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        with ProcessPoolExecutor(2, multiprocessing.get_context("fork")) as pool:
            for line in pool.map(row, tasks):
                print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
