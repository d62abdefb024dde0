"""Accelerators of PGD: they choose the point of the next gradient, the proximal step or an extrapolation from it.

An accelerator has one state per image and proposes a point from the proximal step `T = x + f`. It is reset for images
whose last proposal was rejected or whose step size changed. `idx` `[b]` are the indices of the given images in the
whole batch, distinct and ascending. The state of inactive images is never used again.
"""

from __future__ import annotations

import torch

from ..batched.fused import decision, fused
from ..batched.linalg import dot, expand, gather, norm, scatter, solve_spd
from ..batched.loop import uses_mask

ACCELERATIONS = ("none", "fista", "anderson")


class Plain:
    """The proximal step itself."""

    def propose(self, x: torch.Tensor, f: torch.Tensor, idx: torch.Tensor) -> torch.Tensor:
        """`T = x + f`."""
        return x + f

    def reset(self, idx: torch.Tensor, forget: torch.Tensor) -> None:
        """There is no state."""


class Fista:
    """Nesterov's extrapolation `T + (t-1)/t' (T - T_prev)` (Beck & Teboulle 2009) with the gradient restart of
    O'Donoghue & Candes 2015: the momentum is dropped if `<f, T - T_prev> < 0`."""

    def __init__(self, like: torch.Tensor) -> None:
        self.prev = torch.zeros_like(like)
        self.t = torch.zeros(like.shape[0], dtype=torch.float64, device=like.device)

    def propose(self, x: torch.Tensor, f: torch.Tensor, idx: torch.Tensor) -> torch.Tensor:
        """The extrapolated point of the images `idx`."""
        step = x + f
        move = step - gather(self.prev, idx)
        t = gather(self.t, idx)
        restart = (t < 1.0) | (dot(f, move) < 0.0)
        t = torch.where(restart, 1.0, t)
        t_next = 0.5 * (1.0 + torch.sqrt(1.0 + 4.0 * t * t))
        weight = torch.where(restart, 0.0, (t - 1.0) / t_next)
        self.prev = scatter(self.prev, idx, step)
        self.t = scatter(self.t, idx, t_next)
        return step + expand(weight, f) * move

    def reset(self, idx: torch.Tensor, forget: torch.Tensor) -> None:
        """Drop the momentum of those images of `idx` for which `forget` `[b]` is true."""
        self.t = scatter(self.t, idx, torch.where(forget, 0.0, gather(self.t, idx)))


class Anderson:
    """Anderson acceleration, type II, of the fixed-point map `x -> T(x)` (Walker & Ni 2011).

    `x+ = T - sum_i c_i (dx_i + df_i)` with `c = argmin ||f - sum_i c_i df_i||`, from the last `memory`
    differences, from the normal equations in float64 with a relative Tikhonov term. The extrapolation is at most
    `reach` residuals long. The memory of an image is dropped if its residual has more than doubled.
    """

    def __init__(self, like: torch.Tensor, memory: int, reach: float = 20.0, ridge: float = 1e-8) -> None:
        batch = like.shape[0]
        self.memory, self.reach, self.ridge = memory, reach, ridge
        self.dx = like.new_zeros(batch, memory, like[0].numel())
        self.df = torch.zeros_like(self.dx)
        self.gram = torch.zeros(batch, memory, memory, dtype=torch.float64, device=like.device)
        self.x = torch.zeros_like(like)
        self.f = torch.zeros_like(like)
        self.length = torch.zeros(batch, dtype=torch.float64, device=like.device)
        self.count = torch.zeros(batch, dtype=torch.int64, device=like.device)

    def propose(self, x: torch.Tensor, f: torch.Tensor, idx: torch.Tensor) -> torch.Tensor:
        """The accelerated point of the images `idx`."""
        state = (self.dx, self.df, self.x, self.f)
        length, count, slot, fresh, limit = anderson_update(
            dot(f, f), gather(self.length, idx), gather(self.count, idx), self.memory, self.reach
        )
        row, rhs = remember(idx, state, slot, fresh, x, f)
        count, c = anderson_solve(idx, row, rhs, slot, count, self.gram, self.ridge, x.dtype)
        self.length, self.count = scatter(self.length, idx, length), scatter(self.count, idx, count)
        return combine(idx, state, c, limit, x, f)

    def reset(self, idx: torch.Tensor, forget: torch.Tensor) -> None:
        """Drop the memory of those images of `idx` for which `forget` `[b]` is true."""
        self.count = scatter(self.count, idx, torch.where(forget, 0, gather(self.count, idx)))


State = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
"""The memory of all images: dx, df `[B, memory, n]`, and the last x and f."""


@decision
def anderson_update(
    square: torch.Tensor, length: torch.Tensor, count: torch.Tensor, memory: int, reach: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """From `<f, f>`: the new length and count, the newest slot, whether there is a difference, and the limit of the
    sum. The memory is dropped if the residual has more than doubled."""
    new_length = torch.sqrt(square)
    count = torch.where(new_length > 2.0 * length, 0, count)
    slot = torch.where(count > 0, (count - 1) % memory, 0)
    return new_length, count, slot, count > 0, reach * new_length


@fused("x", "f")
def remember(
    idx: torch.Tensor, state: State, slot: torch.Tensor, fresh: torch.Tensor, x: torch.Tensor, f: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Store the newest differences (zeros unless `fresh`) in `slot` of `state`, and x and f; both in place.

    Returns `<df_k, newest df>` and `<df_k, f>`, `[b, memory]`.
    """
    dx, df, old_x, old_f = state
    new_df = torch.where(fresh[:, None], (f - gather(old_f, idx)).flatten(1), 0.0)
    dx[idx, slot] = torch.where(fresh[:, None], (x - gather(old_x, idx)).flatten(1), 0.0)
    df[idx, slot] = new_df
    old_x[idx], old_f[idx] = x, f
    stored = gather(df, idx)
    return _products(stored, new_df), _products(stored, f.flatten(1))


@decision
def anderson_solve(  # noqa: PLR0913 - all of a step's numbers
    idx: torch.Tensor,
    row: torch.Tensor,
    rhs: torch.Tensor,
    slot: torch.Tensor,
    count: torch.Tensor,
    gram: torch.Tensor,
    ridge: float,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Write `row` `[b, m]` to `gram` `[B, m, m]` in place; count + 1, and the weights c `[b, m]` in the images' dtype.

    `row` and `rhs` are the results of `remember`; weights of unused slots are zero.
    """
    memory = row.shape[1]
    gram[idx, slot, :] = row
    gram[idx, :, slot] = row
    valid = torch.arange(memory, dtype=torch.int64, device=row.device) < count.clamp(max=memory)[:, None]
    used = torch.where(valid[:, None, :] & valid[:, :, None], gather(gram, idx), 0.0)
    scale = used.diagonal(dim1=1, dim2=2).amax(1).clamp_min(torch.finfo(torch.float64).tiny)
    eye = torch.eye(memory, dtype=torch.float64, device=row.device)
    damped = used + eye * torch.where(valid, ridge * scale[:, None], scale[:, None])[:, None, :]
    c = _solve(damped, torch.where(valid, rhs, 0.0)).to(dtype)
    return count + 1, torch.where(valid, c, 0.0)


@fused("x", "f")
def combine(
    idx: torch.Tensor, state: State, c: torch.Tensor, limit: torch.Tensor, x: torch.Tensor, f: torch.Tensor
) -> torch.Tensor:
    """`T - sum_i c_i (dx_i + df_i)`, with the sum shortened to at most `limit`; slots with c = 0 are not read."""
    used = (c != 0)[..., None]
    differences = torch.where(used, gather(state[0], idx) + gather(state[1], idx), 0.0)
    shift = torch.zeros_like(x).flatten(1)
    # torch.sum over the memory adds in a different order at the end of a vector, and threads split vectors.
    for k in range(c.shape[1]):
        shift = shift + c[:, k, None] * differences[:, k]
    shift = shift.reshape(x.shape)
    length = norm(shift)
    factor = torch.where(length > limit, limit / length.clamp_min(1e-300), 1.0)
    return x + f - expand(factor, shift) * shift


def _products(df: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """`<df_bk, v_b>`, `[b, memory]`, of `[b, memory, n]` and `[b, n]`."""
    return dot(df.flatten(0, 1), v[:, None].expand_as(df).flatten(0, 1)).reshape(df.shape[:2])


def _solve(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`A_b^{-1} b_b`: LAPACK on the CPU (faster); on a device, elimination without synchronization."""
    return solve_spd(a, b) if uses_mask(a) else torch.linalg.solve(a, b[..., None])[..., 0]


Accelerator = Plain | Fista | Anderson


def make(name: str, like: torch.Tensor, memory: int) -> Accelerator:
    """The accelerator of that name for a batch shaped like `like`."""
    if name == "fista":
        return Fista(like)
    if name == "anderson":
        return Anderson(like, memory)
    return Plain()
