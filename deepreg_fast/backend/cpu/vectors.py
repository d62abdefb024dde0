"""The solvers' vector work in C++, for float32 tensors on the CPU (`csrc/cpu/vectors.inc`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from ..._cpu import Vectors


class CpuVectors:
    """Few reads of memory and sums in float64; the bits do not depend on the number of threads or on other images."""

    def __init__(self, kernels: Vectors) -> None:
        self._kernels = kernels

    def dot(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """`<a_b, b_b>`, float64."""
        a, b = a.contiguous(), b.contiguous()
        out = a.new_empty(len(a), dtype=torch.float64)
        self._kernels.dot(*_size(a), a, b, out)
        return out

    def add(
        self, x: torch.Tensor, s: torch.Tensor, p: torch.Tensor, rows: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`x_b + s_b p_b` if `rows`, otherwise `x_b`; and its squared norm, float64."""
        x, p, s, rows = x.contiguous(), p.contiguous(), s.float().contiguous(), rows.contiguous()
        out, size = torch.empty_like(x), x.new_empty(len(x), dtype=torch.float64)
        self._kernels.add(*_size(x), x, s, p, rows, out, size)
        return out, size

    def secant(
        self, idx: torch.Tensor, candidate: torch.Tensor, candidate_g: torch.Tensor, x: torch.Tensor, g: torch.Tensor
    ) -> torch.Tensor:
        """`<dx, dx>, <dg, dg>, <dx, dg>, <g, g>`, `[b, 4]`, of the steps from the images `idx` of `x` and `g`."""
        idx, candidate, candidate_g, x, g = (t.contiguous() for t in (idx, candidate, candidate_g, x, g))
        out = x.new_empty(len(idx), 4, dtype=torch.float64)
        self._kernels.secant(
            *_size(candidate),
            idx,
            len(x),
            candidate,
            candidate_g,
            x,
            g,
            out,
        )
        return out

    def remember(
        self,
        idx: torch.Tensor,
        state: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
        slot: torch.Tensor,
        fresh: torch.Tensor,
        x: torch.Tensor,
        f: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Update `state` (all of dx, df, x, f) with the newest differences; `<df_k, newest df>` and `<df_k, f>`."""
        memory = state[0].shape[1]
        gram = x.new_empty(len(idx), memory, dtype=torch.float64)
        rhs = torch.empty_like(gram)
        idx, slot, fresh, x, f = (t.contiguous() for t in (idx, slot, fresh, x, f))
        self._kernels.remember(
            *_size(x),
            idx,
            len(state[0]),
            memory,
            list(state),
            slot,
            fresh,
            x,
            f,
            gram,
            rhs,
        )
        return gram, rhs

    def combine(
        self,
        idx: torch.Tensor,
        state: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
        c: torch.Tensor,
        limit: torch.Tensor,
        x: torch.Tensor,
        f: torch.Tensor,
    ) -> torch.Tensor:
        """`x + f - sum_k c_k (dx_k + df_k)`, the sum shortened to `limit` `[b]`."""
        idx, c, limit, x, f = (t.contiguous() for t in (idx, c.float(), limit.double(), x, f))
        out = torch.empty_like(x)
        self._kernels.combine(
            *_size(x),
            idx,
            len(state[0]),
            state[0].shape[1],
            list(state),
            c,
            limit,
            x,
            f,
            out,
        )
        return out


def _size(x: torch.Tensor) -> tuple[int, int, int]:
    """Images, entries of one, threads."""
    return len(x), x.numel() // max(1, len(x)), torch.get_num_threads()
