"""Gradients of filters: outer products of planes, summed over the pixels of a batch (docs/math.md, (10)).

Planes are `[B, H, W, CP]`, float32 or bfloat16, contiguous; an image plane is `[B, H, W]`. Tap `t` is the neighbor
`(dy, dx) = (t // 3 - 1, t % 3 - 1)`, zero outside the image.

A piece is a block of pixels of one image, so only the piece's number needs divisions. A program processes every n-th
piece of the batch, sums the products of one piece in float32 and the pieces in float64, and writes a partial sum; the
partial sums are added last. The pixels of a program depend only on the shapes, so the bits are reproducible.
"""

# Constants are numbers here; only the compiler sees them as constexpr.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..variants import Variant, unspecialized, variant
from .tiles import product

PRECISION = "tf32x3"
TILE = (1, 32)
"""Rows and columns of a piece, powers of two: the longest sum on the tensor cores."""
DOWN = 8
"""Tiles per piece, stacked vertically, for the filters of one channel: the longest sum of a thread."""
STAGES = 1
PROGRAMS = 1024
"""Maximum per pair and group of taps; fewer for filters of all channels, so that partial sums take at most 38 MB."""

Pair = tuple[Tensor, Tensor]


def _outer_constants(cp: int) -> dict[str, Any]:
    """A row of three taps, or one tap if three sums of `[CP, CP]` would take too many registers."""
    return {"CP": cp, "TAPS": 3 if cp == 16 else 1, "TH": TILE[0], "TW": TILE[1], "PREC": PRECISION}


def _outer_options(cp: int) -> dict[str, Any]:
    """Few warps: each of several would split the same operands into tf32 parts."""
    return {"num_warps": {16: 1, 32: 1, 64: 4}[cp], "num_stages": STAGES}


def _image_constants(cp: int) -> dict[str, Any]:
    """With this number of columns, each thread of four warps has four channels of a pixel."""
    return {"CP": cp, "DOWN": DOWN, "TH": TILE[0], "TW": 16 * TILE[1] // cp}


@triton.jit
def _piece(  # noqa: PLR0913 - a place, a size and constants
    work, number, H, W, HIGH: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr
):
    """Image of piece `number`, its width, and rows and columns `[TH * TW]` of its first tile.

    A piece has HIGH rows and TW columns. The width of an inactive image is 0.
    """
    per_row = tl.cdiv(W, TW)
    pieces = tl.cdiv(H, HIGH) * per_row
    image = number // pieces
    piece = number % pieces
    i = tl.arange(0, TH * TW)
    width = tl.where(tl.load(work + image) != 0, W, 0)
    return image.to(tl.int64), width, piece // per_row * HIGH + i // TW, piece % per_row * TW + i % TW


@triton.jit
def _pixels(plane, y, x, W, counts, CP: tl.constexpr):
    """Pixels `[P, CP]`, zero unless `counts`."""
    pointers = plane + (y * W + x)[:, None] * CP + tl.arange(0, CP)[None, :]
    return tl.load(pointers, mask=counts[:, None], other=0.0).to(tl.float32)


@unspecialized("pieces", anywhere=("work",))
def outer_sums(  # noqa: PLR0913 - a kernel's launch
    a, g, a2, g2, work, out, pieces, H, W,
    CP: tl.constexpr, TAPS: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Partial sums of `a[p + tap] (x) g[p]`; grid (9 / TAPS, n, pairs), `out` `[pairs, n, 9, CP, CP]`."""
    if tl.program_id(2) == 1:
        a = a2
        g = g2
    first = tl.program_id(0) * TAPS
    dy, dx = first // 3 - 1, first % 3 - 1
    total = tl.zeros((CP, CP), tl.float64)
    total1 = total
    total2 = total
    for number in range(tl.program_id(1), pieces, tl.num_programs(1)):
        image, width, y, x = _piece(work, number, H, W, TH, TH, TW)
        plane = image * H * W * CP
        # If p lies outside, a is not read either: it may be NaN, and so would be zero times it.
        valid = (y < H) & (y + dy >= 0) & (y + dy < H) & (x < width)
        cotangent = _pixels(g + plane, y, x, W, valid, CP)
        taps = _pixels(a + plane, y + dy, x + dx, W, valid & (x + dx >= 0) & (x + dx < width), CP)
        zero = tl.zeros((CP, CP), tl.float32)
        total += product(tl.trans(taps), cotangent, zero, PREC).to(tl.float64)
        if TAPS == 3:
            taps = _pixels(a + plane, y + dy, x, W, valid, CP)
            total1 += product(tl.trans(taps), cotangent, zero, PREC).to(tl.float64)
            taps = _pixels(a + plane, y + dy, x + 1, W, valid & (x + 1 < width), CP)
            total2 += product(tl.trans(taps), cotangent, zero, PREC).to(tl.float64)
    index = (tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)) * 9 + first
    entries = tl.arange(0, CP)[:, None] * CP + tl.arange(0, CP)[None, :]
    tl.store(out + index * CP * CP + entries, total)
    if TAPS == 3:
        tl.store(out + (index + 1) * CP * CP + entries, total1)
        tl.store(out + (index + 2) * CP * CP + entries, total2)


@triton.jit
def _neighbours(image, y, x, H, W, width):
    """The pixels at the columns x - 1, x, x + 1, `[P, 1]`, zero outside; `width` is zero for inactive images."""
    pointers = image + y * W + x
    rows = (y >= 0) & (y < H)
    left = tl.load(pointers - 1, mask=rows & (x >= 1) & (x < width), other=0.0)
    middle = tl.load(pointers, mask=rows & (x < width), other=0.0)
    right = tl.load(pointers + 1, mask=rows & (x + 1 < width), other=0.0)
    return left[:, None], middle[:, None], right[:, None]


@unspecialized("pieces", anywhere=("work", "image", "image2"))
def image_sums(  # noqa: PLR0913 - a kernel's launch
    image, g, image2, g2, work, out, pieces, H, W,
    CP: tl.constexpr, DOWN: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr,
):  # fmt: skip
    """Partial sums of `image[p + tap] g[p]`; grid (n, pairs), `out` `[pairs, n, 9, CP]`.

    Each thread accumulates its own columns and channels by multiply-adds; the threads are added up last.
    """
    if tl.program_id(1) == 1:
        image = image2
        g = g2
    t0 = tl.zeros((TH * TW, CP), tl.float64)
    t1, t2, t3, t4, t5, t6, t7, t8 = t0, t0, t0, t0, t0, t0, t0, t0
    for number in range(tl.program_id(0), pieces, tl.num_programs(0)):
        b, width, y, x = _piece(work, number, H, W, DOWN * TH, TH, TW)
        pixels, plane = image + b * H * W, g + b * H * W * CP
        s0 = tl.zeros((TH * TW, CP), tl.float32)
        s1, s2, s3, s4, s5, s6, s7, s8 = s0, s0, s0, s0, s0, s0, s0, s0
        for _ in tl.static_range(DOWN):
            wide = tl.where(y < H, width, 0)
            a0, a1, a2 = _neighbours(pixels, y - 1, x, H, W, wide)
            a3, a4, a5 = _neighbours(pixels, y, x, H, W, wide)
            a6, a7, a8 = _neighbours(pixels, y + 1, x, H, W, wide)
            cotangent = _pixels(plane, y, x, W, x < wide, CP)
            s0 += a0 * cotangent
            s1 += a1 * cotangent
            s2 += a2 * cotangent
            s3 += a3 * cotangent
            s4 += a4 * cotangent
            s5 += a5 * cotangent
            s6 += a6 * cotangent
            s7 += a7 * cotangent
            s8 += a8 * cotangent
            y += TH
        t0 += s0.to(tl.float64)
        t1 += s1.to(tl.float64)
        t2 += s2.to(tl.float64)
        t3 += s3.to(tl.float64)
        t4 += s4.to(tl.float64)
        t5 += s5.to(tl.float64)
        t6 += s6.to(tl.float64)
        t7 += s7.to(tl.float64)
        t8 += s8.to(tl.float64)
    to = out + (tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)) * 9 * CP + tl.arange(0, CP)
    tl.store(to, tl.sum(t0, 0))
    tl.store(to + CP, tl.sum(t1, 0))
    tl.store(to + 2 * CP, tl.sum(t2, 0))
    tl.store(to + 3 * CP, tl.sum(t3, 0))
    tl.store(to + 4 * CP, tl.sum(t4, 0))
    tl.store(to + 5 * CP, tl.sum(t5, 0))
    tl.store(to + 6 * CP, tl.sum(t6, 0))
    tl.store(to + 7 * CP, tl.sum(t7, 0))
    tl.store(to + 8 * CP, tl.sum(t8, 0))


def _work(like: Tensor, rows: Tensor | None) -> Tensor:
    """The mask as bytes, which Triton reads on every device."""
    ones = torch.ones(len(like), dtype=torch.bool, device=like.device) if rows is None else rows
    return ones.contiguous().view(torch.uint8)


def _programs(like: Tensor, high: int, wide: int, most: int) -> tuple[int, int]:
    """The number of pieces of a batch, and the number of programs that process them."""
    pieces = like.shape[0] * triton.cdiv(like.shape[1], high) * triton.cdiv(like.shape[2], wide)
    return pieces, max(1, min(pieces, most))


def filters(a: Tensor, g: Tensor, rows: Tensor | None = None, second: Pair | None = None) -> Tensor:
    """`sum_{b,p} a[b, p + tap] (x) g[b, p]`, `[9, CP, CP]` (tap, channel of a, channel of g), float64.

    The sum is over the images `rows` `[B]`, bool, or over all. The sum over a `second` pair `(a, g)` is added.
    """
    _, height, width, cp = g.shape
    constants = _outer_constants(cp)
    pieces, programs = _programs(g, constants["TH"], constants["TW"], 4 * PROGRAMS // cp)
    out = g.new_empty((1 if second is None else 2, programs, 9, cp, cp), dtype=torch.float64)
    kernel: Any = outer_sums
    kernel[(9 // constants["TAPS"], programs, len(out))](
        a, g, *(second or (a, g)), _work(g, rows), out, pieces, height, width, **constants, **_outer_options(cp),
        enable_fp_fusion=True,
    )  # fmt: skip
    return out.sum((0, 1))


def image_filters(image: Tensor, g: Tensor, rows: Tensor | None = None, second: Pair | None = None) -> Tensor:
    """`sum_{b,p} image[b, p + tap] g[b, p]`, `[9, CP]`, float64, with `rows` and `second` as in `filters`.

    These are the gradients of the filters of a convolution of one channel to all, with cotangent `g`. Those of a
    convolution of all channels to one, with input `a` and cotangent `c` (an image), are
    `sum_p c[p] a[p + tap] = sum_q c[q - tap] a[q]`, which is `image_filters(c, a).flip(0)`.
    """
    _, height, width, cp = g.shape
    constants = _image_constants(cp)
    pieces, programs = _programs(g, DOWN * constants["TH"], constants["TW"], PROGRAMS)
    out = g.new_empty((1 if second is None else 2, programs, 9, cp), dtype=torch.float64)
    kernel: Any = image_sums
    kernel[(programs, len(out))](
        image, g, *(second or (image, g)), _work(g, rows), out, pieces, height, width, **constants, num_warps=4,
        num_stages=1, enable_fp_fusion=True,
    )  # fmt: skip
    return out.sum((0, 1))


def variants() -> list[Variant]:
    """The kernels as shipped: for each CP, filters of all channels and of one."""
    types = {"work": "*u8", "out": "*fp64", "pieces": "i32", "H": "i32", "W": "i32"}
    shipped = []
    for cp in (16, 32, 64):
        shipped.append(variant(outer_sums, _outer_constants(cp), types, **_outer_options(cp)))
        shipped.append(variant(image_sums, _image_constants(cp), types, 4, 1))
    return shipped
