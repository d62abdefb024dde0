# ruff: noqa: PLR0913 - a launch needs every pointer
"""The small numbers of Anderson acceleration, one launch before and one after the pass that makes the products.

Both take torch's operations in torch's order in float64 and give the same bits (no fused multiply-add).
"""

from __future__ import annotations

import triton.language as tl

from ..variants import Variant, unspecialized
from .decisions import BLOCK, larger
from .reductions import place_of


@unspecialized("images", anywhere=None)
def anderson_update(
    square, length, count, next_length, next_count, slot, fresh, limit, images,
    MEMORY: tl.constexpr, REACH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """From `<f, f>`: `||f||`, how many differences are kept (none where it has doubled), the slot of the newest and
    whether it is one, and the longest extrapolation."""
    b = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = b < images
    size = tl.sqrt(tl.load(square + b, mask=inside, other=0.0))
    before = tl.load(length + b, mask=inside, other=0.0)
    kept = tl.where(size > 2.0 * before, 0, tl.load(count + b, mask=inside, other=0))
    tl.store(next_length + b, size, mask=inside)
    tl.store(next_count + b, kept, mask=inside)
    tl.store(slot + b, tl.where(kept > 0, (kept - 1) % MEMORY, 0), mask=inside)
    tl.store(fresh + b, tl.where(kept > 0, 1, 0).to(tl.uint8), mask=inside)
    tl.store(limit + b, REACH * size, mask=inside)


@unspecialized("images", anywhere=("idx", "row", "rhs", "slot", "count", "next_count", "c"))
def anderson_solve(
    idx, row, rhs, slot, count, gram, next_count, c, images,
    MEMORY: tl.constexpr, WIDTH: tl.constexpr, RIDGE: tl.constexpr, TINY: tl.constexpr,
):  # fmt: skip
    """`c = argmin ||f - sum_k c_k df_k||` of one image, damped, from the Gram matrix of its differences.

    `row` and `rhs` `[MEMORY, B]`, the products of the newest difference and of f with all; `row` goes into `gram`
    `[all, MEMORY, MEMORY]` at `idx` first. A tile of `WIDTH` > MEMORY holds the matrix and, behind it, the right-hand
    side; Gauss and Jordan without pivots, which a positive definite matrix does not need.
    """
    image = tl.program_id(0).to(tl.int64)
    i, j = tl.arange(0, WIDTH)[:, None], tl.arange(0, WIDTH)[None, :]
    newest, kept = tl.load(slot + image), tl.load(count + image)
    at = gram + place_of(idx, image) * MEMORY * MEMORY + i * MEMORY + j
    matrix = (i < MEMORY) & (j < MEMORY)
    t = tl.load(at, mask=matrix, other=0.0)
    t = tl.where(i == newest, tl.load(row + j.to(tl.int64) * images + image, mask=j < MEMORY, other=0.0), t)
    t = tl.where(j == newest, tl.load(row + i.to(tl.int64) * images + image, mask=i < MEMORY, other=0.0), t)
    tl.store(at, t, mask=matrix)
    tl.store(next_count + image, kept + 1)
    used = tl.minimum(kept, MEMORY)
    t = tl.where((i < used) & (j < used), t, 0.0)
    diagonal = tl.where((i == j) & matrix, t, 0.0)
    # tl.max passes NaN over, torch does not.
    lost = tl.max(tl.max(tl.where(diagonal != diagonal, 1, 0), 1), 0)
    scale = tl.where(lost == 1, float("nan"), tl.max(tl.max(diagonal, 1), 0))
    scale = larger(scale, TINY)
    t = t + tl.where(i == j, 1.0, 0.0) * tl.where(j < used, RIDGE * scale, scale)
    t = tl.where(j == MEMORY, tl.load(rhs + i.to(tl.int64) * images + image, mask=i < used, other=0.0), t)
    for k in tl.static_range(MEMORY):  # pyright: ignore[reportGeneralTypeIssues] - its stub says NoReturn
        # Sums of one number and zeros pick it.
        line = tl.sum(tl.where(i == k, t, 0.0), 0, keep_dims=True)
        line = tl.fdiv(line, tl.sum(tl.where(j == k, line, 0.0), 1, keep_dims=True))
        t = tl.where(i == k, line, t - tl.sum(tl.where(j == k, t, 0.0), 1, keep_dims=True) * line)
    answer = tl.sum(tl.where(j == MEMORY, t, 0.0), 1)
    place = tl.arange(0, WIDTH)
    tl.store(c + image * MEMORY + place, tl.where(place < used, answer, 0.0).to(tl.float32), mask=place < MEMORY)


def width(memory: int) -> int:
    """The power of two above `memory`."""
    return 1 << memory.bit_length()


def warps(memory: int) -> int:
    """Of a program that solves: eight numbers of the tile, or fewer, in a thread."""
    return max(1, width(memory) ** 2 // 256)


def variants() -> list[Variant]:
    """The kernels as shipped, for a memory of 5 and the largest, 20."""
    numbers, counts = "*fp64", "*i64"
    turn = dict.fromkeys(("square", "length", "next_length", "limit"), numbers) | {"fresh": "*u8", "images": "i32"}
    turn |= dict.fromkeys(("count", "next_count", "slot"), counts)
    solve = dict.fromkeys(("idx", "slot", "count", "next_count"), counts) | {"c": "*fp32", "images": "i32"}
    solve |= dict.fromkeys(("row", "rhs", "gram"), numbers)
    return [Variant(anderson_update, turn, {"MEMORY": 5, "REACH": 20.0, "BLOCK": BLOCK}, 1, 1)] + [
        Variant(anderson_solve, solve, {"MEMORY": m, "WIDTH": width(m), "RIDGE": 1e-8, "TINY": 2.0**-1022}, warps(m), 1)
        for m in (5, 20)
    ]
