"""Counts of operations and bytes for the rooflines. N is the number of pixels of the batch; all data are float32."""

from __future__ import annotations

from dataclasses import dataclass

from ..operators import SRM
from .workload import Workload


@dataclass(frozen=True)
class Count:
    """Counts of one call: operations, the bytes that our kernel moves through device memory, and the minimum that any
    implementation must move."""

    flops: float
    moved: float
    least: float


def sweep_flops(p: Workload) -> int:
    """Operations of a forward and a backward pass of the convolutions as direct sums: `2 * 2 N 9 (2 C + (L - 2) C^2)`.

    A gradient is one such pair, and so is a Hessian-vector product at a saved linearization. The parameter product is
    two, as each filter's derivative costs as much as the convolution itself.
    """
    c = p.channels
    return 2 * 2 * p.pixels * 9 * (2 * c + (p.depth - 2) * c * c)


def image_bytes(p: Workload, images: float) -> float:
    """Bytes of `images` reads or writes of the batch, `4 N` each."""
    return 4 * images * p.pixels


def saved_bytes_cpu(p: Workload) -> int:
    """Bytes that the C++ kernels save of the hidden layers and of h (csrc/cpu/sweep.h)."""
    return p.pixels * 4 * (2 * (p.depth - 2) * p.channels + 2 * (p.depth - 1) * (p.norm == "pixel") + 1)


def separable_flops(p: Workload) -> int:
    """Operations of a 2-D transform by matrices: rows times W x W and columns times H x H, `2 N (H + W)`."""
    return 2 * p.pixels * 2 * p.size


def folded_flops(p: Workload) -> int:
    """The same with separate even and odd parts, which halves both matrices: `N (H + W)`."""
    return separable_flops(p) // 2


def walsh_flops(p: Workload, block: int) -> int:
    """Operations of butterflies: one addition per number and level, `N log2 block`."""
    return p.pixels * (block.bit_length() - 1)


# -- the conv chain on the GPU (backend/gpu/pixel_norm.py, head red) -----------------------------------------------


def planes_bytes(p: Workload, planes: float) -> float:
    """Bytes of `planes` reads or writes of a hidden plane `[B, H, W, C']`, `4 N C'` each; C' is the padded channels."""
    padded = max(16, 1 << (p.channels - 1).bit_length())
    return 4 * max(0, planes) * p.pixels * padded


def gradient(p: Workload) -> Count:
    """Planes: `6 K - 8`. Each of the K hidden layers writes its output and reads that of the previous layer, forward
    and backward; the last layer does both at once. All except the first and the last also write and read the output of
    their convolution.

    Images: the nine taps at each end are written and read (36), plus 5 for u and the result. Neighboring pixels that a
    tile reads again come from the L2 cache and are not counted. Minimum: read x, write `grad r`.
    """
    moved = image_bytes(p, 41) + planes_bytes(p, 6 * _hidden(p) - 8)
    return Count(sweep_flops(p), moved, image_bytes(p, 2))


def linearize(p: Workload) -> Count:
    """The gradient plus `K` saved planes: z of the last hidden layer, and g of all others.

    Minimum: read x, write `grad r` and `2 (K - 1)` saved planes.
    """
    hidden = _hidden(p)
    moved = image_bytes(p, 41) + planes_bytes(p, 7 * hidden - 8)
    return Count(sweep_flops(p), moved, image_bytes(p, 2) + planes_bytes(p, 2 * (hidden - 1)))


def hvp(p: Workload) -> Count:
    """Planes: `9 K - 12`: as for the gradient, plus reading the saved planes. Minimum: read x and v, write `H v`,
    because saved planes can be recomputed."""
    moved = image_bytes(p, 44) + planes_bytes(p, 9 * _hidden(p) - 12)
    return Count(sweep_flops(p), moved, image_bytes(p, 3))


def theta(p: Workload) -> Count:
    """Planes: `15 K - 10`: in addition to the sweep, each layer's a, a', gu and gu' are written, and read by the sums
    over pixels. Minimum: read x and v."""
    hidden = _hidden(p)
    moved = image_bytes(p, 10) + planes_bytes(p, 15 * hidden - 10 if hidden > 1 else 8)
    return Count(2 * sweep_flops(p), moved, image_bytes(p, 2))


def _hidden(p: Workload) -> int:
    return p.depth - 1


# -- the structurally random matrix ---------------------------------------------------------------------------


def srm(p: Workload, A: SRM, product: str, transforms: int) -> Count:
    """`transforms` times folded matrices ("dct"), full matrices ("hadamard") or butterflies ("walsh").

    Minimum bytes: read x and write y (forward), read y and write x (adjoint), read and write x (normal), read z and y
    and write x (prox). Signs, rows and tables are shared by the batch. An image fits into a block's shared memory, so
    nothing else needs to be moved.
    """
    flops_of = {"dct": folded_flops, "hadamard": separable_flops}
    flops = flops_of[A.transform](p) if A.transform in flops_of else walsh_flops(p, A.block or 1)
    images, vectors = {"forward": (1, 1), "adjoint": (1, 1), "normal": (2, 0), "prox": (2, 1)}[product]
    least = image_bytes(p, images) + 4.0 * vectors * p.batch * A.measurements
    return Count(transforms * flops, least, least)
