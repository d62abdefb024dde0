"""The conv chain with a LayerNorm over a whole image (docs/math.md, M10, (11), (12)), one kernel per stage.

A layer's mean and variance are known only after the whole layer, so each stage runs over the whole image before the
next begins. If a stage needs sums over all pixels, the stage before it sums each tile in float64, and another kernel
adds up the tiles.

Planes are as in `tiles.py`. A program processes one tile of one image, and returns at once if `work` `[B]` is 0. Two
arrays hold the sums over an image, `fixed` `[B, 4]` at a point x and `along` `[B, 8]` for a direction v:

    fixed   mean u,   rs = 1 / sqrt(var u + eps),   m1 = mean t,   m2 = mean(t xhat)
    along   mean u',  mean(xhat u'),   mean t',   mean(t' xhat),   mean(t xhat')

with `xhat = rs (u - mean u)`, `n = gamma xhat + beta`, g the cotangent of SiLU's output and `t = gamma SiLU'(n) g`.
`vectors` `[3, CP]` are bias, gamma and beta.
"""

# pyright: reportArgumentType=false, reportOperatorIssue=false, reportAssignmentType=false, reportGeneralTypeIssues=false
# Triton's type stubs do not describe what its compiler accepts.

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from ..variants import Variant, unspecialized, variant
from .tiles import conv, expand, inside, load_pixels, load_tile, silu, store_tile, tile

TILES = {16: (8, 16, 4), 32: (8, 8, 4), 64: (8, 8, 8)}
"""Height, width and warps of a tile by CP."""
PRECISION = "tf32x3"
STAGES = 2
TYPES = {
    **dict.fromkeys(("moments", "partial", "sums"), "*fp64"),
    **dict.fromkeys(("height", "width", "C", "tiles", "count", "stride", "column"), "i32"),
    **dict.fromkeys(("eps", "uu", "uh", "hh"), "fp32"),
    "work": "*u8",
}
"""Types of arguments other than pointers to float32."""
BLOCK = 512
"""Number of tiles that are added up at a time."""

IMAGES = ("pixels", "direct", "out", "to", "work", "fixed", "along")
"""Tensors of any alignment: parts of images of any size, and numbers of an image."""


@triton.jit
def _own(y, x, height, width, C, CP: tl.constexpr):
    """`[P, CP]`: whether the pixel is inside the image and the channel is not padding."""
    return inside(y, x, height, width)[:, None] & (tl.arange(0, CP) < C)[None, :]


@triton.jit
def _filtered(  # noqa: PLR0913 - the arguments of tiles.conv
    before, w, at, y, x, height, width, CP: tl.constexpr, ONE: tl.constexpr, ADJOINT: tl.constexpr, PREC: tl.constexpr
):
    """`[P, CP]`: the convolution of a plane, or with ONE of an image (one channel)."""
    if ONE:
        return expand(before + at, w, y, x, height, width, CP, ADJOINT, PREC)
    else:
        return conv(before + at * CP, w, y, x, height, width, CP, ADJOINT, PREC)


@triton.jit
def _normalized(u, fixed, image, own):
    """`xhat`, zero outside the image and in padding channels, and rs."""
    rs = tl.load(fixed + image * 4 + 1)
    return tl.where(own, (u - tl.load(fixed + image * 4)) * rs, 0.0), rs


@triton.jit
def _affine(vectors, CP: tl.constexpr):
    """gamma and beta, from `vectors` `[3, CP]`: bias, gamma, beta."""
    c = tl.arange(0, CP)
    return tl.load(vectors + CP + c)[None, :], tl.load(vectors + 2 * CP + c)[None, :]


@triton.jit
def _sum(value):
    """The sum over a tile in float64."""
    return tl.sum(tl.sum(value.to(tl.float64), 1), 0)


@triton.jit
def _to_one(  # noqa: PLR0913 - the arguments of tiles.conv
    plane, w, y, x, height, width, CP: tl.constexpr, ADJOINT: tl.constexpr
):
    """`[P]`: `sum_t <plane[p + t], w_t>`, all channels to one; with ADJOINT `sum_t <plane[p - t], w_t>`."""
    c = tl.arange(0, CP)
    acc = tl.zeros((y.shape[0], CP), tl.float32)
    SIGN: tl.constexpr = -1 if ADJOINT else 1
    for t in tl.static_range(9):
        a = load_tile(plane, y + SIGN * (t // 3 - 1), x + SIGN * (t % 3 - 1), height, width, CP)
        acc += a * tl.load(w + t * CP + c)[None, :]
    return tl.sum(acc, 1)


@unspecialized(anywhere=IMAGES)
def layer(  # noqa: PLR0913 - a kernel's launch
    before, w, vectors, u, moments, work, height, width, C,
    CP: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr, ONE: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """`u = w * before + bias`; per tile the number of values, their mean and the sum of squared deviations from it."""
    image, y, x = tile(height, width, TH, TW)
    if tl.load(work + image) == 0:
        return
    offset = image * height * width
    value = _filtered(before, w, offset, y, x, height, width, CP, ONE, False, PREC)
    value += tl.load(vectors + tl.arange(0, CP))[None, :]
    store_tile(u + offset * CP, value, y, x, height, width, CP)
    valid = _own(y, x, height, width, C, CP)
    count = tl.sum(tl.sum(valid.to(tl.int32), 1), 0).to(tl.float64)
    mean = _sum(tl.where(valid, value, 0.0)) / count
    centered = tl.where(valid, value.to(tl.float64) - mean, 0.0)
    to = moments + tl.program_id(0) * 3
    tl.store(to, count)
    tl.store(to + 1, mean)
    tl.store(to + 2, _sum(centered * centered))


@unspecialized("tiles", "count", "stride", "column", anywhere=IMAGES)
def merge(moments, fixed, work, tiles, eps, BLOCK: tl.constexpr):
    """The mean of an image and `1 / sqrt(var + eps)` from its tiles' moments, to `fixed`; one program per image.

    `sum (u - m)^2 = sum_tiles [sum (u - m_tile)^2 + n_tile (m_tile - m)^2]`, which has no difference of large sums.
    """
    image = tl.program_id(0)
    if tl.load(work + image) == 0:
        return
    tile_moments = moments + image.to(tl.int64) * tiles * 3
    n = tl.zeros((BLOCK,), tl.float64)
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, tiles, BLOCK):
        i = start + tl.arange(0, BLOCK)
        count = tl.load(tile_moments + i * 3, mask=i < tiles, other=0.0)
        n += count
        total += count * tl.load(tile_moments + i * 3 + 1, mask=i < tiles, other=0.0)
    count_all = tl.sum(n, 0)
    mean = tl.sum(total, 0) / count_all
    squares = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, tiles, BLOCK):
        i = start + tl.arange(0, BLOCK)
        count = tl.load(tile_moments + i * 3, mask=i < tiles, other=0.0)
        deviation = tl.load(tile_moments + i * 3 + 1, mask=i < tiles, other=0.0) - mean
        squares += count * deviation * deviation + tl.load(tile_moments + i * 3 + 2, mask=i < tiles, other=0.0)
    var = tl.sum(squares, 0) / count_all
    tl.store(fixed + image * 4, mean.to(tl.float32))
    tl.store(fixed + image * 4 + 1, (1.0 / tl.sqrt(var + eps)).to(tl.float32))


@unspecialized("tiles", "count", "stride", "column", anywhere=IMAGES)
def add_tiles(  # noqa: PLR0913 - a kernel's launch
    partial, to, work, tiles, count, stride, column, K: tl.constexpr, BLOCK: tl.constexpr
):
    """The K sums over an image's tiles, divided by `count`, to columns of `to` `[B, stride]`; one program per image."""
    image = tl.program_id(0)
    if tl.load(work + image) == 0:
        return
    k = tl.arange(0, K)[None, :]
    total = tl.zeros((BLOCK, K), tl.float64)
    for start in range(0, tiles, BLOCK):
        i = start + tl.arange(0, BLOCK)[:, None]
        total += tl.load(partial + (image.to(tl.int64) * tiles + i) * K + k, mask=i < tiles, other=0.0)
    tl.store(to + image * stride + column + tl.arange(0, K), tl.sum(total, 0) / count)


@unspecialized(anywhere=IMAGES)
def activate(  # noqa: PLR0913 - a kernel's launch
    u, fixed, vectors, a, work, height, width, C, CP: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr
):
    """`a = SiLU(gamma xhat + beta)`."""
    image, y, x = tile(height, width, TH, TW)
    if tl.load(work + image) == 0:
        return
    offset = image * height * width * CP
    valid = _own(y, x, height, width, C, CP)
    xhat, _ = _normalized(load_tile(u + offset, y, x, height, width, CP), fixed, image, valid)
    gamma, beta = _affine(vectors, CP)
    value, _, _ = silu(gamma * xhat + beta)
    store_tile(a + offset, value, y, x, height, width, CP)


@unspecialized(anywhere=(*IMAGES, "cotangent"))
def head(  # noqa: PLR0913 - a kernel's launch
    a, w, bias, pixels, cotangent, direct, partial, work, height, width, uu, uh, hh,
    CP: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr,
):  # fmt: skip
    """`h = w * a + bias`, and with the pixels u `direct = uu u + uh h`, `cotangent = uh u + hh h` (M9).

    The energy is `(<u, direct> + <h, cotangent>) / 2`, because it is quadratic in u and h. Given the tangents of a and
    u and no bias, the results are the tangents.
    """
    image, y, x = tile(height, width, TH, TW)
    if tl.load(work + image) == 0:
        return
    offset = image * height * width
    h = _to_one(a + offset * CP, w, y, x, height, width, CP, False) + tl.load(bias)
    within = inside(y, x, height, width)
    h = tl.where(within, h, 0.0)
    pixel = load_pixels(pixels + offset, y, x, height, width)
    by_u = uu * pixel + uh * h
    by_h = uh * pixel + hh * h
    place = offset + y * width + x
    tl.store(direct + place, by_u, mask=within)
    tl.store(cotangent + place, by_h, mask=within)
    energy = pixel.to(tl.float64) * by_u.to(tl.float64) + h.to(tl.float64) * by_h.to(tl.float64)
    tl.store(partial + tl.program_id(0), 0.5 * tl.sum(energy, 0))


@unspecialized(anywhere=IMAGES)
def above(  # noqa: PLR0913 - a kernel's launch
    cotangent, w, u, fixed, vectors, g, partial, work, height, width, C,
    CP: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr, ONE: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """`g = w^T * cotangent`; per tile the sums of t and t xhat."""
    image, y, x = tile(height, width, TH, TW)
    if tl.load(work + image) == 0:
        return
    offset = image * height * width
    value = _filtered(cotangent, w, offset, y, x, height, width, CP, ONE, True, PREC)
    store_tile(g + offset * CP, value, y, x, height, width, CP)
    valid = _own(y, x, height, width, C, CP)
    gamma, beta = _affine(vectors, CP)
    xhat, _ = _normalized(load_tile(u + offset * CP, y, x, height, width, CP), fixed, image, valid)
    _, slope, _ = silu(gamma * xhat + beta)
    t = tl.where(valid, gamma * slope * value, 0.0)
    tl.store(partial + tl.program_id(0) * 2, _sum(t))
    tl.store(partial + tl.program_id(0) * 2 + 1, _sum(t * xhat))


@triton.jit
def _cotangent(xhat, rs, t, fixed, image, own):
    """`P(t) = rs (t - m1 - xhat m2)`, the cotangent of u (11)."""
    m1, m2 = tl.load(fixed + image * 4 + 2), tl.load(fixed + image * 4 + 3)
    return tl.where(own, rs * (t - m1 - xhat * m2), 0.0)


@unspecialized(anywhere=IMAGES)
def below(  # noqa: PLR0913 - a kernel's launch
    u, g, fixed, vectors, gu, work, height, width, C, CP: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr
):
    """`gu = P(t)`."""
    image, y, x = tile(height, width, TH, TW)
    if tl.load(work + image) == 0:
        return
    offset = image * height * width * CP
    valid = _own(y, x, height, width, C, CP)
    xhat, rs = _normalized(load_tile(u + offset, y, x, height, width, CP), fixed, image, valid)
    gamma, beta = _affine(vectors, CP)
    _, slope, _ = silu(gamma * xhat + beta)
    t = gamma * slope * load_tile(g + offset, y, x, height, width, CP)
    store_tile(gu + offset, _cotangent(xhat, rs, t, fixed, image, valid), y, x, height, width, CP)


@unspecialized(anywhere=IMAGES)
def join(  # noqa: PLR0913 - a kernel's launch
    gu, w, direct, out, work, height, width, CP: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr
):
    """`out = direct + w^T * gu` (images)."""
    image, y, x = tile(height, width, TH, TW)
    if tl.load(work + image) == 0:
        return
    offset = image * height * width
    value = _to_one(gu + offset * CP, w, y, x, height, width, CP, True) + load_pixels(
        direct + offset, y, x, height, width
    )
    tl.store(out + offset + y * width + x, value, mask=inside(y, x, height, width))


def shape(cp: int) -> tuple[dict[str, Any], dict[str, int]]:
    """The constants of a tile, and the launch options."""
    th, tw, warps = TILES[cp]
    return {"CP": cp, "TH": th, "TW": tw}, {"num_warps": warps, "num_stages": STAGES}


def variants() -> list[Variant]:
    """The kernels as shipped: for each CP, those with a convolution both for one channel and for all."""
    shipped = [variant(merge, {"BLOCK": BLOCK}, TYPES, 4, STAGES)]
    shipped += [variant(add_tiles, {"K": k, "BLOCK": BLOCK}, TYPES, 4, STAGES) for k in (1, 2)]
    for cp in TILES:
        constants, options = shape(cp)
        shipped += [variant(kernel, constants, TYPES, **options) for kernel in (activate, head, below, join)]
        shipped += [
            variant(kernel, constants | {"ONE": one, "PREC": PRECISION}, TYPES, **options)
            for kernel in (layer, above)
            for one in (True, False)
        ]
    return shipped
