"""Counted operations and bytes, from which the rooflines are drawn. N: pixels of the batch; float32 everywhere."""

from __future__ import annotations

from dataclasses import dataclass

from ..operators import SRM
from .problem import Problem


@dataclass(frozen=True)
class Count:
    """Of one call: operations, the bytes that ours moves through the device's memory, and those that anybody must."""

    flops: float
    moved: float
    least: float


def sweep_flops(p: Problem) -> int:
    """Of a forward and a backward pass of the convolutions, as direct sums: `2 * 2 N 9 (2 C + (L - 2) C^2)`.

    A gradient is one such pair, a Hessian-vector product at a point that is kept another; the product for the
    parameters is two, as each filter's derivative costs as much as the convolution itself.
    """
    c = p.channels
    return 2 * 2 * p.pixels * 9 * (2 * c + (p.depth - 2) * c * c)


def image_bytes(p: Problem, images: float) -> float:
    """`4 N` for each time that the images are read or written once."""
    return 4 * images * p.pixels


def kept_bytes_cpu(p: Problem) -> int:
    """What the C++ kernels keep of the hidden layers, and h (csrc/cpu/sweep.h)."""
    return p.pixels * 4 * (2 * (p.depth - 2) * p.channels + 2 * (p.depth - 1) * (p.norm == "pixel") + 1)


def separable_flops(p: Problem) -> int:
    """Of a 2-D transform by matrices: a row of W times W x W and a column of H times H x H, `2 N (H + W)`."""
    return 2 * p.pixels * 2 * p.size


def folded_flops(p: Problem) -> int:
    """The same with even and odd parts apart, which halves both matrices: `N (H + W)`."""
    return separable_flops(p) // 2


def walsh_flops(p: Problem, block: int) -> int:
    """Of butterflies: one addition for each number and level, `N log2 block`."""
    return p.pixels * (block.bit_length() - 1)


# -- the conv chain on the GPU (backend/gpu/pixel_norm.py, head red) -----------------------------------------------


def planes_bytes(p: Problem, planes: float) -> float:
    """`4 N C'` for each time that a hidden plane `[B, H, W, C']` is read or written once, C' the padded channels."""
    padded = max(16, 1 << (p.channels - 1).bit_length())
    return 4 * max(0, planes) * p.pixels * padded


def gradient(p: Problem) -> Count:
    """Planes: `6 K - 8`. Each of the K hidden layers writes what it gives and reads what the one before gave, forward
    and back, the last one both at once; all but the first and the last also write and read what their convolution
    gave.

    Images: the nine taps of each end are written and read (36), and 5 for u and the answer. The neighbours' pixels
    that a tile reads again come from the L2 cache and are not counted. Least: x in, `grad r` out.
    """
    moved = image_bytes(p, 41) + planes_bytes(p, 6 * _hidden(p) - 8)
    return Count(sweep_flops(p), moved, image_bytes(p, 2))


def linearize(p: Problem) -> Count:
    """As the gradient, and `K` planes that are kept besides: z of the last hidden layer, g of all but that one.

    Least: x in, `grad r` out, and `2 (K - 1)` planes kept.
    """
    hidden = _hidden(p)
    moved = image_bytes(p, 41) + planes_bytes(p, 7 * hidden - 8)
    return Count(sweep_flops(p), moved, image_bytes(p, 2) + planes_bytes(p, 2 * (hidden - 1)))


def hvp(p: Problem) -> Count:
    """Planes: `9 K - 12`: as the gradient, and what is kept is read. Least: x and v in, `H v` out, as what is kept can
    be computed again."""
    moved = image_bytes(p, 44) + planes_bytes(p, 9 * _hidden(p) - 12)
    return Count(sweep_flops(p), moved, image_bytes(p, 3))


def theta(p: Problem) -> Count:
    """Planes: `15 K - 10`: besides the sweep, each layer's a, a', gu and gu' are written, and read by the sums over
    pixels. Least: x and v in."""
    hidden = _hidden(p)
    moved = image_bytes(p, 10) + planes_bytes(p, 15 * hidden - 10 if hidden > 1 else 8)
    return Count(2 * sweep_flops(p), moved, image_bytes(p, 2))


def _hidden(p: Problem) -> int:
    return p.depth - 1


# -- the structurally random matrix ---------------------------------------------------------------------------


def srm(p: Problem, A: SRM, product: str, transforms: int) -> Count:
    """`transforms` of folded matrices ("dct"), of whole ones ("hadamard") or butterflies ("walsh").

    The least bytes are x in and y out (forward), y in and x out (adjoint), x in and out (normal), and z and y in and x
    out (prox); signs, rows and tables are shared by the batch. An image fits in a block's shared memory, so that
    nothing else need be moved.
    """
    each = {"dct": folded_flops, "hadamard": separable_flops}
    one = each[A.transform](p) if A.transform in each else walsh_flops(p, A.block or 1)
    images, vectors = {"forward": (1, 1), "adjoint": (1, 1), "normal": (2, 0), "prox": (2, 1)}[product]
    least = image_bytes(p, images) + 4.0 * vectors * p.batch * A.measurements
    return Count(transforms * one, least, least)
