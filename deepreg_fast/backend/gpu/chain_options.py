"""Options of the conv chain's sweeps on a GPU, and the layers of a network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from torch import nn

from ... import checks
from ...errors import InputError
from ...functional.conv_chain import ChannelNorm, ConvChainForm


@dataclass(frozen=True)
class ChainOptions:
    """Numerical and launch options of the sweeps.

    `precision` of the convolutions: `"tf32x3"`, float32 accuracy on tensor cores; `"ieee"`, float32 without them;
    `"tf32"`, three digits: tight solves stagnate, and a LayerNorm's filters are no longer centered.
    `storage` of the planes between kernels: `"float32"`, or `"bfloat16"` with half the bytes and three digits: solves
    stagnate as with tf32 (docs/kernels.md).
    `plane_bytes`: the batch is processed in parts, so that a plane of all channels takes at most this many bytes (but
    at least one image); small planes stay in the L2 cache. The bits of an image do not depend on it.
    `tile`: height, width and warps of a program; None uses the kernels' own.
    `maxnreg`: maximum registers per thread of `primal` and of `tangent`, each a number or None (the compiler decides).
    Without a pair, the kernels' own limits apply, or with a `tile` the compiler's.
    `fused`: gradients and Hessian-vector products in one launch each, where `fused_chain.py` covers them. They have not
    run on a GPU.
    """

    precision: str = "tf32x3"
    plane_bytes: int = 512 << 20
    tile: tuple[int, int, int] | None = None
    storage: str = "float32"
    maxnreg: tuple[int | None, int | None] | None = None
    fused: bool = False

    def __post_init__(self) -> None:
        checks.choice(self.precision, "precision", ("tf32x3", "ieee", "tf32"))
        checks.choice(self.storage, "storage", ("float32", "bfloat16"))
        checks.integer(self.plane_bytes, "plane_bytes", 1)
        if self.maxnreg is not None and len(self.maxnreg) != 2:
            raise InputError(f"maxnreg must be None or a pair of numbers, but is {self.maxnreg!r}.")
        for limit in self.maxnreg or ():
            if limit is not None:
                checks.integer(limit, "maxnreg", 16)


DEFAULT = ChainOptions()


def convs_of(form: ConvChainForm) -> list[nn.Conv2d]:
    """The convolutions."""
    return cast("list[nn.Conv2d]", list(form.net.convs))


def norms_of(form: ConvChainForm) -> list[ChannelNorm]:
    """The LayerNorms, if there are any."""
    return cast("list[ChannelNorm]", list(form.net.norms)) if form.net.norm != "none" else []
