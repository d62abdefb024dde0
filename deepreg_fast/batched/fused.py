"""The vector work of one iteration. Each function reads memory once if the backend has kernels for it.

Leading arguments are donated: outputs may alias them (a kernel updates them in place, the PyTorch fallback allocates).
They must not share memory with other tensors, and callers must not read them again. Images for which `rows` `[B]` is
false keep their values, and their sums are undefined. Scalars `[B]` are float64 and are rounded to the images'
precision before they multiply.
"""

from __future__ import annotations

from typing import Any

import torch

from .. import backend
from .linalg import add, dot, expand, secant, select


def kernel_for(name: str, *tensors: torch.Tensor) -> Any:
    """The backend's kernel of that name for contiguous tensors of the same shape, dtype and device, or None."""
    first = tensors[0]
    kind = (first.shape, first.dtype, first.device, True)
    if not len(first) or any((t.shape, t.dtype, t.device, t.is_contiguous()) != kind for t in tensors):
        return None
    return getattr(backend.vector_kernels(*tensors), name, None)


def dots(*pairs: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """`<a_b, b_b>` of each pair, `[pairs, B]`, float64; at most four different tensors."""
    if (kernel := kernel_for("dots", *(t for pair in pairs for t in pair))) is not None:
        return kernel(*pairs)
    return torch.stack([dot(a, b) for a, b in pairs])


def cg_direction(p: torch.Tensor, z: torch.Tensor, s: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """`p = z + s p`; donates p, which is not read if `s` is zero."""
    if (kernel := kernel_for("cg_direction", p, z)) is not None:
        kernel(p, z, s, rows)
        return p
    new, _ = add(z, s, select(s.to(p.dtype) != 0, p, 0.0), rows)
    return select(rows, new, p)


def cg_move(
    x: torch.Tensor, r: torch.Tensor, p: torch.Tensor, q: torch.Tensor, s: torch.Tensor, rows: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`x + s p`, `r - s q`, and `<x, x>`, `<r, r>` of them, `[2, B]`; donates x and r."""
    if (kernel := kernel_for("cg_move", x, r, p, q)) is not None:
        return x, r, kernel(x, r, p, q, s, rows)
    (x, xx), (r, rr) = add(x, s, p, rows), add(r, -s, q, rows)
    return x, r, torch.stack([xx, rr])


def lanczos_first(
    u: torch.Tensor, c: torch.Tensor, r1: torch.Tensor, v: torch.Tensor, rows: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`u - c r1`, and `[3, B]`: `<v, v>`, the old `<u, u>`, the new `<v, u>`; donates u."""
    if (kernel := kernel_for("lanczos_first", u, r1, v)) is not None:
        return u, kernel(u, c, r1, v, rows)
    new = select(rows, u - expand(c, u) * r1, u)
    return new, torch.stack([dot(v, v), dot(u, u), dot(v, new)])


def lanczos_second(
    u: torch.Tensor, c: torch.Tensor, r1: torch.Tensor, r2: torch.Tensor, rows: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`r1, r2 = r2, u - c r2`, and `<r2, r2>`; donates r1 and r2."""
    if (kernel := kernel_for("lanczos_second", u, r1, r2)) is not None:
        return r1, r2, kernel(u, c, r1, r2, rows)
    new = select(rows, u - expand(c, u) * r2, r2)
    return select(rows, r2, r1), new, dot(new, new)


Four = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def minres_move(
    state: Four, v: torch.Tensor, r2: torch.Tensor, numbers: tuple[torch.Tensor, ...], rows: torch.Tensor
) -> tuple[Four, torch.Tensor]:
    """The next `state` x, r, w, w_old, and `<x, x>`, `<r, r>`, `<w, w>`, `[3, B]`; donates `state`.

    `w_old, w = w, (v - oldeps w_old - delta w) / gamma`, `x + phi w`, `a r - b r2`. `numbers` are oldeps, delta,
    gamma, phi, a, b.
    """
    if (kernel := kernel_for("minres_move", *state, v, r2)) is not None:
        return state, kernel(state, v, r2, numbers, rows)
    x, r, w, w_old = state
    oldeps, delta, gamma, phi, a, b = (expand(t, v) for t in numbers)
    new = (v - oldeps * w_old - delta * w) / gamma
    x, r = select(rows, x + phi * new, x), select(rows, a * r - b * r2, r)
    w_old, w = select(rows, w, w_old), select(rows, new, w)
    return (x, r, w, w_old), torch.stack([dot(x, x), dot(r, r), dot(w, w)])


def descend(x: torch.Tensor, tau: torch.Tensor, g: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """`x - tau g`, undefined for images not in `rows`."""
    if (kernel := kernel_for("descend", x, g)) is not None:
        return kernel(x, tau, g, rows)
    return add(x, -tau, g, rows)[0]


def pgd_step(
    prox: torch.Tensor, x: torch.Tensor, g: torch.Tensor, rows: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`step = prox - x`, `x + step`, and `<step, step>`, `<x, x>`, `<g, g>`, `[3, B]`; all undefined outside `rows`."""
    if (kernel := kernel_for("pgd_step", prox, x, g)) is not None:
        return kernel(prox, x, g, rows)
    step = prox - x
    return step, x + step, torch.stack([dot(step, step), dot(x, x), dot(g, g)])


def judge(
    candidate: torch.Tensor, candidate_g: torch.Tensor, x: torch.Tensor, g: torch.Tensor, rows: torch.Tensor
) -> torch.Tensor:
    """`<dx, dx>, <dg, dg>, <dx, dg>, <g, g>` and the squared norms of candidate and candidate_g, `[6, B]`."""
    if (kernel := kernel_for("judge", candidate, candidate_g, x, g)) is not None:
        return kernel(candidate, candidate_g, x, g, rows)
    products = secant(torch.arange(len(x), dtype=torch.int64, device=x.device), candidate, candidate_g, x, g)
    return torch.stack([*products.unbind(1), dot(candidate, candidate), dot(candidate_g, candidate_g)])


def take(rows: torch.Tensor, *pairs: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """For each pair `(to, source)`: `source` if `rows`, otherwise `to`; donates every `to`."""
    if (kernel := kernel_for("take", *(t for pair in pairs for t in pair))) is not None:
        kernel(rows, *pairs)
        return tuple(to for to, _ in pairs)
    return tuple(select(rows, source, to) for to, source in pairs)
