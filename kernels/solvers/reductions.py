# ruff: noqa: PLR0913 - a launch needs every pointer
"""The solvers' vector work: entrywise updates of images `[B, n]` with their inner products, in one read of memory.

A program processes one piece of `PIECE` entries of one image. Products of two float32 numbers are exact in float64.
Each program adds those of its piece and writes one number per sum to `partial` `[sums, B, pieces]`, which `total` adds
up piece by piece. The order depends only on n, without atomics, so the bits of an image do not depend on its batch.

`work` `[B]` (bytes) or None: a program of an inactive image returns at once. `N`, the entries of an image, is a
constant, so that the compiler knows the alignment of every image.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..variants import Variant, unspecialized

PIECE = 2048
"""Entries of a piece: 16 for each of 128 threads, with four loads of 16 bytes in flight per tensor."""
WARPS = 4
NUMBERS = ("idx", "work", "rows", "s", "slot", "fresh", "limit")
"""Tensors with one number or flag per image."""


@triton.jit
def piece_of(N: tl.constexpr, PIECE: tl.constexpr):
    """Image of this program, start of its piece, offsets within the piece, and number of remaining entries."""
    pieces: tl.constexpr = (N + PIECE - 1) // PIECE
    program = tl.program_id(0)
    # 64-bit: a batch may have more than 2^31 entries.
    start = (program % pieces).to(tl.int64) * PIECE
    k = tl.arange(0, PIECE)
    return (program // pieces).to(tl.int64), start, k, N - start


@triton.jit
def place_of(idx, image):
    """Index among all images of the image `image` of the call."""
    if idx is None:
        return image
    else:
        return tl.load(idx + image)


@triton.jit
def add_up(pieces, COUNT: tl.constexpr, STEP: tl.constexpr):
    """The sum of COUNT consecutive numbers, STEP of them at a time."""
    k = tl.arange(0, STEP)
    s = tl.zeros((), tl.float64)
    for first in range(0, COUNT, STEP):
        s += tl.sum(tl.load(pieces + first + k, mask=k < COUNT - first, other=0.0))
    return s


@triton.jit
def product(a, b):
    """`<a, b>` of two pieces."""
    return tl.sum(a.to(tl.float64) * b.to(tl.float64))


@triton.jit
def keep(partial, k, value):
    """Store sum k of this program's piece in `partial` `[sums, B, pieces]`."""
    tl.store(partial + tl.num_programs(0).to(tl.int64) * k + tl.program_id(0), value)


@triton.jit
def total(partial, out, PIECES: tl.constexpr, STEP: tl.constexpr):
    """`out[k, b] = sum_j partial[k, b, j]`, one program per (k, b)."""
    program = tl.program_id(0).to(tl.int64)
    tl.store(out + program, add_up(partial + program * PIECES, PIECES, STEP))


@unspecialized(anywhere=NUMBERS)
def products(a, b, c, d, partial, work, N: tl.constexpr, PIECE: tl.constexpr, COUNT: tl.constexpr, PAIRS: tl.constexpr):
    """`COUNT` inner products of a, b, c, d; four bits of `PAIRS` encode the factors of each, lowest bits first."""
    image, start, k, remaining = piece_of(N, PIECE)
    if work is not None:
        if tl.load(work + image) == 0:
            return
    inside, offset = k < remaining, image * N + start
    # The compiler removes loads that no pair uses.
    values = (
        tl.load(a + offset + k, mask=inside, other=0.0),
        tl.load(b + offset + k, mask=inside, other=0.0),
        tl.load(c + offset + k, mask=inside, other=0.0),
        tl.load(d + offset + k, mask=inside, other=0.0),
    )
    for i in tl.static_range(COUNT):  # pyright: ignore[reportGeneralTypeIssues] - its stub says NoReturn
        keep(partial, i, product(values[(PAIRS >> 4 * i) & 3], values[(PAIRS >> 4 * i + 2) & 3]))


@unspecialized(anywhere=NUMBERS)
def add(x, s, p, rows, out, partial, work, N: tl.constexpr, PIECE: tl.constexpr):
    """`out_b = x_b + s_b p_b` if `rows`, otherwise `x_b`; and `<out_b, out_b>`."""
    image, start, k, remaining = piece_of(N, PIECE)
    if work is not None:
        if tl.load(work + image) == 0:
            return
    inside, offset = k < remaining, image * N + start
    moved = tl.load(rows + image) != 0
    old = tl.load(x + offset + k, mask=inside, other=0.0)
    step = tl.load(s + image).to(tl.float32) * tl.load(
        p + offset + k, mask=k < tl.where(moved, remaining, 0), other=0.0
    )
    new = tl.where(moved, old + step, old)
    tl.store(out + offset + k, new, mask=inside)
    keep(partial, 0, product(new, new))


@unspecialized(anywhere=NUMBERS)
def secant(idx, candidate, candidate_g, x, g, partial, work, N: tl.constexpr, PIECE: tl.constexpr, SIZES: tl.constexpr):
    """`<dx, dx>, <dg, dg>, <dx, dg>, <g, g>`, and if `SIZES` the squared norms of candidate and candidate_g.

    `dx = candidate_b - x_i`, `dg = candidate_g_b - g_i`, `i = idx[b]`, or b if `idx` is None.
    """
    image, start, k, remaining = piece_of(N, PIECE)
    if work is not None:
        if tl.load(work + image) == 0:
            return
    inside, index = k < remaining, place_of(idx, image)
    offset, old_offset = image * N + start, index * N + start
    new_x = tl.load(candidate + offset + k, mask=inside, other=0.0)
    new_g = tl.load(candidate_g + offset + k, mask=inside, other=0.0)
    old_g = tl.load(g + old_offset + k, mask=inside, other=0.0)
    dx = new_x - tl.load(x + old_offset + k, mask=inside, other=0.0)
    dg = new_g - old_g
    keep(partial, 0, product(dx, dx))
    keep(partial, 1, product(dg, dg))
    keep(partial, 2, product(dx, dg))
    keep(partial, 3, product(old_g, old_g))
    if SIZES:
        keep(partial, 4, product(new_x, new_x))
        keep(partial, 5, product(new_g, new_g))


@unspecialized(anywhere=NUMBERS)
def remember(
    idx, dx, df, old_x, old_f, slot, fresh, x, f, partial, work,
    N: tl.constexpr, PIECE: tl.constexpr, MEMORY: tl.constexpr,
):  # fmt: skip
    """Store Anderson's newest differences (zeros unless `fresh`) in `slot` of dx and df `[B, MEMORY, N]`, and x and f
    in old_x and old_f, all at `idx`; sum `<df_k, newest df>` and `<df_k, f>` for every slot k, the new one included."""
    image, start, k, remaining = piece_of(N, PIECE)
    if work is not None:
        if tl.load(work + image) == 0:
            return
    inside, index = k < remaining, place_of(idx, image)
    offset, old_offset, history = image * N + start, index * N + start, index * MEMORY * N + start
    newest, is_fresh = tl.load(slot + image), tl.load(fresh + image) != 0
    at_x = tl.load(x + offset + k, mask=inside, other=0.0)
    at_f = tl.load(f + offset + k, mask=inside, other=0.0)
    before = k < tl.where(is_fresh, remaining, 0)
    new_dx = tl.where(is_fresh, at_x - tl.load(old_x + old_offset + k, mask=before, other=0.0), 0.0)
    new_df = tl.where(is_fresh, at_f - tl.load(old_f + old_offset + k, mask=before, other=0.0), 0.0)
    tl.store(dx + history + newest * N + k, new_dx, mask=inside)
    tl.store(df + history + newest * N + k, new_df, mask=inside)
    tl.store(old_x + old_offset + k, at_x, mask=inside)
    tl.store(old_f + old_offset + k, at_f, mask=inside)
    for i in tl.static_range(MEMORY):  # pyright: ignore[reportGeneralTypeIssues] - its stub says NoReturn
        # The slot that was just written is not read back.
        slot_df = tl.load(df + history + i * N + k, mask=k < tl.where(newest == i, 0, remaining), other=0.0)
        slot_df = tl.where(newest == i, new_df, slot_df)
        keep(partial, i, product(slot_df, new_df))
        keep(partial, MEMORY + i, product(slot_df, at_f))


@unspecialized(anywhere=(*NUMBERS, "c"))
def shift(idx, dx, df, c, out, partial, work, N: tl.constexpr, PIECE: tl.constexpr, MEMORY: tl.constexpr):
    """`out_b = sum_k c_bk (dx_k + df_k)` over the slots of image `idx[b]`, and its squared norm."""
    image, start, k, remaining = piece_of(N, PIECE)
    if work is not None:
        if tl.load(work + image) == 0:
            return
    inside, index = k < remaining, place_of(idx, image)
    history = index * MEMORY * N + start
    s = tl.zeros((PIECE,), tl.float32)
    for i in tl.static_range(MEMORY):  # pyright: ignore[reportGeneralTypeIssues] - its stub says NoReturn
        weight = tl.load(c + image * MEMORY + i).to(tl.float32)
        # An unused slot may hold anything; it is not read.
        used = k < tl.where(weight != 0.0, remaining, 0)
        offset = history + i * N + k
        s += weight * (tl.load(dx + offset, mask=used, other=0.0) + tl.load(df + offset, mask=used, other=0.0))
    tl.store(out + image * N + start + k, s, mask=inside)
    keep(partial, 0, product(s, s))


@unspecialized(anywhere=NUMBERS)
def shorten(partial, limit, x, f, out, work, N: tl.constexpr, PIECE: tl.constexpr, STEP: tl.constexpr):
    """`out_b = x_b + f_b - out_b min(1, limit_b / ||out_b||)`; `partial` holds the pieces of `||out_b||^2`."""
    image, start, k, remaining = piece_of(N, PIECE)
    if work is not None:
        if tl.load(work + image) == 0:
            return
    pieces: tl.constexpr = (N + PIECE - 1) // PIECE
    length = tl.sqrt(add_up(partial + image * pieces, pieces, STEP))
    longest = tl.load(limit + image).to(tl.float64)
    factor = tl.where(length > longest, longest / tl.where(length > 1e-300, length, 1e-300), 1.0).to(tl.float32)
    inside, offset = k < remaining, image * N + start + k
    step = tl.load(x + offset, mask=inside, other=0.0) + tl.load(f + offset, mask=inside, other=0.0)
    tl.store(out + offset, step - factor * tl.load(out + offset, mask=inside, other=0.0), mask=inside)


def variants() -> list[Variant]:
    """The kernels as shipped, for images of 180 x 180."""
    n, image, sums, flags, numbers = 32400, "*fp32", "*fp64", "*u8", "*i64"
    size: dict[str, object] = {"N": n, "PIECE": PIECE}
    memory = size | {"MEMORY": 5}
    state = {"idx": numbers, "dx": image, "df": image}
    return [
        Variant(
            kernel, dict.fromkeys(images, image) | signature | {"partial": sums, "work": flags}, constants, WARPS, 1
        )
        for kernel, images, signature, constants in (
            (products, "abcd", {}, size | {"COUNT": 3, "PAIRS": 0x540}),
            (add, ("x", "p", "out"), {"s": sums, "rows": flags}, size),
            (secant, ("candidate", "candidate_g", "x", "g"), {"idx": numbers}, size | {"SIZES": True}),
            (remember, ("old_x", "old_f", "x", "f"), state | {"slot": numbers, "fresh": flags}, memory),
            (shift, ("c", "out"), state, memory),
            (shorten, ("x", "f", "out"), {"limit": sums}, size | {"STEP": 16}),
        )
    ] + [Variant(total, {"partial": sums, "out": sums}, {"PIECES": 16, "STEP": 16}, 1, 1)]
