"""No bit of an image depends on its batch, with any vector instructions of torch and of the C++ kernels."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from deepreg_fast.backend.cpu.extension import extension

ROOT = Path(__file__).parents[1]
CAPABILITIES = ("default", "avx2", "avx512")

# Modules that compute with numbers [B], whose bits must not depend on B: docs/design.md.
PER_IMAGE = (
    "batched/*.py",
    "solvers/*.py",
    "regularizers/lipschitz.py",
    "inverse/data_term.py",
    "evaluation/metrics.py",
)
# torch computes these by other code at the end of a vector than before it, or in an order that depends on the shape.
FORBIDDEN = frozenset(
    "hypot atan2 arctan2 sigmoid softplus silu gelu exp2 pow float_power logaddexp logaddexp2 logsumexp softmax "
    "log_softmax mean var std einsum matmul mm bmm baddbmm inner vdot tensordot prod vector_norm".split()
)


def _processors() -> list[tuple[str, str]]:
    """Pairs of a vector capability of torch and an instruction set of the C++ kernels that this machine has."""
    best = torch.backends.cpu.get_cpu_capability().lower()
    if best not in CAPABILITIES:
        return []
    module, _ = extension()
    found = module.instruction_sets() if module else [""]
    names = {"default": "portable"}
    return [
        (c, isa)
        for c in CAPABILITIES[: CAPABILITIES.index(best) + 1]
        for isa in [names.get(c, c) if module else ""]
        if isa in found
    ]


@pytest.mark.parametrize(("capability", "isa"), _processors())
def test_no_bit_of_an_image_depends_on_the_size_of_its_batch(capability: str, isa: str) -> None:
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    environment.pop("DEEPREG_FAST_ISA", None)
    if isa:
        environment["DEEPREG_FAST_ISA"] = isa
    command = [sys.executable, str(ROOT / "tests/same_bits.py"), capability, isa]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_numbers_of_images_come_from_operations_with_the_same_bits_everywhere() -> None:
    wrong = []
    for pattern in PER_IMAGE:
        paths = sorted((ROOT / "deepreg_fast").glob(pattern))
        assert paths, pattern
        for path in paths:
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Attribute) and node.attr in FORBIDDEN:
                    wrong.append(f"{path.name}:{node.lineno} {node.attr}")
                if isinstance(node, ast.BinOp) and isinstance(node.op, ast.MatMult):
                    wrong.append(f"{path.name}:{node.lineno} @")
    assert not wrong
