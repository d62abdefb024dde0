"""Benchmark cases of complete solves: an adjoint system, a recovery, a training step."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch

from ..backend import use_backend
from ..inverse.adjoint import ImplicitAdjoint, solve_adjoint
from ..inverse.hypergradient import hypergradient
from ..inverse.recovery import recover
from ..operators import SRM
from ..regularizers import RED
from ..regularizers.base import Regularizer, as_regularizer
from ..regularizers.lipschitz import beta_hat
from ..solvers import CGOptions, PGDOptions
from . import peers, peers_deepinv, peers_learned
from .calibrate import Setting, loosest
from .timing import Timed
from .workload import Case, Workload, double, flat, timed_under, under

MU = 0.1
# Tolerances of the float64 results, two orders below those of the candidates. Tighter ones take minutes.
TIGHT = PGDOptions(5000, 1e-6, "anderson")
TIGHT_ADJOINT = ImplicitAdjoint(CGOptions(2000, 1e-6))


def cg(p: Workload) -> Case:
    """The adjoint system to a true residual of 1e-4, which is checked in float64 for every result."""
    xs, bs = p.images(1), [0.1 * b for b in p.images(2)]
    reg, x = p.solvable(xs, 0.9), xs[0]
    A, mu, options = p.operator(), xs[0].new_full((p.batch,), MU), ImplicitAdjoint(CGOptions(200, 1e-4))
    best = peers.BestTorch(reg)
    hvps: dict[str, Any] = {n: under(b, lambda: reg.linearize(x)) for n, b in backends(p)}

    class _Best:
        hvp = staticmethod(best.products(x)[0])

    def solver(lin: Any, name: str) -> Timed:
        return timed_under(name, p.turns(lambda b: solve_adjoint(lin, A, mu, b, options).x, bs))

    candidates = {n: solver(hvps[n], b) for n, b in backends(p)}
    candidates["torch, best"] = solver(_Best(), "reference")
    residual = true_residual(p, reg, A, x, bs)
    # The residual needs no exact result, only its shape. The slack allows for the solvers' float32 products.
    case = Case("cg", candidates, bs, tolerance=1.02e-4, measure=residual)
    reason = peers_deepinv.unsupported_reason()
    if reason is not None:
        case.missing["deepinv"] = reason
        return case
    system = peers_deepinv.DeepinvSystem(reg, A, MU, x)
    _add(case, "deepinv, CG", lambda k, t: system.cg(bs[k % len(bs)], t), 1e-4, residual)
    _add(case, "deepinv, MINRES", lambda k, t: system.minres(bs[k % len(bs)], t), 1e-4, residual)
    return case


def true_residual(
    p: Workload, reg: RED, A: SRM, x: torch.Tensor, bs: list[torch.Tensor]
) -> Callable[[torch.Tensor, int], float]:
    """`||b - H gamma|| / ||b||` of the worst image, with products in float64."""
    reg64, A64 = double(reg), copy.deepcopy(A).double()

    def relative(x: torch.Tensor, gamma: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        r = b - A64.normal(gamma) - MU * reg64.linearize(x).hvp(gamma)
        return r.flatten(1).norm(dim=1) / b.flatten(1).norm(dim=1)

    return lambda answer, k: float(p.exactly(relative, x, answer.reshape(x.shape), bs[k]).max())


def recovery(p: Workload) -> Case:
    """`recover` from a cold start by the paper's method, plain proximal gradient descent, to a tolerance of 1e-3."""
    xs = p.images(5)
    reg, A, options = p.solvable(xs, 1.2), p.operator(), PGDOptions(500, 1e-3)
    best, ys = as_regularizer(peers.BestTorch(reg)), [A.A(x) for x in xs]

    def solver(name: str, r: Regularizer, o: PGDOptions = options) -> Timed:
        return timed_under(name, p.turns(lambda y: recover(y, A, r, MU, options=o).x, ys))

    candidates = {n: solver(b, reg) for n, b in backends(p)}
    candidates["torch, best"] = solver("reference", best)
    candidates["ours, Anderson"] = solver(p.target.ours, reg, PGDOptions(500, 1e-3, "anderson"))
    reg64, A64 = double(reg), copy.deepcopy(A).double()
    exact = [p.exactly(lambda y: recover(y, A64, reg64, MU, options=TIGHT).x, y) for y in ys]
    case = Case("recover", candidates, exact, tolerance=2e-3)
    reason = peers_deepinv.unsupported_reason()
    if reason is not None:
        case.missing["deepinv"] = reason
        return case
    peer = peers_deepinv.DeepinvPGD(reg, A, MU)
    distance = _relative(exact)
    target = max(distance(flat(candidates["ours"](k)), k) for k in range(len(ys)))
    _add(case, "deepinv, PGD", lambda k, t: peer.solve(ys[k % len(ys)], t), target, distance)
    return case


def step(p: Workload) -> Case:
    """One training step: a recovery from a cold start, gamma, the gradients, the penalty's ascent.

    Results are checked against the gradients at the float64 solution. LearnedRegularizers, which has no penalty, is
    checked against the hypergradient alone.
    """
    xs = p.images(5)
    reg, A = p.solvable(xs, 1.2), p.operator()
    pgd, adjoint = PGDOptions(100, 1e-3, "anderson"), ImplicitAdjoint(CGOptions(30, 1e-2))
    cpu_float = {"dtype": torch.float32, "device": "cpu"}
    deltas = [0.05 * torch.randn(x.shape, generator=torch.Generator().manual_seed(6), **cpu_float).to(x) for x in xs]

    def implicit(k: int, r: Regularizer = reg) -> list[torch.Tensor]:
        return list(hypergradient(xs[k], A.A(xs[k]), A, r, MU, options=pgd, adjoint=adjoint).theta.values())

    def pushed(x: torch.Tensor, delta: torch.Tensor, r: Regularizer = reg) -> list[torch.Tensor]:
        delta, _ = beta_hat(r, x, delta).power_step(delta.flatten(1).norm(dim=1))
        return list(beta_hat(r, x, delta).grad_theta(x.new_ones(len(x))).values())

    def step(r: Regularizer) -> Timed:
        def both(k: int) -> list[torch.Tensor]:
            k %= len(xs)
            return [a + b for a, b in zip(implicit(k, r), pushed(xs[k], deltas[k], r), strict=True)]

        return both

    best = as_regularizer(peers.BestTorch(reg))
    candidates: dict[str, Timed] = {n: timed_under(b, step(reg)) for n, b in backends(p)}
    candidates["torch, best"] = timed_under("reference", step(best))
    reg64, A64, exact, hypergradients = double(reg), copy.deepcopy(A).double(), [], []

    def tight(x: torch.Tensor) -> torch.Tensor:
        hg = hypergradient(x, A64.A(x), A64, reg64, MU, options=TIGHT, adjoint=TIGHT_ADJOINT)
        return flat(list(hg.theta.values()))[None]

    for x, delta in zip(xs, deltas, strict=True):
        hypergradients.append(p.exactly(tight, x).sum(0))
        exact.append(hypergradients[-1] + p.exactly(lambda x, d: flat(pushed(x, d, reg64))[None], x, delta).sum(0))
    case = Case("step", candidates, exact, tolerance=5e-2)
    ours = max(
        _relative(hypergradients)(flat(under(p.target.ours, lambda k=k: implicit(k))), k) for k in range(len(xs))
    )
    _add_learned(case, p, reg, A, xs, hypergradients, ours)
    return case


def backends(p: Workload) -> tuple[tuple[str, str], ...]:
    """Names of the candidates that are backends of this package, with their backends."""
    return ("ours", p.target.ours), ("torch, reference", "reference")


def _relative(exact: list[torch.Tensor]) -> Callable[[torch.Tensor, int], float]:
    flats = [e.flatten() for e in exact]
    return lambda answer, k: float((answer - flats[k]).norm() / flats[k].norm())


def _add(
    case: Case,
    name: str,
    run: Callable[[int, float], object],
    target: float,
    measure: Callable[[torch.Tensor, int], float],
) -> None:
    """Add a peer with the loosest tolerance at which no result is worse than `target`."""

    def error(t: float) -> float:
        worst = 0.0
        for k in range(len(case.exact)):
            with use_backend("reference"):
                e = measure(flat(run(k, t)), k)
            # A NaN counts as infinite. One miss decides, so the other inputs are skipped.
            worst = max(worst, e if e == e else float("inf"))
            if worst > target:
                break
        return worst

    setting = loosest(error, target)
    if _reached(case, name, setting):
        case.candidates[name] = timed_under("reference", lambda k: run(k, setting.tolerance))
        case.notes[name] = f"tolerance {setting.tolerance:.1e}, the loosest that reaches {target:.1e}"
        if setting.error > target:
            case.notes[name] = f"tolerance {setting.tolerance:.1e}, its best: {setting.error:.1e}, ours {target:.1e}"


def _reached(case: Case, name: str, setting: Setting) -> bool:
    assert case.tolerance is not None
    if setting.error <= case.tolerance:
        return True
    case.missing[name] = f"reaches {setting.error:.1e} at best, and {case.tolerance:.1e} is required"
    return False


def _add_learned(  # noqa: PLR0913 - the problem in its parts
    case: Case, p: Workload, reg: RED, A: SRM, xs: list[torch.Tensor], exact: list[torch.Tensor], target: float
) -> None:
    """Add LearnedRegularizers with the loosest tolerances that reach `target`: first the recovery's, then MINRES'."""
    name, path = peers_learned.NAME, p.learned_regularizers
    reason = peers_learned.unsupported_reason(path)
    if path is None or reason is not None:
        case.missing[name] = reason or peers_learned.HOW
        return
    peer, distance = peers_learned.Learned(path, reg, A, MU), _relative(exact)

    def error(inner: float, outer: float) -> float:
        # On one input only, because a step is slow; all inputs are checked before and after the timing.
        with use_backend("reference"):
            e = distance(flat(peer.step(xs[0], inner, outer)), 0)
        return e if e == e else float("inf")

    inner = loosest(lambda t: error(t, 1e-4), target, last=1e-6)
    outer = loosest(lambda t: error(inner.tolerance, t), max(target, inner.error), start=1e-1, last=1e-4)
    if _reached(case, name, outer):
        run = timed_under("reference", p.turns(lambda x: peer.step(x, inner.tolerance, outer.tolerance), xs))
        case.candidates[name], case.others[name] = run, exact
        tolerances = f"recovery {inner.tolerance:.1e}, MINRES {outer.tolerance:.1e}"
        case.notes[name] = f"tolerances: {tolerances}; error {outer.error:.1e}, ours {target:.1e}"
