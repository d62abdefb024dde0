"""The solvers' vector work in Triton (`kernels/solvers/reductions.py`), for float32 tensors.

Every function launches one kernel over pieces of images, and one that adds up their sums; none synchronizes. Inactive
images (`backend.active_images`) cost nothing, and their results are undefined.
"""

from __future__ import annotations

from typing import Any

import torch

from ...kernels.solvers import cg, minres, pgd  # pyright: ignore[reportMissingImports]
from ...kernels.solvers import reductions as kernels  # pyright: ignore[reportMissingImports]
from ..active import active_mask, mask_bytes
from . import decisions

Rows = torch.Tensor | None
State = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


class GpuVectors:
    """Few reads of memory and sums in float64; the bits of an image do not depend on the others."""

    def dot(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """`<a_b, b_b>`, float64."""
        return self.dots((a, b))[0]

    def dots(self, *pairs: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """`<a_b, b_b>` of each pair, `[pairs, B]`, float64, reading memory once; at most four different tensors."""
        tensors: list[torch.Tensor] = []
        code = 0
        for i, pair in enumerate(pairs):
            for j, t in enumerate(pair):
                index = next((k for k, known in enumerate(tensors) if known is t), len(tensors))
                tensors += [t] if index == len(tensors) else []
                code |= index << (4 * i + 2 * j)
        if len(tensors) > 4:
            raise ValueError(
                f"dots takes pairs of at most 4 different tensors, but {len(tensors)} came; call it twice."
            )
        inputs = [_read(t) for t in tensors]
        inputs += [inputs[0]] * (4 - len(inputs))
        sums = Sums(inputs[0], len(pairs))
        sums.launch(kernels.products, *inputs, sums.partial, sums.work, COUNT=len(pairs), PAIRS=code)
        return sums.total()

    def add(
        self, x: torch.Tensor, s: torch.Tensor, p: torch.Tensor, rows: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`x_b + s_b p_b` if `rows`, otherwise `x_b`; and its squared norm, float64."""
        x, s, p = _read(x), s.contiguous(), _read(p)
        out, sums = torch.empty_like(x), Sums(x, 1)
        sums.launch(kernels.add, x, s, p, mask_bytes(rows), out, sums.partial, sums.work)
        return out, sums.total()[0]

    def secant(
        self,
        idx: torch.Tensor | None,
        candidate: torch.Tensor,
        candidate_g: torch.Tensor,
        x: torch.Tensor,
        g: torch.Tensor,
    ) -> torch.Tensor:
        """`<dx, dx>, <dg, dg>, <dx, dg>, <g, g>`, `[b, 4]`, of the steps from the images `idx` of `x` and `g`."""
        candidate, candidate_g, x, g = map(_read, (candidate, candidate_g, x, g))
        sums = Sums(candidate, 4)
        sums.launch(kernels.secant, _places(idx), candidate, candidate_g, x, g, sums.partial, sums.work, SIZES=False)
        return sums.total().t()

    def remember(
        self,
        idx: torch.Tensor | None,
        state: State,
        slot: torch.Tensor,
        fresh: torch.Tensor,
        x: torch.Tensor,
        f: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Update `state` (all of dx, df, x, f) with the newest differences; `<df_k, newest df>` and `<df_k, f>`."""
        memory = state[0].shape[1]
        x, f, slot = _read(x), _read(f), slot.contiguous()
        sums = Sums(x, 2 * memory)
        sums.launch(
            kernels.remember,
            _places(idx),
            *map(_own, state),
            slot,
            mask_bytes(fresh),
            x,
            f,
            sums.partial,
            sums.work,
            MEMORY=memory,
        )
        products = sums.total().t()
        return products[:, :memory], products[:, memory:]

    def combine(
        self,
        idx: torch.Tensor | None,
        state: State,
        c: torch.Tensor,
        limit: torch.Tensor,
        x: torch.Tensor,
        f: torch.Tensor,
    ) -> torch.Tensor:
        """`x + f - sum_k c_k (dx_k + df_k)`, the sum shortened to `limit` `[b]`."""
        x, f, c, limit = _read(x), _read(f), c.contiguous(), limit.contiguous()
        out, sums = torch.empty_like(x), Sums(x, 1)
        sums.launch(
            kernels.shift,
            _places(idx),
            *map(_own, state[:2]),
            c,
            out,
            sums.partial,
            sums.work,
            MEMORY=state[0].shape[1],
        )
        sums.launch(kernels.shorten, sums.partial, limit, x, f, out, sums.work, STEP=sums.step)
        return out

    # The following functions process the images `active` (None: all active images) and change contiguous tensors in
    # place as `=` indicates. The sums of other images are undefined.

    def compare(
        self,
        idx: torch.Tensor | None,
        candidate: torch.Tensor,
        candidate_g: torch.Tensor,
        x: torch.Tensor,
        g: torch.Tensor,
    ) -> torch.Tensor:
        """The four sums of `secant`, and `<candidate, candidate>`, `[5, b]`."""
        inputs = (_places(idx), *map(_read, (candidate, candidate_g, x, g)))
        return _sums(6, kernels.secant, inputs, None, candidate, SIZES=True)[:5]

    def cg_direction(self, p: torch.Tensor, z: torch.Tensor, beta: torch.Tensor, active: Rows) -> torch.Tensor:
        """`p = z + beta p`."""
        sums = Sums(p, 0, active)
        sums.launch(cg.cg_direction, _own(p), _read(z), beta.contiguous(), sums.work)
        return p

    def cg_move(
        self, x: torch.Tensor, r: torch.Tensor, p: torch.Tensor, q: torch.Tensor, alpha: torch.Tensor, active: Rows
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`x += alpha p`, `r -= alpha q`; `<x, x>`, `<r, r>`, `[2, B]`."""
        inputs = (_own(x), _own(r), _read(p), _read(q), alpha.contiguous())
        return x, r, _sums(2, cg.cg_move, inputs, active, x)

    def lanczos_first(
        self, u: torch.Tensor, c: torch.Tensor, r1: torch.Tensor, v: torch.Tensor, active: Rows
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`<v, v>`, `<u, u>`, then `u -= c r1`, then `<v, u>`, `[3, B]`."""
        return u, _sums(3, minres.lanczos_first, (_own(u), c.contiguous(), _read(r1), _read(v)), active, u)

    def lanczos_second(
        self, u: torch.Tensor, c: torch.Tensor, r1: torch.Tensor, r2: torch.Tensor, active: Rows
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`r1, r2 = r2, u - c r2`; `<r2, r2>`."""
        inputs = (_read(u), c.contiguous(), _own(r1), _own(r2))
        return r1, r2, _sums(1, minres.lanczos_second, inputs, active, u)[0]

    def minres_move(
        self,
        state: State,
        v: torch.Tensor,
        r2: torch.Tensor,
        numbers: tuple[torch.Tensor, ...],
        active: Rows,
    ) -> tuple[State, torch.Tensor]:
        """With `state` x, r, w, w_old and `numbers` oldeps, delta, gamma, phi, a, b `[B]`: `w_old, w = w, (v - oldeps
        w_old - delta w) / gamma`, `x += phi w`, `r = a r - b r2`; `<x, x>`, `<r, r>`, `<w, w>`, `[3, B]`."""
        inputs = (*map(_own, state), _read(v), _read(r2), *(t.contiguous() for t in numbers))
        return state, _sums(3, minres.minres_move, inputs, active, v)

    def descend(self, x: torch.Tensor, tau: torch.Tensor, g: torch.Tensor, active: Rows) -> torch.Tensor:
        """`x - tau g`."""
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        sums = Sums(x, 0, active)
        sums.launch(pgd.descend, _read(x), tau.contiguous(), _read(g), out, sums.work)
        return out

    def pgd_step(
        self, prox: torch.Tensor, x: torch.Tensor, g: torch.Tensor, active: Rows
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`step = prox - x`, `x + step`, and `<step, step>`, `<x, x>`, `<g, g>`, `[3, B]`."""
        prox, x, g = _read(prox), _read(x), _read(g)
        step, candidate = torch.empty_like(x), torch.empty_like(x)
        return step, candidate, _sums(3, pgd.pgd_step, (prox, x, g, step, candidate), active, x)

    def take(self, rows: Rows, *pairs: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """`to = source` for each pair `(to, source)`."""
        for i in range(0, len(pairs), 2):
            (to, source), (to_other, other) = pairs[i], pairs[i + 1] if i + 1 < len(pairs) else (None, None)
            sums = Sums(to, 0, rows)
            if to_other is not None and other is not None:
                to_other, other = _own(to_other), _read(other)
            sums.launch(pgd.take, _own(to), _read(source), to_other, other, sums.work)
        return tuple(to for to, _ in pairs)


class Sums:
    """Memory for the sums of one read of images like `like` `[B, ...]`, and its launches.

    `rows` are the images to process; by default the active ones.
    """

    def __init__(self, like: torch.Tensor, count: int, rows: Rows = None) -> None:
        self.images, self.count = len(like), count
        self.n = like.numel() // max(1, self.images)
        self.pieces = -(-self.n // kernels.PIECE)
        self.step = min(1024, 1 << max(0, self.pieces - 1).bit_length())
        self.partial = torch.empty(count, self.images, self.pieces, dtype=torch.float64, device=like.device)
        rows = active_mask(like) if rows is None else rows
        self.work = mask_bytes(rows)
        self.on = decisions.on(like)

    def launch(self, kernel: Any, *arguments: Any, **constants: Any) -> None:
        """`kernel` over the pieces of all images."""
        if self.images * self.pieces:
            with self.on:
                # Fused multiply-add halves float64 instructions and registers; products are exact, so no bit changes.
                kernel[(self.images * self.pieces,)](
                    *arguments,
                    N=self.n,
                    PIECE=kernels.PIECE,
                    **constants,
                    num_warps=kernels.WARPS,
                    enable_fp_fusion=True,
                )

    def total(self) -> torch.Tensor:
        """The sums, `[count, B]`."""
        if self.pieces == 1:
            return self.partial[:, :, 0]
        out = torch.empty(self.count, self.images, dtype=torch.float64, device=self.partial.device)
        if self.pieces == 0:
            return out.zero_()
        if self.images:
            kernel: Any = kernels.total
            with self.on:
                kernel[(self.count * self.images,)](
                    self.partial, out, PIECES=self.pieces, STEP=self.step, num_warps=1, enable_fp_fusion=True
                )
        return out


def _sums(
    count: int, kernel: Any, given: tuple[Any, ...], rows: Rows, like: torch.Tensor, **constants: Any
) -> torch.Tensor:
    """The `count` sums of one launch, `[count, B]`."""
    sums = Sums(like, count, rows)
    sums.launch(kernel, *given, sums.partial, sums.work, **constants)
    return sums.total()


def _read(t: torch.Tensor) -> torch.Tensor:
    """A contiguous tensor aligned to 16 bytes: for others Triton's kernels have a different order of summation."""
    t = t.contiguous()
    return t.clone() if t.data_ptr() % 16 else t


def _own(t: torch.Tensor) -> torch.Tensor:
    """A contiguous tensor, which a kernel changes in place."""
    if not t.is_contiguous():
        raise ValueError(
            f"A tensor to be changed in place must be contiguous, but has the strides {t.stride()}; copy it."
        )
    return t


def _places(idx: torch.Tensor | None) -> torch.Tensor | None:
    return None if idx is None else idx.contiguous()
