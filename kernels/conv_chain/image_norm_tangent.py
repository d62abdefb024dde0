"""Tangents of `image_norm.py` along a direction v, for Hessian-vector and parameter products (docs/math.md, (12)).

A trailing 1 marks tangents. The stages are those of the gradient, forward (`layer1`, `activate1`) and backward
(`above1`, `below1`). The gradient and the tangents share `image_norm.head` and `image_norm.join`.
"""

# pyright: reportArgumentType=false
# Triton's type stubs do not describe what its compiler accepts.

from __future__ import annotations

import triton.language as tl

from ..variants import Variant, unspecialized, variant
from .image_norm import (
    IMAGES,
    PRECISION,
    TILES,
    TYPES,
    _affine,
    _cotangent,
    _filtered,
    _normalized,
    _own,
    _sum,
    shape,
)
from .tiles import load_tile, silu, store_tile, tile


@unspecialized(anywhere=IMAGES)
def layer1(  # noqa: PLR0913 - a kernel's launch
    before, w, u, fixed, u1, partial, work, height, width, C,
    CP: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr, ONE: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """`u1 = w * before`; per tile the sums of u1 and xhat u1."""
    image, y, x = tile(height, width, TH, TW)
    if tl.load(work + image) == 0:
        return
    offset = image * height * width
    value = _filtered(before, w, offset, y, x, height, width, CP, ONE, False, PREC)
    store_tile(u1 + offset * CP, value, y, x, height, width, CP)
    valid = _own(y, x, height, width, C, CP)
    xhat, _ = _normalized(load_tile(u + offset * CP, y, x, height, width, CP), fixed, image, valid)
    tl.store(partial + tl.program_id(0) * 2, _sum(tl.where(valid, value, 0.0)))
    tl.store(partial + tl.program_id(0) * 2 + 1, _sum(value * xhat))


@unspecialized(anywhere=IMAGES)
def activate1(  # noqa: PLR0913 - a kernel's launch
    u1, u, g, fixed, along, vectors, a1, a, partial, work, height, width, C,
    CP: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr,
):  # fmt: skip
    """`xhat1 = P(u1)` in place of u1, `a1 = SiLU' gamma xhat1`, and a if not None; per tile the sum of t xhat1."""
    image, y, x = tile(height, width, TH, TW)
    if tl.load(work + image) == 0:
        return
    offset = image * height * width * CP
    valid = _own(y, x, height, width, C, CP)
    xhat, rs = _normalized(load_tile(u + offset, y, x, height, width, CP), fixed, image, valid)
    gamma, beta = _affine(vectors, CP)
    value, slope, _ = silu(gamma * xhat + beta)
    p0, p = tl.load(along + image * 8), tl.load(along + image * 8 + 1)
    xhat1 = tl.where(valid, rs * (load_tile(u1 + offset, y, x, height, width, CP) - p0 - xhat * p), 0.0)
    sloped = slope * (gamma * xhat1)
    if a is not None:
        store_tile(a + offset, value, y, x, height, width, CP)
    store_tile(u1 + offset, xhat1, y, x, height, width, CP)
    store_tile(a1 + offset, sloped, y, x, height, width, CP)
    tl.store(partial + tl.program_id(0), _sum(sloped * load_tile(g + offset, y, x, height, width, CP)))


@unspecialized(anywhere=IMAGES)
def above1(  # noqa: PLR0913 - a kernel's launch
    cotangent1, w, u, g, xhat1, fixed, vectors, cn1, partial, work, height, width, C,
    CP: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr, ONE: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """`cn1 = SiLU'' gamma xhat1 g + SiLU' w^T * cotangent1`; per tile the sums of t1 = gamma cn1 and t1 xhat."""
    image, y, x = tile(height, width, TH, TW)
    if tl.load(work + image) == 0:
        return
    offset = image * height * width
    g1 = _filtered(cotangent1, w, offset, y, x, height, width, CP, ONE, True, PREC)
    valid = _own(y, x, height, width, C, CP)
    gamma, beta = _affine(vectors, CP)
    xhat, _ = _normalized(load_tile(u + offset * CP, y, x, height, width, CP), fixed, image, valid)
    _, slope, bend = silu(gamma * xhat + beta)
    value = load_tile(g + offset * CP, y, x, height, width, CP)
    n1 = gamma * load_tile(xhat1 + offset * CP, y, x, height, width, CP)
    cn_tangent = tl.where(valid, bend * n1 * value + slope * g1, 0.0)
    store_tile(cn1 + offset * CP, cn_tangent, y, x, height, width, CP)
    t1 = gamma * cn_tangent
    tl.store(partial + tl.program_id(0) * 2, _sum(t1))
    tl.store(partial + tl.program_id(0) * 2 + 1, _sum(t1 * xhat))


@unspecialized(anywhere=IMAGES)
def below1(  # noqa: PLR0913 - a kernel's launch
    cn1, u, g, xhat1, fixed, along, vectors, gu, sums, work, height, width, C,
    CP: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr,
):  # fmt: skip
    """The tangent of `P(t)` (12) in place of cn1.

    If `gu` is not None, also `gu = P(t)` and per tile `sums` `[3, CP]`: gradients of the bias, gamma and beta.
    """
    image, y, x = tile(height, width, TH, TW)
    if tl.load(work + image) == 0:
        return
    offset = image * height * width * CP
    valid = _own(y, x, height, width, C, CP)
    gamma, beta = _affine(vectors, CP)
    xhat, rs = _normalized(load_tile(u + offset, y, x, height, width, CP), fixed, image, valid)
    _, slope, _ = silu(gamma * xhat + beta)
    cn = slope * load_tile(g + offset, y, x, height, width, CP)
    primal = _cotangent(xhat, rs, gamma * cn, fixed, image, valid)
    cn_tangent = load_tile(cn1 + offset, y, x, height, width, CP)
    xhat_tangent = load_tile(xhat1 + offset, y, x, height, width, CP)
    p, m2 = tl.load(along + image * 8 + 1), tl.load(fixed + image * 4 + 3)
    t0, tz = tl.load(along + image * 8 + 2), tl.load(along + image * 8 + 3) + tl.load(along + image * 8 + 4)
    gu_tangent = tl.where(valid, rs * (gamma * cn_tangent - t0 - xhat * tz - xhat_tangent * m2 - p * primal), 0.0)
    store_tile(cn1 + offset, gu_tangent, y, x, height, width, CP)
    if gu is not None:
        store_tile(gu + offset, primal, y, x, height, width, CP)
        to = sums + tl.program_id(0).to(tl.int64) * (3 * CP) + tl.arange(0, CP)
        tl.store(to, tl.sum(gu_tangent.to(tl.float64), 0))
        tl.store(to + CP, tl.sum((cn_tangent * xhat + cn * xhat_tangent).to(tl.float64), 0))
        tl.store(to + 2 * CP, tl.sum(cn_tangent.to(tl.float64), 0))


def variants() -> list[Variant]:
    """The kernels as shipped: for each CP, convolutions of one channel and of all, and pointwise stages with and
    without the outputs for parameter products."""
    shipped = []
    for cp in TILES:
        constants, options = shape(cp)
        for one in (True, False):
            dot = {"ONE": one, "PREC": PRECISION}
            shipped += [variant(kernel, constants | dot, TYPES, **options) for kernel in (layer1, above1)]
        for kernel, extra in ((activate1, {"a": None}), (below1, {"gu": None, "sums": None})):
            shipped += [variant(kernel, constants | unwanted, TYPES, **options) for unwanted in (extra, {})]
    return shipped
