"""The vector steps of a round of PGD."""

from __future__ import annotations

import torch

from ..batched.fused import fused
from ..batched.linalg import add, dot, secant, select


@fused("x", "g")
def descend(x: torch.Tensor, tau: torch.Tensor, g: torch.Tensor, active: torch.Tensor) -> torch.Tensor:
    """`x - tau g`, undefined for inactive images."""
    return add(x, -tau, g, active)[0]


@fused("prox", "x", "g")
def pgd_step(
    prox: torch.Tensor, x: torch.Tensor, g: torch.Tensor, active: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`step = prox - x`, `x + step`, and `<step, step>`, `<x, x>`, `<g, g>`, `[3, B]`.

    All are undefined for inactive images.
    """
    step = prox - x
    return step, x + step, torch.stack([dot(step, step), dot(x, x), dot(g, g)])


@fused("candidate", "candidate_g")
def compare(
    idx: torch.Tensor, candidate: torch.Tensor, candidate_g: torch.Tensor, x: torch.Tensor, g: torch.Tensor
) -> torch.Tensor:
    """The four sums of `secant`, and `<candidate, candidate>`, `[5, b]`."""
    return torch.stack([*secant(idx, candidate, candidate_g, x, g).unbind(1), dot(candidate, candidate)])


@fused("pairs", in_place=True)
def take(rows: torch.Tensor, *pairs: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """For each pair `(to, source)`: `source` if `rows`, otherwise `to`; donates every `to`."""
    return tuple(select(rows, source, to) for to, source in pairs)
