"""Vector work on a batch, image by image: nothing here mixes two images."""

from __future__ import annotations

import torch


def dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`<a_b, b_b>` for each image, `[B, ...] -> [B]`, accumulated in float64.

    The sum runs over rows first and over the row sums second, so that no reduction has a single output: torch
    splits only those between threads, which would make the bits depend on the batch size.
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


def norm(a: torch.Tensor) -> torch.Tensor:
    """`||a_b||` for each image, `[B, ...] -> [B]`, in float64."""
    return torch.sqrt(dot(a, a))


def expand(s: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """One number (or flag) per image, `[B]`, shaped to multiply `like` `[B, ...]`; floats take its dtype."""
    t = s.to(like.dtype) if s.is_floating_point() else s
    return t.reshape(-1, *([1] * (like.ndim - 1)))


def select(rows: torch.Tensor, a: torch.Tensor, b: torch.Tensor | float) -> torch.Tensor:
    """`a` for the images where `rows` `[B]` is true, `b` for the others; NaN in the one not taken stays out."""
    return torch.where(expand(rows, a), a, b)


def power_of_two(exponent: torch.Tensor) -> torch.Tensor:
    """`2^e` in float64 for int64 `e` in [-1022, 1023] (others are clamped), exact on every device."""
    return ((exponent.clamp(-1022, 1023) + 1023) << 52).view(torch.float64)
