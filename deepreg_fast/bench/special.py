"""A chain of exponentials in registers, which measures the rate of the special-function units."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

BLOCK = 1024


@triton.jit
def _chain(out, STEPS: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = (at % 7).to(tl.float32) * 0.1
    for _ in range(STEPS):
        # A fixed point at 0.64: nothing grows and nothing ends.
        x = tl.exp2(-x)
    tl.store(out + at, x)


def exponentials(out: torch.Tensor, steps: int) -> None:
    """`steps` times `x <- 2^-x` for each entry of `out` `[n]`, n a multiple of `BLOCK`."""
    kernel: Any = _chain
    kernel[(out.numel() // BLOCK,)](out, STEPS=steps, BLOCK=BLOCK)
