"""Selection of a method's weight mu and scale on separate tuning images."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import replace

import numpy as np
import torch

from ..errors import InputError
from ..operators import LinearOperator
from ..regularizers import TV
from ..regularizers.base import Regularizer
from ..solvers import PGDOptions, Solution
from .compare import Method, run
from .metrics import psnr


def bracketed(values: Sequence[float], score: Callable[[float], float], start: int) -> int:
    """Index of the best of `values`, whose scores rise and then fall. The search moves from `start` toward the better
    neighbor until neither neighbor scores better. If the score at `start` is not finite, all values are tried."""
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
    """Chooses a method's mu and scale by its mean PSNR on images `x` `[M, C, H, W]`, which must not be test images.

    `scores` stores the PSNR of each pair (mu, scale) under `score_key`; stored values are not computed again. On a tie
    the value that was tried first is chosen. Non-finite scores count as minus infinity. A tuner is for one regularizer:
    the scores of another one would have the same keys.

    With `warm`, each recovery starts from that of the nearest mu. Use it for convex regularizers, whose solution does
    not depend on the start: the PSNR then changes only within the tolerance, and a recovery takes about a third of the
    gradients.
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
        self._reg: Regularizer | None = None

    @staticmethod
    def score_key(method: Method) -> str:
        """Key of a method's pair (mu, scale) in `scores`."""
        return f"mu={method.mu!r} scale={method.scale!r}"

    def score(self, method: Method) -> float:
        """Mean PSNR in dB.

        Raises
        ------
        InputError
            If the tuner has scored another regularizer.
        """
        self._reg = self._reg or method.reg
        if method.reg is not self._reg:
            raise InputError(
                f"A Tuner must score one regularizer, but {method.name!r} has another than the first method; make a "
                "Tuner for each."
            )
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
        """The solution for the nearest mu with the same scale, if there is one."""
        mu, scale = method.mu, method.scale
        solved = [m for m, s in self._solved if s == scale]
        if not solved or mu is None:
            return None
        return self._solved[min(solved, key=lambda m: abs(np.log(m / mu))), scale]

    def mu(self, method: Method, low: float = 1e-4, high: float = 1.0) -> Method:
        """The method with the best mu among its own, one value per decade, and thirds of a decade around the best one.

        Not all values are tried: the score rises and then falls with mu, so the best value is bracketed by its two
        neighbors.
        """

        def score(mu: float) -> float:
            return self.score(replace(method, mu=mu))

        decades = [float(10.0**e) for e in np.arange(np.log10(low), np.log10(high) + 1e-9, 1.0)]
        best = decades[bracketed(decades, score, len(decades) // 2)]
        fine = [m for k in (-2, -1, 0, 1, 2) if low <= (m := best * 10.0 ** (k / 3)) <= high]
        best = fine[bracketed(fine, score, fine.index(best))]
        previous = [] if method.mu is None else [method.mu]
        return replace(method, mu=max([best, *previous], key=score))

    def scale(self, method: Method) -> Method:
        """The method with the best scale between 1/2 and 2: half octaves, then quarter octaves around the best."""

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
    """Smoothed TV with mu tuned on the images `x`; the initial step size follows from `Lip(grad TV) <= 8/eps`.

    The recoveries of the search warm-start each other unless `scores` is given. Those may come from an interrupted
    search, and must not depend on where it stopped.
    """
    options = PGDOptions(800, 1e-3, acceleration="anderson", tau=eps / 4)
    return Tuner(x, y, A, scores, warm=scores is None).mu(Method("tv", TV(eps), options=options), 1e-5, 1.0)
