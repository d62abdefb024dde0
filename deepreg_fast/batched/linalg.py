"""Vector arithmetic on a batch. Every function treats each image separately."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..backend import active_images
from .fused import fused
from .loop import uses_mask


@fused("a", "b")
def dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`<a_b, b_b>` for each image, `[B, ...] -> [B]`, accumulated in float64.

    The sum runs over chunks first and over the chunk sums second, so that no reduction has a single output. Torch
    splits only such reductions among threads, which would make the bits depend on the batch size.
    """
    if not len(a):
        return torch.zeros(0, dtype=torch.float64, device=a.device)
    rows = (a.double() * b.double()).flatten(1)
    if rows.shape[1] == 0:
        return rows.sum(1)
    width = max(1, int(rows.shape[1] ** 0.5))
    full = rows.shape[1] // width * width
    head = rows[:, :full].reshape(rows.shape[0], -1, width).sum(2)
    out = torch.cat([head, rows[:, full:]], 1) if full < rows.shape[1] else head
    return out.cumsum(1)[:, -1]


@fused("pairs")
def dots(*pairs: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """`<a_b, b_b>` of each pair, `[pairs, B]`, float64; at most four different tensors."""
    return torch.stack([dot(a, b) for a, b in pairs])


# Without the mask, because images for which `rows` is false are copied, not skipped.
@active_images(None)
@fused("x", "p")
def add(x: torch.Tensor, s: torch.Tensor, p: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`x_b + s_b p_b` if `rows` `[B]` is true, otherwise `x_b`; and its squared norm, `[B]`, float64."""
    out = select(rows, x + expand(s, x) * p, x)
    return out, dot(out, out)


@fused("candidate", "candidate_g")
def secant(
    idx: torch.Tensor, candidate: torch.Tensor, candidate_g: torch.Tensor, x: torch.Tensor, g: torch.Tensor
) -> torch.Tensor:
    """`<dx, dx>, <dg, dg>, <dx, dg>, <g, g>` for each image `i` of `idx` `[b]`, `[b, 4]`, float64.

    `dx = candidate - x[i]` and `dg = candidate_g - g[i]`, where `x` and `g` `[B, ...]` hold all images.
    """
    old = g[idx]
    dx, dg = candidate - x[idx], candidate_g - old
    return torch.stack([dot(dx, dx), dot(dg, dg), dot(dx, dg), dot(old, old)], 1)


def ordered_sum(terms: Sequence[torch.Tensor]) -> torch.Tensor:
    """The sum in the order of the terms: `torch.sum` adds in another order at the end of a vector."""
    first, *rest = terms
    for t in rest:
        first = first + t
    return first


def norm(a: torch.Tensor) -> torch.Tensor:
    """`||a_b||` for each image, `[B, ...] -> [B]`, in float64."""
    return torch.sqrt(dot(a, a))


def expand(s: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """One number (or flag) per image, `[B]`, reshaped to broadcast to `like` `[B, ...]`; floats take its dtype."""
    t = s.to(like.dtype) if s.is_floating_point() else s
    return t.reshape(-1, *([1] * (like.ndim - 1)))


def select(rows: torch.Tensor, a: torch.Tensor, b: torch.Tensor | float) -> torch.Tensor:
    """`a` for the images for which `rows` `[B]` is true, otherwise `b`; NaN in the unselected one has no effect.

    On the CPU, where testing is cheap, `a` itself is returned if all are true.
    """
    if not uses_mask(a) and bool(rows.all()):
        return a
    return torch.where(expand(rows, a), a, b)


def gather(t: torch.Tensor, idx: torch.Tensor) -> torch.Tensor:
    """The images `idx` of `t`. `idx` is distinct and ascending, so if it is as long as `t`, `t` itself is returned."""
    return t if len(idx) == len(t) else t[idx]


def scatter(t: torch.Tensor, idx: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """`t` with `value` in the images `idx`: `value` itself if `idx` is all images, else `t`, changed in place."""
    if len(idx) == len(t):
        return value
    t[idx] = value
    return t


def solve_spd(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`A_b^{-1} b_b` for symmetric positive definite `a` `[B, m, m]` and `b` `[B, m]`, m small.

    Gauss-Jordan elimination without pivoting, which such matrices do not need. It is a fixed sequence of elementwise
    operations, so it does not synchronize, and the bits of a system do not depend on the others.
    """
    t = torch.cat([a, b[..., None]], 2)
    for k in range(a.shape[1]):
        row = t[:, k : k + 1, 1:] / t[:, k : k + 1, :1]
        t = t[:, :, 1:] - t[:, :, :1] * row
        t[:, k : k + 1] = row
    return t[..., 0]


def hypot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`sqrt(a^2 + b^2)` for numbers `[B]`, without overflow; NaN if either is.

    `torch.hypot` uses different code for the last elements of a vector, so the bits of an image would depend on the
    batch size (docs/design.md).
    """
    a, b = a.abs(), b.abs()
    large, small = torch.maximum(a, b), torch.minimum(a, b)
    # Equal numbers may be zeros or infinities, whose quotient is NaN.
    ratio = torch.where(small == large, 1.0, small / large)
    return large * torch.sqrt(1.0 + ratio * ratio)


def exp2_int(exponent: torch.Tensor) -> torch.Tensor:
    """`2^e` in float64 for int64 `e` in [-1022, 1023] (others are clamped), exact on every device."""
    return ((exponent.clamp(-1022, 1023) + 1023) << 52).view(torch.float64)
