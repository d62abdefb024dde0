"""Launches of the solvers' per-image scalar logic (`kernels/solvers/`): one instead of dozens.

All results are new tensors; the others' protocol is `DecisionKernels`.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import torch

from ...kernels.solvers import anderson, cg, pgd  # pyright: ignore[reportMissingImports]
from ...kernels.solvers.scalars import BLOCK  # pyright: ignore[reportMissingImports]
from ..solver_kernels import PerImageState, StepOptions
from .memory import hold, stream_of


def on(like: torch.Tensor) -> AbstractContextManager[Any]:
    """Make the device of `like` current: Triton launches on the current device."""
    return torch.cuda.device(like.device) if like.is_cuda else nullcontext()


def launch(kernel: Any, given: tuple[torch.Tensor, ...], out: tuple[torch.Tensor, ...], **constants: Any) -> None:
    """Launch `kernel` on vectors with one entry per image; flags are passed as bytes."""
    tensors = [t.contiguous() for t in given] + list(out)
    images = len(tensors[-1])
    if images:
        with on(tensors[0]):
            # No fused multiply-add, so that the bits equal torch's.
            kernel[(-(-images // BLOCK),)](
                *(t.view(torch.uint8) if t.dtype == torch.bool else t for t in tensors),
                images,
                **constants,
                BLOCK=BLOCK,
                num_warps=1,
                enable_fp_fusion=False,
            )


@lru_cache(maxsize=4096)
def _made(numbers: tuple[float, ...], device: torch.device, stream: int) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.float64, device=device)


def _settings(options: StepOptions, device: torch.device) -> torch.Tensor:
    """The options on the device, created once per stream because creation synchronizes. A graph keeps them alive."""
    numbers = (options.tolerance, options.tau, options.grow, options.shrink, options.max_iterations)
    settings = _made(numbers, device, stream_of(device))
    hold(settings)
    return settings


class GpuDecisions:
    """The solvers' decisions: each has the same bits as its definition in PyTorch."""

    def convergence_test(
        self, n: PerImageState, sums: torch.Tensor, scale: torch.Tensor, options: StepOptions, eps: float
    ) -> PerImageState:
        """PGD's state with the new residual, status and running."""
        settings = _settings(options, n.tau.device)
        inputs = (sums, scale, settings, n.tau, n.lipschitz_estimate, n.residual, n.gradients, n.status, n.running)
        residual, status, running = out = tuple(map(torch.empty_like, (n.residual, n.status, n.running)))
        launch(pgd.convergence_test, inputs, out, EPS=eps)
        return n._replace(residual=residual, status=status, running=running)

    def acceptance_test(
        self,
        n: PerImageState,
        sums: torch.Tensor,
        value: torch.Tensor,
        limit: torch.Tensor,
        options: StepOptions,
        eps: float,
    ) -> tuple[PerImageState, torch.Tensor, torch.Tensor]:
        """PGD's new state, whether the candidate is accepted, and whether the accelerator is reset."""
        tau, lipschitz_estimate, residual, plain_next, gradients, iterations, status, running = n
        changing = (tau, lipschitz_estimate, plain_next, gradients, iterations, status, running)
        out = (*map(torch.empty_like, changing), torch.empty_like(running), torch.empty_like(running))
        inputs = (sums, value, limit, _settings(options, tau.device), *changing)
        launch(pgd.acceptance_test, inputs, out, EPS=eps, PLAIN=options.acceleration == "none")
        return PerImageState(out[0], out[1], residual, *out[2:7]), out[7], out[8]

    def anderson_update(
        self, square: torch.Tensor, length: torch.Tensor, count: torch.Tensor, memory: int, reach: float
    ) -> tuple[torch.Tensor, ...]:
        """From `<f, f>`: length, count, slot, fresh, and the limit of the sum."""
        fresh = torch.empty(len(count), dtype=torch.bool, device=count.device)
        out = (*map(torch.empty_like, (length, count, count)), fresh, torch.empty_like(length))
        launch(anderson.anderson_update, (square, length, count), out, MEMORY=memory, REACH=reach)
        return out

    def anderson_solve(  # noqa: PLR0913 - all of a step's numbers
        self,
        idx: torch.Tensor | None,
        row: torch.Tensor,
        rhs: torch.Tensor,
        slot: torch.Tensor,
        count: torch.Tensor,
        gram: torch.Tensor,
        ridge: float,
        dtype: torch.dtype,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write `row` `[b, m]` to `gram` `[B, m, m]` in place; return count + 1 and the weights c `[b, m]`."""
        images, memory = row.shape
        next_count = torch.empty_like(count)
        c = torch.empty(images, memory, dtype=dtype, device=row.device)
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

    def cg_beta(
        self,
        rz: torch.Tensor,
        rz_old: torch.Tensor,
        restarted: torch.Tensor,
        status: torch.Tensor,
        running: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        """The factor of the old direction, and the new rz_old, restarted, status and running."""
        out = (torch.empty_like(rz_old), torch.empty_like(rz_old), *map(torch.empty_like, (restarted, status, running)))
        launch(cg.cg_beta, (rz, rz_old, restarted, status, running), out)
        return out

    def cg_alpha(  # noqa: PLR0913 - all of a step's numbers
        self,
        sums: torch.Tensor,
        squared_norms: torch.Tensor,
        rz: torch.Tensor,
        a_norm: torch.Tensor,
        status: torch.Tensor,
        running: torch.Tensor,
        eps: float,
        max_norm: float,
    ) -> tuple[torch.Tensor, ...]:
        """The step length, and the new a_norm, status and running."""
        out = (torch.empty_like(rz), *map(torch.empty_like, (a_norm, status, running)))
        launch(cg.cg_alpha, (sums, squared_norms, rz, a_norm, status, running), out, EPS=eps, MAX_NORM=max_norm)
        return out

    def cg_has_converged(  # noqa: PLR0913 - all of a step's numbers
        self,
        squared_norms: torch.Tensor,
        sums: torch.Tensor,
        alpha: torch.Tensor,
        stagnant_steps: torch.Tensor,
        target_norm: torch.Tensor,
        running: torch.Tensor,
        eps: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The new stagnant_steps and running."""
        out = torch.empty_like(stagnant_steps), torch.empty_like(running)
        launch(cg.cg_has_converged, (squared_norms, sums, alpha, stagnant_steps, target_norm, running), out, EPS=eps)
        return out
