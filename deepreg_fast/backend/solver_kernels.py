"""Protocols of the kernels that a backend may have for the solvers: all of them, for CPU and GPU alike."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch

Four = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


class VectorKernels(Protocol):
    """The solvers' vector steps on images `[B, ...]` of one dtype and device, each with one read of memory if possible.

    Each has the name, the arguments and the results of a definition that is decorated with `batched.fused.fused`, which
    documents it. A backend may have any of them: the definition computes the others. `active` `[B]` are the images to
    process and `idx` `[b]` the indices of those of a smaller batch; inactive images may be skipped.
    """

    # Of several algorithms (batched/linalg.py).

    def dot(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """`<a_b, b_b>`, float64."""
        ...

    def dots(self, *pairs: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """`<a_b, b_b>` of each pair, `[pairs, B]`."""
        ...

    def add(
        self, x: torch.Tensor, s: torch.Tensor, p: torch.Tensor, rows: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`x_b + s_b p_b` if `rows`, otherwise `x_b`; and its squared norm."""
        ...

    def secant(
        self, idx: torch.Tensor, candidate: torch.Tensor, candidate_g: torch.Tensor, x: torch.Tensor, g: torch.Tensor
    ) -> torch.Tensor:
        """`<dx, dx>, <dg, dg>, <dx, dg>, <g, g>`, `[b, 4]`, `dx = candidate - x[idx]`, `dg = candidate_g - g[idx]`."""
        ...

    # CG (solvers/cg.py).

    def cg_direction(self, p: torch.Tensor, z: torch.Tensor, beta: torch.Tensor, active: torch.Tensor) -> torch.Tensor:
        """`p = z + beta p`."""
        ...

    def cg_move(
        self,
        x: torch.Tensor,
        r: torch.Tensor,
        p: torch.Tensor,
        q: torch.Tensor,
        alpha: torch.Tensor,
        active: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`x += alpha p`, `r -= alpha q`, and their squared norms, `[2, B]`."""
        ...

    # MINRES (solvers/minres.py).

    def lanczos_first(
        self, u: torch.Tensor, c: torch.Tensor, r1: torch.Tensor, v: torch.Tensor, active: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`u -= c r1`, and `<v, v>`, the old `<u, u>`, the new `<v, u>`, `[3, B]`."""
        ...

    def lanczos_second(
        self, u: torch.Tensor, c: torch.Tensor, r1: torch.Tensor, r2: torch.Tensor, active: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`r1, r2 = r2, u - c r2`, and `<r2, r2>`."""
        ...

    def minres_move(
        self, state: Four, v: torch.Tensor, r2: torch.Tensor, numbers: tuple[torch.Tensor, ...], active: torch.Tensor
    ) -> tuple[Four, torch.Tensor]:
        """The next `state` x, r, w, w_old, and `<x, x>`, `<r, r>`, `<w, w>`, `[3, B]`."""
        ...

    # PGD (solvers/steps.py).

    def descend(self, x: torch.Tensor, tau: torch.Tensor, g: torch.Tensor, active: torch.Tensor) -> torch.Tensor:
        """`x - tau g`."""
        ...

    def pgd_step(
        self, prox: torch.Tensor, x: torch.Tensor, g: torch.Tensor, active: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`step = prox - x`, `x + step`, and `<step, step>`, `<x, x>`, `<g, g>`, `[3, B]`."""
        ...

    def compare(
        self, idx: torch.Tensor, candidate: torch.Tensor, candidate_g: torch.Tensor, x: torch.Tensor, g: torch.Tensor
    ) -> torch.Tensor:
        """The four sums of `secant`, and `<candidate, candidate>`, `[5, b]`."""
        ...

    def take(self, rows: torch.Tensor, *pairs: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """For each pair `(to, source)`: `to = source` if `rows`."""
        ...

    # Anderson acceleration (solvers/acceleration.py); `state` are dx, df `[B, memory, n]`, x and f.

    def remember(
        self,
        idx: torch.Tensor,
        state: Four,
        slot: torch.Tensor,
        fresh: torch.Tensor,
        x: torch.Tensor,
        f: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store the newest differences (zeros unless `fresh`), x and f; return `<df_k, newest df>` and `<df_k, f>`."""
        ...

    def combine(
        self,
        idx: torch.Tensor,
        state: Four,
        c: torch.Tensor,
        limit: torch.Tensor,
        x: torch.Tensor,
        f: torch.Tensor,
    ) -> torch.Tensor:
        """`x + f - sum_k c_k (dx_k + df_k)`, the sum shortened to `limit` `[b]`; slots with c = 0 are not read."""
        ...


class PerImageState(NamedTuple):
    """Scalars of each image of a PGD run, `[b]`: see `Solution`.

    `lipschitz_estimate` is the largest curvature observed, `plain_next` whether the next candidate is the plain step,
    `running` whether the image is active; an active image has the status `MAX_ITERATIONS`. tau, lipschitz_estimate and
    residual are float64.
    """

    tau: torch.Tensor
    lipschitz_estimate: torch.Tensor
    residual: torch.Tensor
    plain_next: torch.Tensor
    gradients: torch.Tensor
    iterations: torch.Tensor
    status: torch.Tensor
    running: torch.Tensor


class StepOptions(Protocol):
    """The options of `PGDOptions` that its decisions use."""

    @property
    def tolerance(self) -> float:
        """Relative tolerance."""
        ...

    @property
    def tau(self) -> float:
        """Initial step size."""
        ...

    @property
    def grow(self) -> float:
        """Its factor after an accepted step."""
        ...

    @property
    def shrink(self) -> float:
        """Its factor after a rejected step."""
        ...

    @property
    def max_iterations(self) -> int:
        """Maximum number of gradients."""
        ...

    @property
    def acceleration(self) -> str:
        """The accelerator; "none" for the plain step."""
        ...


class DecisionKernels(Protocol):
    """The solvers' decisions on numbers `[B]` in float64, for images of any dtype, with the same bits as PyTorch.

    As for `VectorKernels`, each has the name, the arguments and the results of a definition, which is decorated with
    `batched.fused.decision`. The sums of inactive images are undefined; of their results only `running`, `status` and
    unchanged state are defined.
    """

    # CG (solvers/cg.py).

    def cg_beta(
        self,
        rz: torch.Tensor,
        rz_old: torch.Tensor,
        restarted: torch.Tensor,
        status: torch.Tensor,
        running: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """The factor of the old direction, and the new rz_old, restarted, status and running."""
        ...

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
    ) -> Four:
        """The step length, and the new a_norm, status and running."""
        ...

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
        ...

    # PGD (solvers/criteria.py).

    def convergence_test(
        self, n: PerImageState, sums: torch.Tensor, scale: torch.Tensor, options: StepOptions, eps: float
    ) -> PerImageState:
        """The state with the new residual, status and running."""
        ...

    def acceptance_test(
        self,
        n: PerImageState,
        sums: torch.Tensor,
        value: torch.Tensor,
        limit: torch.Tensor,
        options: StepOptions,
        eps: float,
    ) -> tuple[PerImageState, torch.Tensor, torch.Tensor]:
        """The new state, whether the candidate is accepted, and whether the accelerator is reset."""
        ...

    # Anderson acceleration (solvers/acceleration.py).

    def anderson_update(
        self, square: torch.Tensor, length: torch.Tensor, count: torch.Tensor, memory: int, reach: float
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """The new length and count, the newest slot, whether it has one before it, and the limit of the sum."""
        ...

    def anderson_solve(  # noqa: PLR0913 - all of a step's numbers
        self,
        idx: torch.Tensor,
        row: torch.Tensor,
        rhs: torch.Tensor,
        slot: torch.Tensor,
        count: torch.Tensor,
        gram: torch.Tensor,
        ridge: float,
        dtype: torch.dtype,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write `row` to `gram` in place; count + 1 and the weights `[b, m]` in `dtype`."""
        ...
