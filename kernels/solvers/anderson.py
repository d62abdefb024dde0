# ruff: noqa: PLR0913 - a launch needs every pointer
"""The scalar logic of Anderson acceleration: one launch before and one after the kernel of the products.

Both compute torch's operations in torch's order in float64, with the same bits (no fused multiply-add).
"""

from __future__ import annotations

import triton.language as tl

from ..variants import Variant, unspecialized
from .reductions import place_of
from .scalars import BLOCK, larger


@unspecialized("images", anywhere=None)
def anderson_update(
    square, length, count, next_length, next_count, slot, fresh, limit, images,
    MEMORY: tl.constexpr, REACH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """From `<f, f>`: `||f||`, the number of stored differences (0 if `||f||` has more than doubled), the slot of the
    newest one, whether there is one (`fresh`), and the longest extrapolation."""
    b = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = b < images
    size = tl.sqrt(tl.load(square + b, mask=inside, other=0.0))
    before = tl.load(length + b, mask=inside, other=0.0)
    stored = tl.where(size > 2.0 * before, 0, tl.load(count + b, mask=inside, other=0))
    tl.store(next_length + b, size, mask=inside)
    tl.store(next_count + b, stored, mask=inside)
    tl.store(slot + b, tl.where(stored > 0, (stored - 1) % MEMORY, 0), mask=inside)
    tl.store(fresh + b, tl.where(stored > 0, 1, 0).to(tl.uint8), mask=inside)
    tl.store(limit + b, REACH * size, mask=inside)


@unspecialized("images", anywhere=("idx", "row", "rhs", "slot", "count", "next_count", "c"))
def anderson_solve(
    idx, row, rhs, slot, count, gram, next_count, c, images,
    MEMORY: tl.constexpr, WIDTH: tl.constexpr, RIDGE: tl.constexpr, TINY: tl.constexpr,
):  # fmt: skip
    """`c = argmin ||f - sum_k c_k df_k||` for one image, damped, from the Gram matrix of its differences.

    `row` and `rhs` `[MEMORY, B]` are the products of the newest difference and of f with all. `row` is first written to
    `gram` `[all, MEMORY, MEMORY]` at `idx`. A tile of `WIDTH` > MEMORY holds the matrix and, in the next column, the
    right-hand side. Gauss-Jordan elimination needs no pivoting, because the matrix is positive definite.
    """
    image = tl.program_id(0).to(tl.int64)
    i, j = tl.arange(0, WIDTH)[:, None], tl.arange(0, WIDTH)[None, :]
    newest, stored = tl.load(slot + image), tl.load(count + image)
    pointers = gram + place_of(idx, image) * MEMORY * MEMORY + i * MEMORY + j
    matrix = (i < MEMORY) & (j < MEMORY)
    t = tl.load(pointers, mask=matrix, other=0.0)
    t = tl.where(i == newest, tl.load(row + j.to(tl.int64) * images + image, mask=j < MEMORY, other=0.0), t)
    t = tl.where(j == newest, tl.load(row + i.to(tl.int64) * images + image, mask=i < MEMORY, other=0.0), t)
    tl.store(pointers, t, mask=matrix)
    tl.store(next_count + image, stored + 1)
    used = tl.minimum(stored, MEMORY)
    t = tl.where((i < used) & (j < used), t, 0.0)
    diagonal = tl.where((i == j) & matrix, t, 0.0)
    # tl.max ignores NaN, torch does not.
    has_nan = tl.max(tl.max(tl.where(diagonal != diagonal, 1, 0), 1), 0)
    scale = tl.where(has_nan == 1, float("nan"), tl.max(tl.max(diagonal, 1), 0))
    scale = larger(scale, TINY)
    t = t + tl.where(i == j, 1.0, 0.0) * tl.where(j < used, RIDGE * scale, scale)
    t = tl.where(j == MEMORY, tl.load(rhs + i.to(tl.int64) * images + image, mask=i < used, other=0.0), t)
    for k in tl.static_range(MEMORY):  # pyright: ignore[reportGeneralTypeIssues] - its stub says NoReturn
        # A sum of one number and zeros selects the number.
        pivot_row = tl.sum(tl.where(i == k, t, 0.0), 0, keep_dims=True)
        pivot_row = tl.fdiv(pivot_row, tl.sum(tl.where(j == k, pivot_row, 0.0), 1, keep_dims=True))
        t = tl.where(i == k, pivot_row, t - tl.sum(tl.where(j == k, t, 0.0), 1, keep_dims=True) * pivot_row)
    solution = tl.sum(tl.where(j == MEMORY, t, 0.0), 1)
    slots = tl.arange(0, WIDTH)
    tl.store(
        c + image * MEMORY + slots, tl.where(slots < used, solution, 0.0).to(c.dtype.element_ty), mask=slots < MEMORY
    )


def width(memory: int) -> int:
    """The smallest power of two above `memory`."""
    return 1 << memory.bit_length()


def warps(memory: int) -> int:
    """Warps of `anderson_solve`: at most eight numbers of the tile per thread."""
    return max(1, width(memory) ** 2 // 256)


def variants() -> list[Variant]:
    """The kernels as shipped, for a memory of 5 and the maximum, 20."""
    numbers, counts = "*fp64", "*i64"
    update = dict.fromkeys(("square", "length", "next_length", "limit"), numbers) | {"fresh": "*u8", "images": "i32"}
    update |= dict.fromkeys(("count", "next_count", "slot"), counts)
    solve = dict.fromkeys(("idx", "slot", "count", "next_count"), counts) | {"c": "*fp32", "images": "i32"}
    solve |= dict.fromkeys(("row", "rhs", "gram"), numbers)
    return [Variant(anderson_update, update, {"MEMORY": 5, "REACH": 20.0, "BLOCK": BLOCK}, 1, 1)] + [
        Variant(anderson_solve, solve, {"MEMORY": m, "WIDTH": width(m), "RIDGE": 1e-8, "TINY": 2.0**-1022}, warps(m), 1)
        for m in (5, 20)
    ]
