"""The sweeps of the conv chain, without a LayerNorm or with one over the channels of a pixel (docs/math.md, M9, M10).

A sweep launches `primal` or `tangent` for each hidden layer, forward and backward, in the order of
`backend/gpu/pixel_norm.py`. Hidden layers are 1..K, the last convolution is K + 1; `FIRST` is layer 1, `LAST` is
layer K. Outputs whose pointer is None are not computed. Filters and biases before a LayerNorm are centered over their
outputs (`pack`), so that the means of u and of `gamma SiLU'(n) g` do not occur (docs/kernels.md).
"""

# Constants are numbers here; only the compiler sees them as constexpr.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false

from __future__ import annotations

import itertools
from typing import Any

import triton
import triton.language as tl

from ..variants import Variant, unspecialized
from .tiles import conv, expand, gather, inside, load_pixels, load_tile, scatter, silu, store_tile, tile

RED = tl.constexpr(0)
RESIDUAL = tl.constexpr(1)
TILES = {16: (8, 16, 4), 32: (8, 8, 4), 64: (8, 8, 8)}
"""Height, width and warps of a tile by CP."""
BLOCK = 1024
"""Number of tiles of an image that are added up at a time."""

IMAGES = ("u", "v", "c", "c1", "image_in", "out", "h_taps", "g_taps", "value", "rows")
"""Tensors of any alignment: parts of images of any size, and numbers of an image or a tile."""


def maxnreg(cp: int, sums: bool) -> int | None:
    """Maximum registers per thread of `primal` and `tangent`; None if the compiler decides.

    With 168, three programs of four warps share a multiprocessor instead of two. Layers that also compute sums would
    spill.
    """
    return None if cp != 16 or sums else 168


@triton.jit
def pack(  # noqa: PLR0913 - a kernel's launch
    w, bias, gamma, beta, filters, vectors, gain, C: tl.constexpr, CP: tl.constexpr, FIRST: tl.constexpr,
    LAST: tl.constexpr, CENTERED: tl.constexpr,
):  # fmt: skip
    """Pack the parameters of one convolution and the LayerNorm after it for the other kernels; grid: 16 taps.

    `filters` `[9, CP, CP]` (tap, in, out), or `[16, CP]` for FIRST and LAST, including the gain; `vectors` `[3, CP]`:
    bias, gamma, beta. CENTERED: filters and bias are centered over the outputs, in float64.
    """
    t = tl.program_id(0)
    c = tl.arange(0, CP)
    # The taps 9 to 15 are padding.
    real = c < tl.where(t < 9, C, 0)
    if FIRST or LAST:
        v = tl.load(w + c * 9 + t, mask=real, other=0.0).to(tl.float64)
        if LAST:
            v = v / gain
        else:
            v = v * gain
            if CENTERED:
                v = tl.where(real, v - tl.sum(v, 0) / C, 0.0)
        tl.store(filters + t * CP + c, v.to(tl.float32))
    else:
        real_pair = real[:, None] & real[None, :]
        v = tl.load(w + (c[None, :] * C + c[:, None]) * 9 + t, mask=real_pair, other=0.0).to(tl.float64)
        if CENTERED:
            v = tl.where(real_pair, v - (tl.sum(v, 1) / C)[:, None], 0.0)
        offset = t * CP * CP + c[:, None] * CP + c[None, :]
        tl.store(filters + offset, v.to(tl.float32), mask=(c < tl.where(t < 9, CP, 0))[:, None])
    if t == 0:
        outputs = c < (1 if LAST else C)
        b = tl.load(bias + c, mask=outputs, other=0.0).to(tl.float64)
        if LAST:
            b = b / gain
        if CENTERED:
            b = tl.where(outputs, b - tl.sum(b, 0) / C, 0.0)
        tl.store(vectors + c, b.to(tl.float32))
        if gamma is not None:
            tl.store(vectors + CP + c, tl.load(gamma + c, mask=c < C, other=0.0))
            tl.store(vectors + 2 * CP + c, tl.load(beta + c, mask=c < C, other=0.0))


@triton.jit
def _normalized(raw, vectors, eps, C: tl.constexpr, CP: tl.constexpr, NORM: tl.constexpr):
    """`n`, `xhat`, `rs`, `gamma` of a convolution's output; without LayerNorm n equals it and the others are unused."""
    if NORM:
        c = tl.arange(0, CP)
        gamma = tl.load(vectors + CP + c)[None, :]
        rs = tl.rsqrt(tl.sum(raw * raw, 1) / C + eps)[:, None]
        xhat = raw * rs
        return gamma * xhat + tl.load(vectors + 2 * CP + c)[None, :], xhat, rs, gamma
    else:
        return raw, raw, 1.0, 1.0


@triton.jit
def _mean(v, C: tl.constexpr):
    """The mean over the channels, `[P, 1]`."""
    return (tl.sum(v, 1) / C)[:, None]


@unspecialized(anywhere=IMAGES)
def primal(  # noqa: PLR0913 - a kernel's launch
    u, c, before, after, w, w_after, vectors, last, rows, z, g, a_out, gu_out, h_taps, g_taps, value,
    height, width, alpha, eps,
    C: tl.constexpr, CP: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr,
    FORWARD: tl.constexpr, BACKWARD: tl.constexpr, HEAD: tl.constexpr, NORM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A hidden layer of the gradient's sweep.

    FORWARD: `z = W * before + b`; `a = SiLU(LN(z))` to `a_out`, or for LAST `h_taps` for h (`scatter`).
    BACKWARD: `g = W_after^T * after`, with c instead of `after` for LAST; `gu = LN'^T(SiLU' g)` to `gu_out`, or for
    FIRST to `g_taps`.
    For the head red, c is `-u / 2` whatever h is. LAST then runs FORWARD and BACKWARD in one launch, and writes
    `r = (1 + alpha) / 2 |u|^2 - <u, h> / 2` with `-<u, h> / 2 = <a, g> - b <u, 1> / 2` to `value` `[B, tiles]`.
    """
    image, y, x = tile(height, width, TH, TW)
    if rows is not None:
        if tl.load(rows + image) == 0:
            return
    pixel = image * height * width
    plane = pixel * CP
    # The convolutions of all channels come first: they need registers. Only LAST can be FORWARD and BACKWARD at once.
    if BACKWARD and not LAST:
        cot = conv(after + plane, w_after, y, x, height, width, CP, True, PRECISION)
    if FIRST:
        raw = expand(u + pixel, w, y, x, height, width, CP, False, PRECISION)
        raw += tl.load(vectors + tl.arange(0, CP))[None, :]
    elif FORWARD:
        raw = conv(before + plane, w, y, x, height, width, CP, False, PRECISION)
        raw += tl.load(vectors + tl.arange(0, CP))[None, :]
    else:
        raw = load_tile(z + plane, y, x, height, width, CP)
    n, xhat, rs, gamma = _normalized(raw, vectors, eps, C, CP, NORM)
    a, slope, bend = silu(n)
    if FORWARD:
        if z is not None:
            store_tile(z + plane, raw, y, x, height, width, CP)
        if a_out is not None:
            store_tile(a_out + plane, a, y, x, height, width, CP)
    if BACKWARD:
        if LAST:
            cot = expand(c + pixel, w_after, y, x, height, width, CP, True, PRECISION)
            if HEAD == RED:
                cot = -0.5 * cot
        if g is not None:
            store_tile(g + plane, cot, y, x, height, width, CP)
        gu = slope * cot
        if NORM:
            t = gamma * gu
            gu = rs * (t - xhat * _mean(t * xhat, C))
        if gu_out is not None:
            store_tile(gu_out + plane, gu, y, x, height, width, CP)
        if FIRST:
            scatter(gu, w, g_taps + pixel * 9, y, x, height, width, CP, PRECISION)
        if value is not None:
            v = load_pixels(u + pixel, y, x, height, width)
            energy = 0.5 * v * ((1.0 + alpha) * v - tl.load(last)) + tl.sum(a * cot, 1)
            energy = tl.where(inside(y, x, height, width), energy, 0.0)
            tl.store(value + tl.program_id(0), tl.sum(energy.to(tl.float64), 0))
    # This comes last, when few other values occupy registers.
    if h_taps is not None:
        scatter(a, w_after, h_taps + pixel * 9, y, x, height, width, CP, PRECISION)


@unspecialized(anywhere=IMAGES)
def tangent(  # noqa: PLR0913 - a kernel's launch
    u, v, c, c1, before1, after1, w, w_after, vectors, rows, z, g, raw1_in, raw1_out, a_out, a1_out, gu_out, gu1_out,
    h_taps, g_taps, sums, height, width, eps,
    C: tl.constexpr, CP: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr,
    FORWARD: tl.constexpr, BACKWARD: tl.constexpr, HEAD: tl.constexpr, NORM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The layer's derivative along v (a trailing 1), at a point whose z and g are saved.

    FORWARD: `z' = W * before'` to `raw1_out`, `a'` to `a1_out` and a to `a_out`, or for LAST `h_taps`.
    BACKWARD: `g' = W_after^T * after'`, with c' for LAST; `gu'` to `gu1_out`, gu to `gu_out`, or for FIRST `g_taps`.
    `sums` `[B, tiles, 3, CP]`, float64, per tile: `gu'` (bias), `cn' xhat + cn xhat'` (gamma), `cn'` (beta).
    """
    image, y, x = tile(height, width, TH, TW)
    if rows is not None:
        if tl.load(rows + image) == 0:
            return
    pixel = image * height * width
    plane = pixel * CP
    # The convolutions of all channels come first: they need registers. Only LAST can be FORWARD and BACKWARD at once.
    if BACKWARD and not LAST:
        cot1 = conv(after1 + plane, w_after, y, x, height, width, CP, True, PRECISION)
    if FIRST:
        raw1 = expand(v + pixel, w, y, x, height, width, CP, False, PRECISION)
    elif FORWARD:
        raw1 = conv(before1 + plane, w, y, x, height, width, CP, False, PRECISION)
    else:
        raw1 = load_tile(raw1_in + plane, y, x, height, width, CP)
    if BACKWARD and LAST:
        cot = expand(c + pixel, w_after, y, x, height, width, CP, True, PRECISION)
        cot1 = expand(c1 + pixel, w_after, y, x, height, width, CP, True, PRECISION)
        if HEAD == RED:
            cot = -0.5 * cot
            cot1 = -0.5 * cot1
    elif BACKWARD:
        cot = load_tile(g + plane, y, x, height, width, CP)
    if FIRST:
        bias = tl.load(vectors + tl.arange(0, CP))[None, :]
        raw = expand(u + pixel, w, y, x, height, width, CP, False, PRECISION) + bias
    else:
        raw = load_tile(z + plane, y, x, height, width, CP)
    n, xhat, rs, gamma = _normalized(raw, vectors, eps, C, CP, NORM)
    a, slope, bend = silu(n)
    n1 = raw1
    if NORM:
        p = _mean(xhat * raw1, C)
        xhat1 = rs * (raw1 - xhat * p)
        n1 = gamma * xhat1
    if FORWARD:
        if raw1_out is not None:
            store_tile(raw1_out + plane, raw1, y, x, height, width, CP)
        if a_out is not None:
            store_tile(a_out + plane, a, y, x, height, width, CP)
        if a1_out is not None:
            store_tile(a1_out + plane, slope * n1, y, x, height, width, CP)
    if BACKWARD:
        cn = slope * cot
        cn1 = bend * n1 * cot + slope * cot1
        if sums is not None:
            to = sums + tl.program_id(0).to(tl.int64) * (3 * CP) + tl.arange(0, CP)
            valid = inside(y, x, height, width)[:, None]
            if NORM:
                tl.store(to + CP, tl.sum(tl.where(valid, cn1 * xhat + cn * xhat1, 0.0).to(tl.float64), 0))
                tl.store(to + 2 * CP, tl.sum(tl.where(valid, cn1, 0.0).to(tl.float64), 0))
        if NORM:
            t = gamma * cn
            t1 = gamma * cn1
            m2 = _mean(t * xhat, C)
            gu = rs * (t - xhat * m2)
            gu1 = rs * (t1 - p * gu - m2 * xhat1 - xhat * _mean(t1 * xhat + t * xhat1, C))
        else:
            gu = cn
            gu1 = cn1
        if gu_out is not None:
            store_tile(gu_out + plane, gu, y, x, height, width, CP)
        if gu1_out is not None:
            store_tile(gu1_out + plane, gu1, y, x, height, width, CP)
        if g_taps is not None:
            scatter(gu1, w, g_taps + pixel * 9, y, x, height, width, CP, PRECISION)
        if sums is not None:
            tl.store(to, tl.sum(tl.where(valid, gu1, 0.0).to(tl.float64), 0))
    # This comes last, when few other values occupy registers.
    if h_taps is not None:
        scatter(slope * n1, w_after, h_taps + pixel * 9, y, x, height, width, CP, PRECISION)


@unspecialized(anywhere=IMAGES)
def head(  # noqa: PLR0913 - a kernel's launch
    image_in, h_taps, bias, rows, c, value, height, width, alpha,
    TH: tl.constexpr, TW: tl.constexpr, HEAD: tl.constexpr,
):  # fmt: skip
    """`c = phi_h(u, h)` for the heads residual (`h - u`) and norm (`h`); the same for v and h', without the bias.

    `value` `[B, tiles]`: `alpha / 2 |u|^2 + |c|^2 / 2`.
    """
    image, y, x = tile(height, width, TH, TW)
    if rows is not None:
        if tl.load(rows + image) == 0:
            return
    pixel = image * height * width
    h = gather(h_taps + pixel * 9, y, x, height, width, False)
    if bias is not None:
        h += tl.load(bias)
    v = load_pixels(image_in + pixel, y, x, height, width)
    cot = h - v if HEAD == RESIDUAL else h
    valid = inside(y, x, height, width)
    tl.store(c + pixel + y * width + x, cot, mask=valid)
    if value is not None:
        energy = tl.where(valid, 0.5 * (alpha * v * v + cot * cot), 0.0)
        tl.store(value + tl.program_id(0), tl.sum(energy.to(tl.float64), 0))


@unspecialized(anywhere=IMAGES)
def join(  # noqa: PLR0913 - a kernel's launch
    image_in, c, h_taps, g_taps, bias, rows, out, height, width, alpha,
    TH: tl.constexpr, TW: tl.constexpr, HEAD: tl.constexpr,
):  # fmt: skip
    """The gradient `alpha u + phi_u + W_1^T gu_1`; with v in place of u and without the bias, the Hessian product."""
    image, y, x = tile(height, width, TH, TW)
    if rows is not None:
        if tl.load(rows + image) == 0:
            return
    pixel = image * height * width
    valid = inside(y, x, height, width)
    v = load_pixels(image_in + pixel, y, x, height, width)
    through = gather(g_taps + pixel * 9, y, x, height, width, True)
    if HEAD == RED:
        h = gather(h_taps + pixel * 9, y, x, height, width, False)
        if bias is not None:
            h += tl.load(bias)
        through += (1.0 + alpha) * v - 0.5 * h
    elif HEAD == RESIDUAL:
        through += alpha * v - load_pixels(c + pixel, y, x, height, width)
    else:
        through += alpha * v
    tl.store(out + pixel + y * width + x, through, mask=valid)


@unspecialized("tiles", anywhere=IMAGES)
def total(value, rows, out, tiles, BLOCK: tl.constexpr, BLOCKS: tl.constexpr):
    """`out_b = sum_t value[b, t]`, one program per image, in an order that depends only on the image's size."""
    image = tl.program_id(0).to(tl.int64)
    if rows is not None:
        if tl.load(rows + image) == 0:
            return
    t = tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float64)
    for i in range(BLOCKS):
        acc += tl.load(value + image * tiles + i * BLOCK + t, mask=i * BLOCK + t < tiles, other=0.0)
    tl.store(out + image, tl.sum(acc, 0).to(tl.float32))


# Hidden layers of networks of 2, 3 and 4 convolutions: FIRST, LAST, forward or backward, and the outputs.
_PRIMAL = (
    (True, False, "f", "a_out"),
    (False, False, "f", "z a_out"),
    (False, True, "fb", "z h_taps gu_out value"),
    (True, True, "fb", "h_taps g_taps value"),
    (False, True, "f", "z h_taps"),
    (False, True, "b", "z gu_out"),
    (False, False, "b", "z g gu_out"),
    (True, False, "b", "g g_taps"),
)
_TANGENT = (
    (True, False, "f", "a_out a1_out"),
    (False, False, "f", "raw1_out a_out a1_out"),
    (False, True, "fb", "h_taps gu1_out"),
    (False, True, "fb", "a_out a1_out gu_out gu1_out sums"),
    (False, True, "f", "raw1_out h_taps"),
    (False, True, "b", "gu1_out"),
    (False, False, "b", "gu_out gu1_out sums"),
    (True, False, "b", "g_taps"),
)
_OUTPUTS = {
    primal: ("z", "g", "a_out", "gu_out", "h_taps", "g_taps", "value"),
    tangent: ("raw1_out", "a_out", "a1_out", "gu_out", "gu1_out", "h_taps", "g_taps", "sums"),
}


def variants() -> list[Variant]:
    """All layers of a network of 16 channels with LayerNorm, the largest ones of others, and the small kernels."""
    shipped = []
    for cp, (th, tw, warps) in TILES.items():
        size = {"TH": th, "TW": tw}
        for first, last in ((True, False), (False, False), (False, True)):
            position = {"FIRST": first, "LAST": last, "CENTERED": not last}
            absent = {"gamma": None, "beta": None} if last else {}
            shipped.append(_variant(pack, {"C": cp, "CP": cp, **position, **absent}, 4))
        for kernel, cases in ((primal, _PRIMAL), (tangent, _TANGENT)):
            for norm, (first, last, ways, outputs) in itertools.product((True, False), cases):
                # Forward and backward in one launch, and backward with all outputs.
                if (cp, norm) != (16, True) and not (ways == "fb" or len(outputs.split()) == 3):
                    continue
                absent = {n: None for n in _OUTPUTS[kernel] if n not in outputs.split()}
                way = {"FIRST": first, "LAST": last, "FORWARD": "f" in ways, "BACKWARD": "b" in ways}
                head_of = {"HEAD": 0 if ways == "fb" else 1, "NORM": norm, "PRECISION": "tf32x3"}
                constants = {"C": cp, "CP": cp, **size, **way, **head_of, **absent}
                limit = maxnreg(cp, "sums" in outputs)
                shipped.append(_variant(kernel, constants, warps, maxnreg=limit))
                if cp == 16 and ways == "fb":
                    shipped.append(_variant(kernel, constants, warps, "*bf16", limit))
    th, tw, warps = TILES[16]
    size = {"TH": th, "TW": tw}
    shipped += [_variant(join, {**size, "HEAD": h}, warps) for h in (0, 1)]
    shipped += [_variant(head, {**size, "HEAD": 1}, warps), _variant(total, {"BLOCK": BLOCK, "BLOCKS": 1}, 4)]
    return shipped


_STORED = ("before", "before1", "after", "after1", "z", "g", "raw1_in", *itertools.chain(*_OUTPUTS.values()))


def _variant(
    kernel: Any, constants: dict[str, Any], warps: int, stored: str = "*fp32", maxnreg: int | None = None
) -> Variant:
    types = dict.fromkeys(("alpha", "eps", "gain"), "fp32") | dict.fromkeys(("height", "width", "tiles"), "i32")
    types |= dict.fromkeys(_STORED, stored) | dict.fromkeys(("h_taps", "g_taps"), "*fp32")
    types |= {"rows": "*u8", "value": "*fp64", "sums": "*fp64"}
    signature = {n: types.get(n, "*fp32") for n in kernel.arg_names if n not in constants}
    return Variant(kernel, signature, constants, warps, 1, maxnreg)
