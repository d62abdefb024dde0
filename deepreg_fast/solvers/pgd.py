"""Batched proximal gradient descent with per-image backtracking (docs/math.md, M4-M6).

One round costs one gradient per active image. Each image has its own step size, acceptance test and stopping test. On
the CPU inactive images leave the batch and cost nothing; on a device they stay, and kernels skip them
(`batched/loop.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch

from .. import backend
from ..ambient import full_precision
from ..backend.gpu.graphs import retry_after_freeing_graphs
from ..batched.graphs import GraphedLoop, Reuse, records, reuse_of, worthwhile
from ..batched.linalg import dot, expand, gather, norm, scatter
from ..batched.loop import AnyActive, attach_partial_result, uses_mask
from .acceleration import Anderson, Plain, make
from .criteria import acceptance_test, convergence_test
from .options import PGDOptions, Solution
from .protocols import DataTerm, SmoothTerm, failing_per_image
from .state import State, set_first_gradient
from .steps import compare, descend, pgd_step

Observer = Callable[[int, torch.Tensor], None]


@full_precision
@torch.no_grad()
def pgd(  # noqa: PLR0913 - the problem is these five, the rest is optional
    y: torch.Tensor,
    A: DataTerm,
    reg: SmoothTerm,
    mu: torch.Tensor,
    options: PGDOptions,
    x0: torch.Tensor,
    tau0: torch.Tensor | None = None,
    observer: Observer | None = None,
) -> Solution:
    """Minimize `1/2||y - Ax||^2 + mu r(x)` for each image from `x0`.

    `x+ = prox_l2(x - tau grad r(x), y, tau/mu)` is accepted if
    `<grad r(x+) - grad r(x), x+ - x> <= ||x+ - x||^2 / tau` (Becker, Candes, Grant 2011, sec. 5.3). The test needs no
    difference of objective values, which would be lost in rounding. After acceptance tau grows, otherwise it shrinks.
    With `monotone`, a candidate of Anderson acceleration is also rejected if its objective exceeds the lowest one so
    far by more than 1e-4 of the decrease so far.

    Parameters
    ----------
    y : measurements, one per row; A, reg : operator and regularizer; mu : `[B]`, > 0.
    x0 : `[B, C, H, W]`, the initial iterate; tau0 : `[B]`, float64, optional initial step sizes.
    observer : called as `observer(round, x)` with all images after every round; this synchronizes with the device.

    An image whose start, measurements or gradient is not finite ends as `NON_FINITE` with its last finite iterate. The
    bits of its neighbors do not change.

    Memory per image: x, its gradient, the accelerator's images (1 for "fista", `2 memory + 2` for "anderson") and about
    six temporaries, plus that of the operator and the gradient. It does not grow with the rounds, except with `record`.
    The temporaries of a CUDA graph add to torch's cached ones. A graph that is stored for later solves
    (`release_graphs`) keeps them and the state.

    Raises
    ------
    OutOfMemory
        If the device's memory is too small. Its `partial` is the `Solution` so far.
    """

    def solve() -> Solution:
        return _solve(_Run(y, A, reg, mu, options, x0, tau0), observer)

    # A retry would call the observer twice for the same round.
    return solve() if observer is not None else retry_after_freeing_graphs(solve)()


def _solve(run: _Run, observer: Observer | None) -> Solution:
    with attach_partial_result(run.solution):
        run.begin()
        if observer is not None:
            observer(0, run.state.x)
        # With an observer or recording, poll every round so that no extra round is reported.
        watched = run.options.record or observer is not None
        any_active = AnyActive(0 if watched else None)
        reuse = None if watched else run.reuse()
        device = None if watched else run.device(reuse)
        with GraphedLoop(run.round, (run.state, run.accelerator), device, reuse=reuse) as next_round:
            while any_active(run.state.running):
                next_round()
                if observer is not None and bool(run.state.running.any()):
                    observer(int(run.state.gradients.max()) - 1, run.state.x)
            return run.solution(next_round.own)


class _Run:
    """One problem with its state; `round` changes only the attributes of `state` and `accelerator`."""

    def __init__(  # noqa: PLR0913 - pgd's arguments
        self,
        y: torch.Tensor,
        A: DataTerm,
        reg: SmoothTerm,
        mu: torch.Tensor,
        options: PGDOptions,
        x0: torch.Tensor,
        tau0: torch.Tensor | None,
    ) -> None:
        y, x0, mu = y.detach(), x0.detach(), mu.detach()
        tau0 = None if tau0 is None else tau0.detach()
        self.y, self.A, self.reg, self.mu, self.options = y, A, reg, mu, options
        self.state = State(x0, tau0, options, reg.center)
        self.state.end(~torch.isfinite(y).flatten(1).all(1))
        self.selected: tuple[torch.Tensor | None, DataTerm, torch.Tensor] = None, A, y
        self.correction: torch.Tensor | None = None
        self.accelerator = make(options.acceleration, self.state.x, options.memory)
        self.eps = torch.finfo(x0.dtype).eps
        self.rounds: list[torch.Tensor] = []
        # Anderson acceleration can enter a limit cycle at a higher objective although its residual is small.
        self.guarded = options.monotone and isinstance(self.accelerator, Anderson)

    def begin(self) -> None:
        """Compute the first gradient and the reference values of the tests."""
        s = self.state
        s.compact()
        if len(s.idx):
            with self._only():
                x = gather(s.x, s.idx)
                value, grad = self._gradient(x)
                if self.guarded:
                    s.start_best(self._objective(x, value))
                set_first_gradient(s, grad)
            s.compact()
        self.limit = 10.0 * (norm(s.x) + s.x[0].numel() ** 0.5) if len(s.x) else s.tau
        self.scale = norm(s.grad)

    def device(self, reuse: Reuse | None) -> torch.device | None:
        """The device if a round can be captured in its CUDA graph. None if it has no graphs, if a part of the round may
        synchronize, or if there are too few rounds."""
        x = self.state.x
        if not records(x) or not self.reg.computed_by_backend() or not self.A.capturable(x):
            return None
        if not worthwhile(self.options.max_iterations, reuse):
            return None
        return x.device if getattr(self.reg.backend_for(x), "capturable", False) else None

    def reuse(self) -> Reuse | None:
        """The key under which later solves can reuse the graph of a round."""
        x = self.state.x
        if not records(x) or not self.reg.computed_by_backend():
            return None
        signature = getattr(self.reg.backend_for(x), "signature", lambda *_: None)
        return reuse_of(("pgd", self.options, self.guarded), self, signature(self.reg, x), self.A.signature(x))

    def place(self, put: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """As `graphs.Inputs`: place the tensors that a round reads and does not change."""
        self.y, self.mu, self.limit, self.scale = map(put, (self.y, self.mu, self.limit, self.scale))

    def solution(self, own: Callable[[torch.Tensor], torch.Tensor] = lambda t: t) -> Solution:
        """The current solution; `own` copies its tensors out of shared memory."""
        return self.state.solution(self.rounds, own)

    def round(self) -> None:
        """One step of each active image: test x for convergence, then test a candidate with one gradient."""
        s = self.state
        with self._only():
            candidate, sums = self._propose()
            numbers = convergence_test(s.numbers(), sums, gather(self.scale, s.idx), self.options, self.eps)
        s.store_state(numbers)
        if self.options.record:
            self.rounds.append(s.residual.clone())
        (candidate,) = s.compact(candidate)
        if not len(s.idx):
            return
        with self._only():
            value, grad = self._gradient(candidate)
            sums, limit = compare(s.idx, candidate, grad, s.x, s.grad), gather(self.limit, s.idx)
            objective = self._objective(candidate, value) if self.guarded else None
            if objective is not None:
                sums[2] = torch.where(s.exceeds_best(objective), torch.inf, sums[2])
            numbers, good, forget = acceptance_test(s.numbers(), sums, value, limit, self.options, self.eps)
        if objective is not None:
            s.update_best(good, objective)
        s.accept(good, candidate, grad)
        s.store_state(numbers)
        self.accelerator.reset(s.idx, forget)
        s.compact()

    def _only(self) -> AbstractContextManager[None]:
        return backend.active_images(self.state.running if uses_mask(self.state.x) else None)

    def _propose(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The candidate, at which the next gradient of each image of `idx` is taken; `<step, step>, <x, x>, <g, g>`."""
        s, i = self.state, self.state.idx
        x, grad, tau, running = (gather(t, i) for t in (s.x, s.grad, s.tau, s.running))
        z = descend(x, tau, grad, running)
        prox = z if self.options.data_step == "gradient" else self._prox(z, (tau / gather(self.mu, i)).to(x.dtype))
        step, plain, sums = pgd_step(prox, x, grad, running)
        if isinstance(self.accelerator, Plain):
            return plain, sums
        candidate = self.accelerator.propose(x, step, i)
        return torch.where(expand(gather(s.plain_next, i), x), plain, candidate), sums

    def _problem(self) -> tuple[DataTerm, torch.Tensor]:
        """The operator and the measurements of the images `idx`, the same objects until images end, so that the
        operator need not transform them again."""
        i = self.state.idx
        if uses_mask(self.state.x):
            return self.A, self.y
        if self.selected[0] is not i:
            self.selected = i, self.A.select(i), gather(self.y, i)
        return self.selected[1:]

    def _prox(self, z: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
        """The proximal map of the images `idx`. If CG computes it, it starts at the last correction of each image."""
        (A, y), i = self._problem(), self.state.idx
        with failing_per_image():
            if A.has_shifted_inverse:
                return A.prox_l2(z, y, gamma)
            if self.correction is None:
                self.correction = torch.zeros_like(self.state.x)
            prox = A.prox_l2(z, y, gamma, z + gather(self.correction, i))
        self.correction = scatter(self.correction, i, prox - z)
        return prox

    def _gradient(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The value and the gradient of the smooth part at `x`: r, or with gradient steps for the misfit, the objective
        divided by mu."""
        value, grad = self._regularizer(x)
        if self.options.data_step == "prox":
            return value, grad
        A, y = self._problem()
        misfit, mu = A.A(x) - y, gather(self.mu, self.state.idx)
        value = value.double() + 0.5 * dot(misfit, misfit) / mu.double()
        return value, grad + A.A_adjoint(misfit) / expand(mu, x)

    def _regularizer(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`r` and `grad r` at `x`. PyTorch selects different convolution kernels for a single image. Unless the backend
        is batch-invariant, a lone image is duplicated, so that its bits do not depend on when its neighbors stopped."""
        if len(x) == 1 and len(self.state.x) > 1 and not self.reg.backend_for(x).batch_invariant:
            v, g = self._value_and_grad(torch.cat([x, x]))
            return v[:1], g[:1]
        return self._value_and_grad(x)

    def _value_and_grad(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.reg.computed_by_backend():
            return self.reg.value_and_grad(x)
        # A user's regularizer may differentiate, and its results may carry an autograd graph.
        with torch.enable_grad():
            value, grad = self.reg.value_and_grad(x)
        return value.detach(), grad.detach()

    def _objective(self, x: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """`1/2 ||y - A x||^2 / mu + r(x)` of the images `idx`, `[b]`, float64."""
        if self.options.data_step == "gradient":
            return value.double()
        A, y = self._problem()
        misfit = A.A(x) - y
        return 0.5 * dot(misfit, misfit) / gather(self.mu, self.state.idx).double() + value.double()
