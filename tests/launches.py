"""The package's own launches sent through Triton's real launcher and compiler, without a GPU.

The interpreter knows nothing of what a launcher makes of its arguments (integers that are 1, alignment, None, names),
and `tests/aot.py` compiles what modules list, not what is launched. Prints a JSON line for each launch that fails,
then one with the kernels that were launched. The compiler ends with its front end, where the arguments count; with
`--machine-code` it goes on to sm_90 for the first launch of each kernel and its constants (`benchmarks/prebuild.py`
compiles all launches). With `--keys` nothing is compiled: it prints a JSON line for each batch size with
what would be. Like `tests/aot.py` it needs a process of its own.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

import deepreg_fast as dr
from deepreg_fast.backend.active import active_images
from deepreg_fast.backend.gpu import conv_chain, tv
from deepreg_fast.backend.gpu import vectors as gpu_vectors
from deepreg_fast.backend.gpu.chain_options import ChainOptions
from deepreg_fast.backend.gpu.decisions import GpuDecisions
from deepreg_fast.backend.solver_kernels import PerImageState
from deepreg_fast.functional.tv import TvForm


class Driver:
    """What Triton asks of a GPU before it launches."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


FAILED: set[str] = set()
LAUNCHED: set[str] = set()
COMPILED: set[str] = set()
_RUN, _DO_COMPILE = JITFunction.run, JITFunction._do_compile


def _run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
    name = self.fn.__name__
    LAUNCHED.add(name)
    try:
        return _RUN(self, *args, grid=grid, warmup=True, **kwargs)
    except Exception as error:  # of whatever type: the test shows it
        FAILED.add(json.dumps({"kernel": name, "error": f"{type(error).__name__}: {error}"[:500]}))


class Compiled:
    """What stands for a kernel where no machine code is made."""


def _front_end(self: Any, key: str, signature: Any, device: int, constexprs: Any, options: Any, attrs: Any, *_: Any):
    """Triton's code for one launch and no further: the passes and ptxas take ten times as long."""
    cache, _, target, backend, _ = self.device_caches[device]
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    codegen, modules = backend.get_codegen_implementation(options), backend.get_module_map()
    self.ASTSource(self, signature, constexprs, attrs).make_ir(target, options, codegen, modules, context)
    cache[key] = Compiled()
    return cache[key]


def _machine_code_once(self: Any, key: str, signature: Any, device: int, constexprs: Any, *rest: Any) -> Any:
    """Machine code for the first launch of a kernel with these constants, Triton's code for the others."""
    once = f"{self.fn.__name__} {sorted((k, v) for k, v in constexprs.items() if not isinstance(v, float))}"
    if once in COMPILED:
        return _front_end(self, key, signature, device, constexprs, *rest)
    COMPILED.add(once)
    return _DO_COMPILE(self, key, signature, device, constexprs, *rest)


def keys(batch: int) -> list[str]:
    """Of all launches for a batch of images, what Triton would compile: a kernel, and what it is specialized for."""
    found: set[str] = set()

    def compile_nothing(self: Any, key: str, *_: Any) -> Compiled:
        found.add(f"{self.fn.__name__} {key}")
        return Compiled()

    JITFunction._do_compile = compile_nothing  # type: ignore[method-assign]
    vectors(batch, 6144)
    smoothed_tv((batch, 1, 7, 5))
    smoothed_tv((batch, 3, 32, 16))
    for norm, head in (("pixel", "red"), ("none", "residual"), ("image", "norm")):
        chain(norm, head, 16, 3, (batch, 7))
        # In parts of the batch, which begin anywhere.
        chain(norm, head, 16, 3, (batch, 7), plane_bytes=5 * 7 * 7 * 64)
    return sorted(found)


def vectors(B: int, n: int) -> None:
    """Everything that `GpuVectors` and `GpuDecisions` launch, for B images of n entries."""
    G, D, memory = gpu_vectors.GpuVectors(), GpuDecisions(), 5
    x = [torch.randn(B, 1, 1, n) for _ in range(8)]
    on, none = torch.ones(B, dtype=torch.bool), torch.zeros(B, dtype=torch.int64)

    def numbers(*shape: int) -> torch.Tensor:
        return torch.rand(*(shape or (B,)), dtype=torch.float64)

    G.dots((x[0], x[0]), (x[0], x[1]), (x[1], x[1]))
    G.add(x[0], numbers(), x[1], on)
    for idx in (None, torch.arange(B)):
        G.secant(idx, x[0], x[1], x[2], x[3])
        state = (torch.zeros(B, memory, n), torch.zeros(B, memory, n), x[4], x[5])
        row, rhs = G.remember(idx, state, none, on, x[0], x[1])
        D.anderson_solve(idx, row, rhs, none, none, numbers(B, memory, memory), 1e-8, torch.float32)
        G.combine(idx, state, torch.rand(B, memory), numbers(), x[0], x[1])
        G.compare(idx, x[0], x[1], x[2], x[3])
    for rows in (None, on):
        G.cg_direction(x[0], x[1], numbers(), rows)
        G.cg_move(x[0], x[1], x[2], x[3], numbers(), rows)
        G.lanczos_first(x[0], numbers(), x[1], x[2], rows)
        G.lanczos_second(x[0], numbers(), x[1], x[2], rows)
        G.minres_move((x[0], x[1], x[2], x[3]), x[4], x[5], tuple(numbers() for _ in range(6)), rows)
        G.descend(x[0], numbers(), x[1], rows)
        G.pgd_step(x[0], x[1], x[2], rows)
        G.take(rows, (x[0], x[1]), (x[2], x[3]))
        G.take(rows, (x[0], x[1]))
    sums, eps = numbers(3, B), 2.0**-23
    state_of = PerImageState(numbers(), numbers(), numbers(), on, none, none, none, on)
    D.convergence_test(state_of, sums, numbers(), dr.PGDOptions(), eps)
    for kind in ("none", "fista"):
        options = dr.PGDOptions(acceleration=kind)
        D.acceptance_test(state_of, numbers(6, B)[:5], torch.rand(B), numbers(), options, eps)
    D.anderson_update(numbers(), numbers(), none, memory, 20.0)
    D.cg_beta(numbers(2, B)[1], numbers(), on, none, on)
    D.cg_alpha(sums, numbers(2, B), numbers(), numbers(), none, on, eps, 1e38)
    D.cg_has_converged(numbers(2, B), sums, numbers(), none, numbers(), on, eps)


def chain(norm: str, head: str, channels: int, depth: int, size: tuple[int, int], **options_of: Any) -> None:
    """A gradient, a linearization and both of its products, of `size` images by pixels a side."""
    batch, side = size
    reg, x = dr.RED(channels, depth, norm, head=head), torch.rand(batch, 1, side, side)
    form, options = reg.kernel_form(), ChainOptions(**options_of)
    assert form is not None
    for rows in (None, torch.ones(batch, dtype=torch.bool)):
        with active_images(rows):
            conv_chain.value_and_grad(form, x, options)
            lin = conv_chain.GpuLinearization(reg, form, x, options)
            lin.hvp(x)
            lin.param_vjp(x)


def smoothed_tv(shape: tuple[int, ...]) -> None:
    """A gradient, a linearization and its product."""
    x = torch.rand(shape)
    for rows in (None, torch.ones(len(x), dtype=torch.bool)):
        with active_images(rows):
            tv.value_and_grad(TvForm(0.01), x)
            tv.GpuTvLinearization(dr.TV(0.01), TvForm(0.01), x).hvp(x)


def main() -> None:
    torch.set_num_threads(1)
    driver.set_active(Driver())
    JITFunction.run = _run  # type: ignore[method-assign]
    if "--keys" in sys.argv:
        for batch in (1, 2, 3, 16, 37):
            print(json.dumps({"batch": batch, "keys": keys(batch), "failed": sorted(FAILED)}))
        return
    compile_to = _machine_code_once if "--machine-code" in sys.argv else _front_end
    JITFunction._do_compile = compile_to  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        vectors(3, 6144)
        vectors(1, 7)
        smoothed_tv((1, 1, 7, 5))
        smoothed_tv((2, 3, 32, 16))
        chain("pixel", "red", 16, 3, (1, 6))
        chain("none", "residual", 5, 2, (3, 33))
        chain("image", "norm", 16, 3, (2, 16))
        chain("pixel", "red", 16, 3, (2, 16), storage="bfloat16")
    print(*sorted(FAILED), sep="\n", end="\n" if FAILED else "")
    print(json.dumps({"launched": sorted(LAUNCHED)}))


if __name__ == "__main__":
    main()
