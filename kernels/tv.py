# ruff: noqa: PLR0913 - a launch needs every pointer
"""Smoothed total variation (docs/math.md, M13): value and gradient in one sweep, and the Hessian-vector product.

With `a = |D x|^2 + eps^2`, `w = 1 / sqrt(a)` and `q = w D x`, `grad r = D^T q`, where `|D x|` is the norm over all
channels. A program works on a tile of TH x TW pixels of an image. A row of `D^T q` needs q at its pixel, at the pixel
above and at the pixel on the left, so each pixel computes all three from seven values of each channel of x. Rows and
columns beyond an edge repeat those of the edge: differences across it are zero, and no load has a mask.
"""
# Constants are numbers here, and constexpr only to the compiler.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from .variants import Variant, unspecialized, variant

TILES = {1: (8, 64, 4), 2: (4, 32, 4), 3: (4, 32, 4), 4: (4, 32, 4)}
"""Height, width and warps of a tile by the number of channels; more channels take more registers per pixel."""


@triton.jit
def place(height, width, CHANNELS: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr):
    """The image of this program, the offset of its first plane, and the rows `[TH, 1]` and columns `[1, TW]` of its
    tile.

    Programs are numbered tile by tile of each image. Pixels of a tile may lie beyond the lower or right edge.
    """
    columns = tl.cdiv(width, TW)
    tiles = tl.cdiv(height, TH) * columns
    image = tl.program_id(0) // tiles
    t = tl.program_id(0) % tiles
    y = t // columns * TH + tl.arange(0, TH)
    x = t % columns * TW + tl.arange(0, TW)
    return image, image.to(tl.int64) * CHANNELS * height * width, y[:, None], x[None, :]


@triton.jit
def differences(plane, y, x, height, width):
    """The differences `D x`, down and across, at each pixel, at the pixel above, and at the pixel on the left."""
    row, column = tl.minimum(y, height - 1), tl.minimum(x, width - 1)
    above, below = tl.maximum(row - 1, 0) * width, tl.minimum(row + 1, height - 1) * width
    left, right = tl.maximum(column - 1, 0), tl.minimum(column + 1, width - 1)
    row = row * width
    here, up, beside = tl.load(plane + row + column), tl.load(plane + above + column), tl.load(plane + row + left)
    down, across = tl.load(plane + below + column) - here, tl.load(plane + row + right) - here
    above_across = tl.load(plane + above + right) - up
    left_down = tl.load(plane + below + left) - beside
    return down, across, here - up, above_across, left_down, here - beside


@triton.jit
def inverse_root(a):
    """`1 / sqrt(a)`: the device's estimate and one Newton step, about as exact as a correctly rounded root and
    division."""
    w = tl.rsqrt(a)
    return tl.fma(0.5 * w, tl.fma(-a * w, w, 1.0), w)


@triton.jit
def squares(plane, y, x, height, width, CHANNELS: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr):
    """`|D x|^2` at each pixel, at the pixel above, and at the pixel on the left."""
    t = tl.zeros((TH, TW), tl.float32)
    above, left = t, t
    for _ in tl.static_range(CHANNELS):
        down, across, above_down, above_across, left_down, left_across = differences(plane, y, x, height, width)
        t += down * down + across * across
        above += above_down * above_down + above_across * above_across
        left += left_down * left_down + left_across * left_across
        plane += height * width
    return t, above, left


@triton.jit
def bend(down, across, v, h, w, eps):
    """`d - q <q, d>` of one channel, `d = (v, h)`.

    As `1 - |q|^2 = (eps w)^2`, it is `c p + (eps w)^2 d` with `p = (q_h, -q_v)` and `c = <p, d>`, in which nothing
    cancels. Also q.
    """
    q_v, q_h = w * down, w * across
    e = eps * w
    e = e * e
    c = q_h * v - q_v * h
    return q_h * c + e * v, e * h - q_v * c, q_v, q_h


@triton.jit
def bend_by(sum_v, sum_h, q_v, q_h, v, h, down, across, other_v, other_h, w):
    """Add the part of another channel, whose differences are `down` and `across` and whose direction is `other`."""
    p_v, p_h = w * down, w * across
    sum_v += p_v * (p_v * v - q_v * other_v) + p_h * (p_h * v - q_v * other_h)
    sum_h += p_v * (p_v * h - q_h * other_v) + p_h * (p_h * h - q_h * other_h)
    return sum_v, sum_h


@unspecialized("height", "width", anywhere=None)
def tv_gradient(
    x, rows, value, grad, height, width, eps, square,
    CHANNELS: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr
):  # fmt: skip
    """The gradient `D^T q`, and `sum sqrt(a) - eps` of each tile into `value` `[B, tiles]`, float64."""
    image, offset, i, j = place(height, width, CHANNELS, TH, TW)
    if rows is not None:
        if tl.load(rows + image) == 0:
            return
    t, above, left = squares(x + offset, i, j, height, width, CHANNELS, TH, TW)
    w = inverse_root(t + square)
    w_above, w_left = inverse_root(above + square), inverse_root(left + square)
    own = (i < height) & (j < width)
    for _ in tl.static_range(CHANNELS):
        v, h, above_v, _, _, left_h = differences(x + offset, i, j, height, width)
        gradient = (w_above * above_v - w * v) + (w_left * left_h - w * h)
        tl.store(grad + offset + i * width + j, gradient, mask=own)
        offset += height * width
    # sqrt(a) - eps, without the difference.
    energy = tl.where(own, tl.div_rn(t, (t + square) * w + eps), 0.0)
    tl.store(value + tl.program_id(0), tl.sum(energy.to(tl.float64)))


@unspecialized("height", "width", anywhere=None)
def tv_hvp(
    x, v, rows, out, height, width, eps, square,
    CHANNELS: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr
):  # fmt: skip
    """`hess r(x) v`; q and w are computed from x again."""
    image, first, i, j = place(height, width, CHANNELS, TH, TW)
    if rows is not None:
        if tl.load(rows + image) == 0:
            return
    t, above, left = squares(x + first, i, j, height, width, CHANNELS, TH, TW)
    w = inverse_root(t + square)
    w_above, w_left = inverse_root(above + square), inverse_root(left + square)
    own = (i < height) & (j < width)
    offset = first
    for c in range(CHANNELS):
        x_v, x_h, above_v, above_h, left_v, left_h = differences(x + offset, i, j, height, width)
        v_v, v_h, v_above_v, v_above_h, v_left_v, v_left_h = differences(v + offset, i, j, height, width)
        down, across, q_v, q_h = bend(x_v, x_h, v_v, v_h, w, eps)
        from_above, beside, a_v, a_h = bend(above_v, above_h, v_above_v, v_above_h, w_above, eps)
        below, from_left, l_v, l_h = bend(left_v, left_h, v_left_v, v_left_h, w_left, eps)
        other = first
        for k in range(CHANNELS):
            if k != c:
                y_v, y_h, ya_v, ya_h, yl_v, yl_h = differences(x + other, i, j, height, width)
                u_v, u_h, ua_v, ua_h, ul_v, ul_h = differences(v + other, i, j, height, width)
                down, across = bend_by(down, across, q_v, q_h, v_v, v_h, y_v, y_h, u_v, u_h, w)
                from_above, beside = bend_by(
                    from_above, beside, a_v, a_h, v_above_v, v_above_h, ya_v, ya_h, ua_v, ua_h, w_above
                )
                below, from_left = bend_by(
                    below, from_left, l_v, l_h, v_left_v, v_left_h, yl_v, yl_h, ul_v, ul_h, w_left
                )
            other += height * width
        product = (w_above * from_above - w * down) + (w_left * from_left - w * across)
        tl.store(out + offset + i * width + j, product, mask=own)
        offset += height * width


def variants() -> list[Variant]:
    """Both kernels as shipped, for a part of the images and for all of them; of the colors only the most."""
    types = dict.fromkeys(("height", "width"), "i32") | dict.fromkeys(("eps", "square"), "fp32")
    types |= {"rows": "*u8", "value": "*fp64"}
    return [
        variant(kernel, {"CHANNELS": channels, "TH": th, "TW": tw, **absent}, types, warps, 1)
        for kernel in (tv_gradient, tv_hvp)
        for channels, (th, tw, warps) in ((c, TILES[c]) for c in (1, max(TILES)))
        for absent in ({}, {"rows": None})
        if channels == 1 or absent
    ]
