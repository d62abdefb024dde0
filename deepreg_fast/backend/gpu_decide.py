"""The solvers' decisions on numbers `[B]` in Triton (`kernels/decide.py`): one launch in the place of dozens.

Each function is the one of its name in the solvers, with the same bits. All results are new tensors. Where the sums of
images that do not run are undefined, so are the results but `running`, `status` and what is said to be kept.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import torch

from ..kernels import anderson  # pyright: ignore[reportMissingImports] - elsewhere in the tree
from ..kernels import decide as kernels  # pyright: ignore[reportMissingImports] - elsewhere in the tree
from .gpu_memory import hold, stream_of

Numbers = tuple[torch.Tensor, ...]
"""PGD's of all images: tau, curvature, residual, cautious, gradients, iterations, status, running."""


def on(like: torch.Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensors'."""
    return torch.cuda.device(like.device) if like.is_cuda else nullcontext()


def launch(kernel: Any, given: tuple[torch.Tensor, ...], out: tuple[torch.Tensor, ...], **constants: Any) -> None:
    """`kernel` on numbers of all images; flags go as bytes."""
    tensors = [t.contiguous() for t in given] + list(out)
    images = len(tensors[-1])
    if images:
        with on(tensors[0]):
            # Products are not fused into sums, so that every number has the bits of torch's.
            kernel[(-(-images // kernels.BLOCK),)](
                *(t.view(torch.uint8) if t.dtype == torch.bool else t for t in tensors),
                images,
                **constants,
                BLOCK=kernels.BLOCK,
                num_warps=1,
                enable_fp_fusion=False,
            )


@lru_cache(maxsize=4096)
def _made(numbers: tuple[float, ...], device: torch.device, stream: int) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.float64, device=device)


def _options(numbers: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """Made once for each stream: making it waits for the device. A graph keeps it beyond its end here."""
    options = _made(numbers, device, stream_of(device))
    hold(options)
    return options


def pgd_residual(
    n: Numbers, sums: torch.Tensor, scale: torch.Tensor, options: tuple[float, ...], eps: float
) -> tuple[torch.Tensor, ...]:
    """PGD's `judge_residual`: residual, status and running as they are after it.

    `options`: tolerance, first tau, growth, shrinkage, limit on gradients.
    """
    tau, curvature, residual, _, gradients, _, status, running = n
    given = (sums, scale, _options(options, tau.device), tau, curvature, residual, gradients, status, running)
    out = tuple(map(torch.empty_like, (residual, status, running)))
    launch(kernels.pgd_residual, given, out, EPS=eps)
    return out


def pgd_candidate(  # noqa: PLR0913 - all of a round's numbers
    n: Numbers,
    sums: torch.Tensor,
    value: torch.Tensor,
    limit: torch.Tensor,
    options: tuple[float, ...],
    eps: float,
    plain: bool,
) -> tuple[Numbers, torch.Tensor, torch.Tensor]:
    """PGD's `judge_candidate`: the numbers, where the candidate is accepted, and where the accelerator forgets.

    `options` as in `pgd_residual`; `plain`: there is no accelerator.
    """
    tau, curvature, residual, cautious, gradients, iterations, status, running = n
    changing = (tau, curvature, cautious, gradients, iterations, status, running)
    out = (*map(torch.empty_like, changing), torch.empty_like(running), torch.empty_like(running))
    given = (sums, value, limit, _options(options, tau.device), *changing)
    launch(kernels.pgd_candidate, given, out, EPS=eps, PLAIN=plain)
    return (out[0], out[1], residual, *out[2:7]), out[7], out[8]


def anderson_turn(
    square: torch.Tensor, length: torch.Tensor, count: torch.Tensor, memory: int, reach: float
) -> tuple[torch.Tensor, ...]:
    """Of Anderson acceleration, from `<f, f>`: length, count, slot, whether it is fresh, and the limit of the sum."""
    fresh = torch.empty(len(count), dtype=torch.bool, device=count.device)
    out = (*map(torch.empty_like, (length, count, count)), fresh, torch.empty_like(length))
    launch(anderson.anderson_turn, (square, length, count), out, MEMORY=memory, REACH=reach)
    return out


def anderson_solve(  # noqa: PLR0913 - all of a step's numbers
    idx: torch.Tensor | None,
    row: torch.Tensor,
    rhs: torch.Tensor,
    slot: torch.Tensor,
    count: torch.Tensor,
    gram: torch.Tensor,
    ridge: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`row` `[b, m]` into `gram` `[B, m, m]` in place, count and one more, and the weights c `[b, m]`, float32.

    `row` and `rhs` as `remember` returns them; weights of slots not in use are zero.
    """
    images, memory = row.shape
    next_count = torch.empty_like(count)
    c = torch.empty(images, memory, dtype=torch.float32, device=row.device)
    kernel: Any = anderson.anderson_solve
    if images:
        with on(row):
            kernel[(images,)](
                None if idx is None else idx.contiguous(),
                row.t().contiguous(),
                rhs.t().contiguous(),
                slot.contiguous(),
                count.contiguous(),
                gram,
                next_count,
                c,
                images,
                MEMORY=memory,
                WIDTH=anderson.width(memory),
                RIDGE=ridge,
                TINY=torch.finfo(torch.float64).tiny,
                num_warps=anderson.warps(memory),
                enable_fp_fusion=False,
            )
    return next_count, c


def cg_turn(
    new_rz: torch.Tensor, rz: torch.Tensor, fresh: torch.Tensor, status: torch.Tensor, running: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """CG's `turn`: the factor of the old direction; then rz, fresh, status and running as they are after it."""
    out = (torch.empty_like(rz), torch.empty_like(rz), *map(torch.empty_like, (fresh, status, running)))
    launch(kernels.cg_turn, (new_rz, rz, fresh, status, running), out)
    return out


def cg_stride(  # noqa: PLR0913 - all of a step's numbers
    sums: torch.Tensor,
    moved: torch.Tensor,
    rz: torch.Tensor,
    a_norm: torch.Tensor,
    status: torch.Tensor,
    running: torch.Tensor,
    eps: float,
    longest: float,
) -> tuple[torch.Tensor, ...]:
    """`System.note_norm`, CG's `stride` and `overflow`: the length of the step; then a_norm, status and running."""
    out = (torch.empty_like(rz), *map(torch.empty_like, (a_norm, status, running)))
    launch(kernels.cg_stride, (sums, moved, rz, a_norm, status, running), out, EPS=eps, LONGEST=longest)
    return out


def cg_arrived(  # noqa: PLR0913 - all of a step's numbers
    moved: torch.Tensor,
    sums: torch.Tensor,
    length: torch.Tensor,
    idle: torch.Tensor,
    aim: torch.Tensor,
    running: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """CG's `arrived`: idle and running."""
    out = torch.empty_like(idle), torch.empty_like(running)
    launch(kernels.cg_arrived, (moved, sums, length, idle, aim, running), out, EPS=eps)
    return out
