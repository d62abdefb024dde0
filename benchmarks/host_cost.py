"""Measure the host's cost of GPU launches, without a GPU.

    python benchmarks/host_cost.py [--against CHECKOUT] [--rounds 7] [--cases gradient hvp ...]

Triton's launcher runs with a stand-in for the driver. Nothing is compiled and launches return immediately; tensors are
small and on the host. Times are microseconds of this process's CPU per call, medians over rounds. With `--against` two
processes alternate, the second with the package of that checkout, and the ratios within rounds are printed as well.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def site(checkout: Path, folder: Path) -> Path:
    """A copy of a checkout's package, with its kernels in the places of an installation."""
    ignored = shutil.ignore_patterns("__pycache__", "kernels", "cuda")
    shutil.copytree(checkout / "deepreg_fast", folder / "deepreg_fast", ignore=ignored)
    shutil.copytree(checkout / "kernels", folder / "deepreg_fast/kernels", ignore=ignored)
    shutil.copytree(checkout / "csrc/cuda", folder / "deepreg_fast/cuda", ignore=ignored)
    return folder


class Idle:
    """A compiled kernel whose launch does nothing."""

    function, packed_metadata = None, ()

    def launch_metadata(self, *_: Any) -> None:
        """Does nothing."""

    def run(self, *_: Any) -> None:
        """Return immediately."""


def _without_device() -> None:
    """Make Triton use idle kernels instead of compiling."""
    from sass_counts import StandIn
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    def compile_nothing(self: Any, key: Any, signature: Any, device: Any, *_: Any) -> Idle:
        idle = self.device_caches[device][0][key] = Idle()
        return idle

    driver.set_active(StandIn(90))  # pyright: ignore[reportArgumentType] - what of it is asked for
    JITFunction._do_compile = compile_nothing  # type: ignore[method-assign]


def cases() -> dict[str, Callable[[], object]]:
    """Calls by name. Their outputs are undefined and never read."""
    import torch

    import deepreg_fast as dr
    from deepreg_fast import backend
    from deepreg_fast.backend.gpu import conv_chain, decisions
    from deepreg_fast.backend.gpu.vectors import GpuVectors
    from deepreg_fast.batched.loop import simulate_device
    from deepreg_fast.solvers.cg import _ConjugateGradients
    from deepreg_fast.solvers.linear_system import System
    from deepreg_fast.solvers.options import PGDOptions
    from deepreg_fast.solvers.pgd import _Run

    vectors = GpuVectors()
    # In checkouts without this class, `GpuVectors` has the decisions.
    scalars = getattr(decisions, "GpuDecisions", GpuVectors)()
    registry: Any = backend
    registry.vector_kernels, registry.decision_kernels = lambda *_: vectors, lambda *_: scalars
    x = torch.rand(8, 1, 16, 16)
    reg: Any = dr.RED(16, 3, "pixel", head="red")
    form: Any = reg.kernel_form()
    lin = conv_chain.GpuLinearization(reg, form, x)
    solve = _ConjugateGradients(System(lambda v: v, x, None, 1e-6), None)

    class Gradient:
        """A regularizer without kernels."""

        center = 0.0

        def computed_by_backend(self) -> bool:
            """Its results carry no graph."""
            return True

        def value_and_grad(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            """Arbitrary numbers."""
            return x[:, 0, 0, 0], x

    class Nothing:
        """A proximal map that is the identity."""

        has_shifted_inverse = True

        def prox_l2(self, z: torch.Tensor, *_: Any) -> torch.Tensor:
            """z."""
            return z

        def A(self, x: torch.Tensor) -> torch.Tensor:
            """x, flattened."""
            return x.flatten(1)

    operator: Any = Nothing()
    regularizer: Any = Gradient()
    run = _Run(x.flatten(1), operator, regularizer, torch.ones(8), PGDOptions(), x, None)

    def round_of_pgd() -> None:
        with simulate_device():
            run.round()

    def iteration_of_cg() -> None:
        with simulate_device():
            solve.step()

    run.begin()
    return {
        "gradient": lambda: conv_chain.value_and_grad(form, x),
        "linearize": lambda: conv_chain.GpuLinearization(reg, form, x),
        "hvp": lambda: lin.hvp(x),
        "param_vjp": lambda: lin.param_vjp(x),
        "cg iteration without product": iteration_of_cg,
        "pgd round without gradient": round_of_pgd,
    }


def serve(names: list[str]) -> None:
    """Print the microseconds of the calls, by name, for each line of input."""
    import torch

    torch.set_num_threads(1)
    _without_device()
    calls = {name: call for name, call in cases().items() if not names or name in names}
    for call in calls.values():
        call()
    for _ in sys.stdin:
        print(json.dumps({name: _microseconds(call) for name, call in calls.items()}), flush=True)


def _microseconds(call: Callable[[], object], calls: int = 100) -> float:
    begin = time.thread_time()
    for _ in range(calls):
        call()
    return (time.thread_time() - begin) / calls * 1e6


def main() -> None:
    """Measure, or serve another process that measures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, help="another checkout, to compare with")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--cases", nargs="*", default=[])
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.cases)
        return
    checkouts = {"here": ROOT} | ({"there": arguments.against.resolve()} if arguments.against else {})
    with tempfile.TemporaryDirectory() as scratch:
        children = {}
        for name, checkout in checkouts.items():
            path = os.pathsep.join((str(site(checkout, Path(scratch) / name)), str(ROOT / "benchmarks")))
            command = [sys.executable, __file__, "--serve", "--cases", *arguments.cases]
            children[name] = subprocess.Popen(
                command,
                env={**os.environ, "PYTHONPATH": path},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        measured: dict[str, list[dict[str, float]]] = {name: [] for name in children}
        for _ in range(arguments.rounds):
            for name, child in children.items():
                assert child.stdin is not None and child.stdout is not None
                child.stdin.write("\n")
                child.stdin.flush()
                measured[name].append(json.loads(child.stdout.readline()))
        for child in children.values():
            child.communicate()
    for case in measured["here"][0]:
        times = {name: [r[case] for r in rounds] for name, rounds in measured.items()}
        line = "  ".join(f"{name} {median(values):7.1f} us" for name, values in times.items())
        if "there" in times:
            ratios = [a / b for a, b in zip(times["there"], times["here"], strict=True)]
            line += f"  there / here {median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        print(f"{case:30} {line}")


if __name__ == "__main__":
    main()
