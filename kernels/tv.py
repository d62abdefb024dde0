# ruff: noqa: PLR0913 - a launch needs every pointer
"""Smoothed total variation (docs/math.md, M13): value and gradient in one sweep, and the Hessian-vector product.

With `a = |D x|^2 + eps^2`, `w = 1 / sqrt(a)` and `q = w D x`, `grad r = D^T q`. A program works on a tile of TH x TW
pixels of one plane, a channel of an image. A row of `D^T q` needs q at its pixel, at the pixel above and at the pixel
on the left, so each pixel computes all three from seven values of x. Rows and columns beyond an edge repeat those of
the edge: differences across it are zero, and no load has a mask.
"""
# Constants are numbers here, and constexpr only to the compiler.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from .variants import Variant, unspecialized, variant

TILE = (8, 64, 4)
"""Height, width and warps of a tile."""


@triton.jit
def place(channels, height, width, TH: tl.constexpr, TW: tl.constexpr):
    """The image and plane of this program, and the rows `[TH, 1]` and columns `[1, TW]` of its tile.

    Programs are numbered tile by tile of each plane. Pixels of a tile may lie beyond the lower or right edge.
    """
    columns = tl.cdiv(width, TW)
    tiles = tl.cdiv(height, TH) * columns
    plane = tl.program_id(0) // tiles
    t = tl.program_id(0) % tiles
    y = t // columns * TH + tl.arange(0, TH)
    x = t % columns * TW + tl.arange(0, TW)
    return plane // channels, plane.to(tl.int64), y[:, None], x[None, :]


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
def normalized(down, across, square):
    """q, w and `a - square` of a difference."""
    t = down * down + across * across
    w = inverse_root(t + square)
    return w * down, w * across, w, t


@triton.jit
def bend(down, across, v, h, eps, square):
    """The derivative of q in the direction `d = (v, h)`.

    It is `w (d - q <q, d>)`. As `1 - |q|^2 = (eps w)^2`, that is `w (c p + (eps w)^2 d)` with `p = (q_h, -q_v)` and
    `c = <p, d>`, in which nothing cancels.
    """
    q_v, q_h, w, _ = normalized(down, across, square)
    e = eps * w
    e = e * e
    c = q_h * v - q_v * h
    return w * (q_h * c + e * v), w * (e * h - q_v * c)


@unspecialized("channels", "height", "width", anywhere=None)
def tv_gradient(
    x, rows, value, grad, channels, height, width, eps, square, TH: tl.constexpr, TW: tl.constexpr
):  # fmt: skip
    """The gradient `D^T q`, and `sum sqrt(a) - eps` of each tile into `value` `[B, C, tiles]`, float64."""
    image, plane, i, j = place(channels, height, width, TH, TW)
    if rows is not None:
        if tl.load(rows + image) == 0:
            return
    offset = plane * height * width
    v, h, above_v, above_h, left_v, left_h = differences(x + offset, i, j, height, width)
    down, across, w, t = normalized(v, h, square)
    from_above, _, _, _ = normalized(above_v, above_h, square)
    _, from_left, _, _ = normalized(left_v, left_h, square)
    own = (i < height) & (j < width)
    tl.store(grad + offset + i * width + j, (from_above - down) + (from_left - across), mask=own)
    # sqrt(a) - eps, without the difference.
    energy = tl.where(own, tl.div_rn(t, (t + square) * w + eps), 0.0)
    tl.store(value + tl.program_id(0), tl.sum(energy.to(tl.float64)))


@unspecialized("channels", "height", "width", anywhere=None)
def tv_hvp(
    x, v, rows, out, channels, height, width, eps, square, TH: tl.constexpr, TW: tl.constexpr
):  # fmt: skip
    """`hess r(x) v`; q and w are computed from x again."""
    image, plane, i, j = place(channels, height, width, TH, TW)
    if rows is not None:
        if tl.load(rows + image) == 0:
            return
    offset = plane * height * width
    x_v, x_h, above_v, above_h, left_v, left_h = differences(x + offset, i, j, height, width)
    v_v, v_h, v_above_v, v_above_h, v_left_v, v_left_h = differences(v + offset, i, j, height, width)
    down, across = bend(x_v, x_h, v_v, v_h, eps, square)
    from_above, _ = bend(above_v, above_h, v_above_v, v_above_h, eps, square)
    _, from_left = bend(left_v, left_h, v_left_v, v_left_h, eps, square)
    own = (i < height) & (j < width)
    tl.store(out + offset + i * width + j, (from_above - down) + (from_left - across), mask=own)


def variants() -> list[Variant]:
    """Both kernels as shipped, for a part of the images and for all of them."""
    th, tw, warps = TILE
    types = dict.fromkeys(("channels", "height", "width"), "i32") | dict.fromkeys(("eps", "square"), "fp32")
    types |= {"rows": "*u8", "value": "*fp64"}
    return [
        variant(kernel, {"TH": th, "TW": tw, **absent}, types, warps, 1)
        for kernel in (tv_gradient, tv_hvp)
        for absent in ({}, {"rows": None})
    ]
