"""The gradients of filters: sums over the pixels of a batch of outer products of planes (docs/math.md, (10)).

Planes are `[B, H, W, CP]`, float32 or bfloat16, contiguous; an image plane is `[B, H, W]`. Tap `t` is the neighbour
`(dy, dx) = (t // 3 - 1, t % 3 - 1)`, zero outside the image.

A program takes every n-th piece of the batch's pixels, sums the products of one piece in float32 and the pieces in
float64, and writes a partial sum; the partial sums are added last. Which pixels a program takes follows from the shapes
alone, so that the bits are the same at every repetition.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .variants import Variant, unspecialized, variant

PRECISION = "tf32x3"
PIXELS = 32
"""In a piece. With 64 of them, 64 channels need more registers than there are."""
STAGES = 3
PROGRAMS = 1024
"""At most, for each pair and group of taps; for filters of all channels less, so that partial sums take up to 38 MB."""

Pair = tuple[Tensor, Tensor]


def _outer_constants(channels: int, cp: int) -> dict[str, Any]:
    """64 rows M are 4, 2 or 1 taps of 16, 32 or 64 channels; 16 rows are all taps of one channel."""
    return {"CIN": channels, "CP": cp, "M": 64 if channels > 1 else 16, "P": PIXELS, "PREC": PRECISION}


def _options(m: int, cp: int) -> dict[str, Any]:
    """So that no warp is without a 16 x 8 tile of the tensor cores' products of its own."""
    return {"num_warps": max(4, cp // 8) if m > 16 else min(4, cp // 8), "num_stages": STAGES}


@triton.jit
def _piece(work, number, HW, P: tl.constexpr):
    """Of piece `number` of the batch: its image, its pixels, and which of them count."""
    pieces = tl.cdiv(HW, P)
    image = number // pieces
    p = (number % pieces) * P + tl.arange(0, P)
    return image.to(tl.int64), p, p < tl.where(tl.load(work + image) != 0, HW, 0)


@unspecialized("pieces", anywhere=("work",))
def outer_sums(  # noqa: PLR0913 - a kernel's launch
    a, g, a2, g2, work, out, pieces, H, W,
    CIN: tl.constexpr, CP: tl.constexpr, M: tl.constexpr, P: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Partial sums of `a[p + tap] (x) g[p]`; grid (groups of taps, n, pairs), `out` `[pairs, n, groups, M, CP]`.

    Row m of a sum is channel `m % CIN` of `a` at the tap `m // CIN` of the group.
    """
    if tl.program_id(2) == 1:
        a = a2
        g = g2
    m, n = tl.arange(0, M)[None, :], tl.arange(0, CP)[None, :]
    tap = tl.program_id(0) * (M // CIN) + m // CIN
    dy, dx = tap // 3 - 1, tap % 3 - 1
    total = tl.zeros((M, CP), tl.float64)
    for number in range(tl.program_id(1), pieces, tl.num_programs(1)):
        image, p, counts = _piece(work, number, H * W, P)
        p, counts = p[:, None], counts[:, None]
        y, x = p // W + dy, p % W + dx
        inside = counts & (tap < 9) & (y >= 0) & (y < H) & (x >= 0) & (x < W)
        taps = tl.load(a + image * H * W * CIN + (p + dy * W + dx) * CIN + m % CIN, mask=inside, other=0.0).to(
            tl.float32
        )
        cotangent = tl.load(g + image * H * W * CP + p * CP + n, mask=counts, other=0.0).to(tl.float32)
        total += tl.dot(tl.trans(taps), cotangent, input_precision=PREC).to(tl.float64)
    at = (tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0) + tl.program_id(0)
    tl.store(out + at * M * CP + tl.arange(0, M)[:, None] * CP + n, total)


def _work(like: Tensor, rows: Tensor | None) -> Tensor:
    """Bytes, which Triton reads alike on every device."""
    ones = torch.ones(len(like), dtype=torch.bool, device=like.device) if rows is None else rows
    return ones.view(torch.uint8)


def _programs(like: Tensor, most: int) -> tuple[int, int]:
    """How many pieces the pixels of a batch make, a piece lying in one image; and how many programs share them."""
    pieces = like.shape[0] * triton.cdiv(like.shape[1] * like.shape[2], PIXELS)
    return pieces, max(1, min(pieces, most))


def _outer(first: Pair, second: Pair | None, rows: Tensor | None, channels: int) -> Tensor:
    """`[9, channels, CP]`."""
    g = first[1]
    _, height, width, cp = g.shape
    constants = _outer_constants(channels, cp)
    taps = constants["M"] // channels
    groups = triton.cdiv(9, taps)
    pieces, programs = _programs(g, 4 * PROGRAMS // cp if channels > 1 else PROGRAMS)
    out = g.new_empty((1 if second is None else 2, programs, groups * taps, channels, cp), dtype=torch.float64)
    kernel: Any = outer_sums
    kernel[(groups, programs, len(out))](
        *first, *(second or first), _work(g, rows), out, pieces, height, width, **constants,
        **_options(constants["M"], cp), enable_fp_fusion=True,
    )  # fmt: skip
    return out.sum((0, 1))[:9]


def filters(a: Tensor, g: Tensor, rows: Tensor | None = None, second: Pair | None = None) -> Tensor:
    """`sum_{b,p} a[b, p + tap] (x) g[b, p]`, `[9, CP, CP]` (tap, channel of a, channel of g), float64.

    Over the images where `rows` `[B]`, bool, or over all; the same sum over a `second` pair `(a, g)` is added.
    """
    return _outer((a, g), second, rows, a.shape[-1])


def image_filters(image: Tensor, g: Tensor, rows: Tensor | None = None, second: Pair | None = None) -> Tensor:
    """`sum_{b,p} image[b, p + tap] g[b, p]`, `[9, CP]`, float64, with `rows` and `second` as in `filters`.

    These are the filters of a convolution of one channel to all, `g` its cotangent. Of one from all channels to one,
    with the input `a` and the cotangent `c`, an image, they are `sum_p c[p] a[p + tap] = sum_q c[q - tap] a[q]`, which
    is `image_filters(c, a).flip(0)`.
    """
    return _outer((image, g), second, rows, 1)[:, 0]


def variants() -> list[Variant]:
    """By CP: filters of all channels, filters of one."""
    types = {"work": "*u8", "out": "*fp64", "pieces": "i32", "H": "i32", "W": "i32"}
    found = []
    for cp in (16, 32, 64):
        for channels_in in (cp, 1):
            constants = _outer_constants(channels_in, cp)
            found.append(variant(outer_sums, constants, types, **_options(constants["M"], cp)))
    return found
