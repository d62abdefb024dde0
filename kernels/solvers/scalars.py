"""What the kernels of one solver's iteration share: scalars of an image, and the lists of shipped variants.

Vector updates change images in place, and only those for which `rows` `[B]` (bytes) is true; None means all. Inactive
images are neither read nor written, and their sums are not computed. Pieces and sums are as in `reductions.py`.

Decisions replace dozens of PyTorch operations on `[B]` tensors; a warp processes 32 images. They compute in the same
order in float64, with the same bits (no fused multiply-add), including NaN and infinities. Scalars change only for
active images (`running` `[B]`, bytes); results are written to separate tensors, `next_...`. `settings` is a float64
tensor, so that a new tolerance needs no new kernel.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from ..variants import Variant
from .reductions import PIECE, WARPS

NUMBERS = ("s", "c", "oldeps", "delta", "gamma", "phi", "keep_r", "tail", "rows")
"""Tensors with one number or flag per image."""

BLOCK = 32

# deepreg_fast.Status, and the status of a linear solve that has not stopped
RUNNING = tl.constexpr(-1)
CONVERGED = tl.constexpr(0)
MAX_ITERATIONS = tl.constexpr(1)
STAGNATED = tl.constexpr(2)
NEGATIVE_CURVATURE = tl.constexpr(3)
NON_FINITE = tl.constexpr(4)
RUNAWAY = tl.constexpr(5)


@triton.jit
def number(s, image):
    """The number of an image, in the images' precision."""
    return tl.load(s + image).to(tl.float32)


@triton.jit
def finite(a):
    """Whether a number is neither NaN nor infinite."""
    return tl.abs(a) < float("inf")


@triton.jit
def larger(a, b):
    """`torch.maximum`: NaN if either is."""
    return tl.where((a > b) | (a != a), a, b)


@triton.jit
def smaller(a, b):
    """`torch.minimum`: NaN if either is."""
    return tl.where((a < b) | (a != a), a, b)


def updates(*kernels: Any) -> list[Variant]:
    """Vector updates as shipped, for images of 180 x 180."""
    kinds = dict.fromkeys((*NUMBERS, "partial"), "*fp64") | {"rows": "*u8"}
    size: dict[str, object] = {"N": 32400, "PIECE": PIECE}
    return [
        Variant(kernel, {n: kinds.get(n, "*fp32") for n in kernel.arg_names if n not in size}, size, WARPS, 1)
        for kernel in kernels
    ]


def decisions(*kernels: Any) -> list[Variant]:
    """Decisions as shipped."""
    flags = ("plain_next", "restarted", "running", "accept", "forget")
    counts = ("gradients", "iterations", "status", "stagnant_steps")
    kinds = dict.fromkeys((*flags, *(f"next_{n}" for n in flags)), "*u8") | {"value": "*fp32", "images": "i32"}
    kinds |= dict.fromkeys((*counts, *(f"next_{n}" for n in counts)), "*i64")
    constants: dict[str, object] = {"EPS": 2.0**-23, "BLOCK": BLOCK, "PLAIN": False, "MAX_NORM": 1e38}
    return [
        Variant(
            kernel,
            {n: kinds.get(n, "*fp64") for n in kernel.arg_names if n not in constants},
            {n: v for n, v in constants.items() if n in kernel.arg_names},
            BLOCK // 32,
            1,
        )
        for kernel in kernels
    ]
