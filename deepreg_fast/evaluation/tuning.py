"""The choice of a method's weight mu and scale on images set apart."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import replace

import numpy as np
import torch

from ..operators import LinearOperator
from ..regularizers import TV
from ..solvers import PGDOptions, Solution
from .compare import Method, run
from .metrics import psnr


def bracketed(values: Sequence[float], score: Callable[[float], float], start: int) -> int:
    """The place of the best of `values`, whose scores rise and then fall: from `start` on towards the better neighbor,
    until both score no better. Where `start` has no finite score, all are tried."""
    if not np.isfinite(score(values[start])):
        return max(range(len(values)), key=lambda i: score(values[i]))
    best = start
    for step in (-1, 1):
        while 0 <= best + step < len(values) and score(values[best + step]) > score(values[best]):
            best += step
        if best != start:
            break
    return best


class Tuner:
    """Chooses a method's mu and scale by its mean PSNR on images `x` `[M, C, H, W]`, never the ones that are reported.

    `scores`, if given, keeps the PSNR of each pair under `score_key`: one that is there already is not computed again.
    Ties lose, and values that are not finite count as minus infinity.

    With `warm`, each recovery starts from that of the nearest mu. This is for a convex regularizer, whose solution does
    not depend on the start: then the PSNR changes by what the tolerance leaves open, and a recovery takes about a third
    of the gradients.
    """

    def __init__(
        self,
        x: torch.Tensor,
        y: torch.Tensor,
        A: LinearOperator,
        scores: MutableMapping[str, float] | None = None,
        warm: bool = False,
    ) -> None:
        self.x, self.y, self.A, self.warm = x, y, A, warm
        self.scores = {} if scores is None else scores
        self._solved: dict[tuple[float, float], Solution] = {}

    @staticmethod
    def score_key(method: Method) -> str:
        """The pair that a score belongs to."""
        return f"mu={method.mu!r} scale={method.scale!r}"

    def score(self, method: Method) -> float:
        """Mean PSNR in dB."""
        key = self.score_key(method)
        if key not in self.scores:
            sol = run(method, self.y, self.A, near=self._near(method))
            assert isinstance(sol, Solution)
            value = float(psnr(sol.x, self.x).mean())
            self.scores[key] = value if np.isfinite(value) else -np.inf
            if self.warm and np.isfinite(value) and method.mu is not None:
                self._solved[method.mu, method.scale] = sol
        return self.scores[key]

    def _near(self, method: Method) -> Solution | None:
        """The solution of the nearest mu with the same scale, if there is one."""
        mu, scale = method.mu, method.scale
        solved = [m for m, s in self._solved if s == scale]
        if not solved or mu is None:
            return None
        return self._solved[min(solved, key=lambda m: abs(np.log(m / mu))), scale]

    def mu(self, method: Method, low: float = 1e-4, high: float = 1.0) -> Method:
        """The method with the best mu: its own, one value per decade, then thirds of a decade around the best of these.

        The values are not all tried: as the score rises and then falls with mu, the best one is bracketed by the two
        beside it.
        """

        def score(mu: float) -> float:
            return self.score(replace(method, mu=mu))

        decades = [float(10.0**e) for e in np.arange(np.log10(low), np.log10(high) + 1e-9, 1.0)]
        best = decades[bracketed(decades, score, len(decades) // 2)]
        fine = [m for k in (-2, -1, 0, 1, 2) if low <= (m := best * 10.0 ** (k / 3)) <= high]
        best = fine[bracketed(fine, score, fine.index(best))]
        own = [] if method.mu is None else [method.mu]
        return replace(method, mu=max([best, *own], key=score))

    def scale(self, method: Method) -> Method:
        """The method with the best scale between 1/2 and 2: half octaves, then quarters around the best."""

        def score(scale: float) -> float:
            return self.score(replace(method, scale=scale))

        best = max((2.0 ** (k / 2) for k in (0, -1, 1, -2, 2)), key=score)
        return replace(method, scale=max((best, best * 2**-0.25, best * 2**0.25), key=score))


def tune_mu(
    method: Method, x: torch.Tensor, y: torch.Tensor, A: LinearOperator, low: float = 1e-4, high: float = 1.0
) -> Method:
    """`Tuner(x, y, A).mu(method, low, high)`: the method with the mu of the best mean PSNR on the images `x`."""
    return Tuner(x, y, A).mu(method, low, high)


def tuned_tv(
    x: torch.Tensor,
    y: torch.Tensor,
    A: LinearOperator,
    eps: float = 3e-3,
    scores: MutableMapping[str, float] | None = None,
) -> Method:
    """Smoothed TV with mu tuned on the images `x`; `Lip(grad TV) <= 8/eps` sets the first step.

    The recoveries of the search start from one another, but not where `scores` are kept: these may come from a search
    that was stopped, and must be the same in the next one.
    """
    options = PGDOptions(800, 1e-3, acceleration="anderson", tau=eps / 4)
    return Tuner(x, y, A, scores, warm=scores is None).mu(Method("tv", TV(eps), options=options), 1e-5, 1.0)
