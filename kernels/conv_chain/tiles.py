"""Shared functions of the conv chain's Triton kernels: tiles of pixels, planes of channels, 3 x 3 convolutions, SiLU.

A plane is `[B, H, W, CP]` float32 (or bfloat16), contiguous: the channels of a pixel are adjacent, padded with zeros to
CP = 16, 32 or 64. A program processes a tile of TH x TW pixels of one image. Filters are `[9, CP, CP]` (tap, in, out);
those between one channel and all are `[16, CP]`, of which nine rows are taps. Tap t is at
(dy, dx) = (t // 3 - 1, t % 3 - 1).
"""
# Constants are numbers here; only the compiler sees them as constexpr.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false

from __future__ import annotations

import triton
import triton.language as tl


def padded(channels: int) -> int:
    """CP: the padded number of channels of a plane, at least 16 as matrix products require."""
    return max(16, triton.next_power_of_2(channels))


@triton.jit
def tile(height, width, TH: tl.constexpr, TW: tl.constexpr):
    """The image of this program, and the rows and columns `[TH * TW]` of its pixels; tiles are numbered image by image.

    Some pixels lie beyond the image's lower or right edge.
    """
    columns = tl.cdiv(width, TW)
    tiles = tl.cdiv(height, TH) * columns
    image = tl.program_id(0) // tiles
    t = tl.program_id(0) % tiles
    i = tl.arange(0, TH * TW)
    # An image's offset may exceed 2^31 entries; a pixel's offset within its image does not (`unsupported_reason`).
    return image.to(tl.int64), t // columns * TH + i // TW, t % columns * TW + i % TW


@triton.jit
def inside(y, x, height, width):
    """Whether pixels are inside the image."""
    return (y >= 0) & (y < height) & (x >= 0) & (x < width)


@triton.jit
def load_pixels(image, y, x, height, width):
    """Pixels `[P]` of an image `[H, W]`, zero outside."""
    return tl.load(image + y * width + x, mask=inside(y, x, height, width), other=0.0)


@triton.jit
def load_tile(plane, y, x, height, width, CP: tl.constexpr):
    """Pixels `[P, CP]` of a plane `[H, W, CP]` of any dtype as float32, zero outside."""
    offset = (y * width + x)[:, None] * CP + tl.arange(0, CP)[None, :]
    return tl.load(plane + offset, mask=inside(y, x, height, width)[:, None], other=0.0).to(tl.float32)


@triton.jit
def store_tile(plane, value, y, x, height, width, CP: tl.constexpr):  # noqa: PLR0913 - a place, a size and constants
    """Store pixels `[P, CP]` in a plane `[H, W, CP]`."""
    offset = (y * width + x)[:, None] * CP + tl.arange(0, CP)[None, :]
    tl.store(plane + offset, value, mask=inside(y, x, height, width)[:, None])


@triton.jit
def load_filter(w, k, n, CP: tl.constexpr, ADJOINT: tl.constexpr):
    """The rows k and columns n of a filter `[CP, CP]` or of its transpose."""
    if ADJOINT:
        offset = n[None, :] * CP + k[:, None]
    else:
        offset = k[:, None] * CP + n[None, :]
    return tl.load(w + offset)


@triton.jit
def split(a):
    """`a = high + low`: high rounded to tf32's 11 significant bits, low exact in 12."""
    high = ((a.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return high, a - high


@triton.jit
def product(a, w, acc, PRECISION: tl.constexpr):
    """`acc + a w`, `[P, K] [K, N]`; PRECISION is `"tf32x3"`, `"tf32"` or `"ieee"`.

    `"tf32x3"` is as accurate as float32: three products of tf32 parts on the tensor cores. `tl.dot` has a mode of that
    name, but it also repairs infinities and takes 1.4 times the instructions. acc is added separately, because tensor
    cores round a running sum towards zero.
    """
    if PRECISION == "tf32x3":
        a_high, a_low = split(a)
        w_high, w_low = split(w)
        part = tl.dot(a_low, w_high, input_precision="tf32")
        part = tl.dot(a_high, w_low, part, input_precision="tf32")
        part = tl.dot(a_high, w_high, part, input_precision="tf32")
        return acc + part
    else:
        return tl.dot(a, w, acc, input_precision=PRECISION)


@triton.jit
def conv(  # noqa: PLR0913 - a place, a size and constants
    plane, w, y, x, height, width, CP: tl.constexpr, ADJOINT: tl.constexpr, PRECISION: tl.constexpr
):
    """All channels to all: `sum_t plane[p + t] W_t`, or `sum_t plane[p - t] W_t^T`; `[P, CP]`.

    Each pixel is read nine times, eight of them from the L1 cache. The outer loop is not unrolled, to save registers.
    """
    SIGN: tl.constexpr = -1 if ADJOINT else 1
    K: tl.constexpr = 16 if CP == 16 else 32
    DOWN: tl.constexpr = 3 if CP == 16 else 9
    ALONG: tl.constexpr = 9 // DOWN
    k = tl.arange(0, K)
    acc = tl.zeros((y.shape[0], CP), tl.float32)
    for r in tl.range(0, DOWN * (CP // K), num_stages=1):
        from_channel = r // DOWN * K
        for s in tl.static_range(ALONG):
            t = r % DOWN * ALONG + s
            py, px = y + SIGN * (t // 3 - 1), x + SIGN * (t % 3 - 1)
            offset = (py * width + px)[:, None] * CP + (from_channel + k)[None, :]
            a = tl.load(plane + offset, mask=inside(py, px, height, width)[:, None], other=0.0).to(tl.float32)
            wt = load_filter(w + t * CP * CP, from_channel + k, tl.arange(0, CP), CP, ADJOINT)
            acc = product(a, wt, acc, PRECISION)
    return acc


@triton.jit
def load_taps(  # noqa: PLR0913 - a place, a size and constants
    image, y, x, height, width, ADJOINT: tl.constexpr, STEP: tl.constexpr
):
    """`[P, 16]`: for each tap t, the pixel p + t (or p - t) of an image `[H, W]`; zero outside and in columns 9 to 15.

    STEP is 1 if each tap has its own image, `[9, H, W]`.
    """
    t = tl.arange(0, 16)[None, :]
    if ADJOINT:
        py, px = y[:, None] - (t // 3 - 1), x[:, None] - (t % 3 - 1)
    else:
        py, px = y[:, None] + (t // 3 - 1), x[:, None] + (t % 3 - 1)
    offset = STEP * t * (height * width) + py * width + px
    return tl.load(image + offset, mask=inside(py, px, height, width) & (t < 9), other=0.0)


@triton.jit
def expand(  # noqa: PLR0913 - a place, a size and constants
    image, w, y, x, height, width, CP: tl.constexpr, ADJOINT: tl.constexpr, PRECISION: tl.constexpr = "tf32x3"
):
    """One channel to all: `sum_t image[p + t] w_t`, or (transposed all to one) `sum_t image[p - t] w_t`; `[P, CP]`."""
    wt = tl.load(w + tl.arange(0, 16)[:, None] * CP + tl.arange(0, CP)[None, :])
    taps = load_taps(image, y, x, height, width, ADJOINT, 0)
    return product(taps, wt, tl.zeros((y.shape[0], CP), tl.float32), PRECISION)


@triton.jit
def scatter(  # noqa: PLR0913 - a place, a size and constants
    value, w, taps, y, x, height, width, CP: tl.constexpr, PRECISION: tl.constexpr
):
    """First half of all channels to one: store the nine numbers `<value_p, w_t>` of each pixel in `taps` `[9, H, W]`.

    `gather` sums them at their target pixels, which involves other tiles.
    """
    t = tl.arange(0, 16)
    nine = tl.zeros((y.shape[0], 16), tl.float32)
    if CP == 64:
        # Half of the channels at a time: all of them with their filters would use up the registers.
        k = tl.arange(0, 32)[:, None]
        low, high = tl.split(tl.permute(tl.reshape(value, (y.shape[0], 2, 32)), (0, 2, 1)))
        nine = product(low, tl.load(w + t[None, :] * CP + k), nine, PRECISION)
        nine = product(high, tl.load(w + t[None, :] * CP + 32 + k), nine, PRECISION)
    else:
        nine = product(value, tl.load(w + t[None, :] * CP + tl.arange(0, CP)[:, None]), nine, PRECISION)
    offset = t[None, :] * (height * width) + (y * width + x)[:, None]
    tl.store(taps + offset, nine, mask=inside(y, x, height, width)[:, None] & (t < 9)[None, :])


@triton.jit
def gather(taps, y, x, height, width, ADJOINT: tl.constexpr):
    """Second half: `sum_t taps_t[p + t]`, or (transpose of one channel to all) `sum_t taps_t[p - t]`; `[P]`."""
    return tl.sum(load_taps(taps, y, x, height, width, ADJOINT, 1), 1)


INTERPRETED = tl.constexpr(not isinstance(tile, triton.JITFunction))
"""Whether Triton's interpreter runs the kernels; it does not support inline assembly."""


@triton.jit
def exp2(x):
    """`2^x` by the hardware instruction, zero below 2^-126, for which `tl.exp2` spends three more operations."""
    if INTERPRETED:
        return tl.exp2(x)
    else:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def reciprocal(x):
    """`1 / x`, accurate to one bit, zero above 2^126. A division spends four more operations on such x."""
    if INTERPRETED:
        return 1.0 / x
    else:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def silu(n):
    """Value and derivatives: `n s`, `s (1 + n r)`, `s r (2 + n (r - s))`, `s = 1 / (1 + exp(-n))`, `r = 1 - s`.

    One exponential and one reciprocal: `r = exp(-n) s` has no cancellation. If the exponential overflows, s is 0 and r
    only has to be finite.
    """
    e = exp2(n * -1.4426950408889634)
    s = reciprocal(1.0 + e)
    r = tl.minimum(e, 3e38) * s
    sr = s * r
    return n * s, s + n * sr, sr * (2.0 + n * (r - s))
