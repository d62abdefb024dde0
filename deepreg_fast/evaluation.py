"""Comparison of methods on one set of images, with one operator."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from .errors import InputError
from .implicit import initial_point
from .metrics import psnr, ssim
from .operators.base import LinearOperator
from .recovery import recover
from .regularizers import TV
from .regularizers.base import Regularizer
from .solvers import PGDOptions, Solution
from .status import counts


@dataclass(frozen=True)
class Method:
    """A regularizer with its weight mu and solver options.

    Without a regularizer: the back-projection `A^T y` if `name` is "adjoint", else the minimum-norm solution about
    mid-grey.
    """

    name: str
    reg: Regularizer | None = None
    mu: float | None = None
    options: PGDOptions = PGDOptions(acceleration="anderson")


def run(method: Method, y: torch.Tensor, A: LinearOperator, batch: int | None = None) -> Solution | torch.Tensor:
    """Recover all images by one method, `batch` at a time (by default 5 on the CPU, whose caches a few images fill, and
    64 elsewhere); what needs no solver comes as a tensor."""
    batch = batch or (5 if y.device.type == "cpu" else 64)
    if method.reg is None:
        return A.A_adjoint(y) if method.name == "adjoint" else initial_point(y, A, TV())
    parts = [
        recover(y[i : i + batch], A, method.reg, method.mu, options=method.options) for i in range(0, len(y), batch)
    ]
    return Solution(
        x=torch.cat([p.x for p in parts]),
        status=torch.cat([p.status for p in parts]),
        iterations=torch.cat([p.iterations for p in parts]),
        gradients=torch.cat([p.gradients for p in parts]),
        residual=torch.cat([p.residual for p in parts]),
        tau=torch.cat([p.tau for p in parts]),
        backend=parts[0].backend,
    )


def tune_mu(
    method: Method, x: torch.Tensor, y: torch.Tensor, A: LinearOperator, low: float = 1e-4, high: float = 1.0
) -> Method:
    """The method with the mu of the best mean PSNR on `x`: one value per decade, then thirds of a decade around it.

    Ties and values that are not finite lose; `x` must not be the images that are reported.
    """
    assert method.reg is not None
    scores: dict[float, float] = {}

    def score(mu: float) -> float:
        if mu not in scores:
            sol = run(replace(method, mu=mu), y, A)
            assert isinstance(sol, Solution)
            value = float(psnr(sol.x, x).mean())
            scores[mu] = value if np.isfinite(value) else -np.inf
        return scores[mu]

    decades = np.arange(np.log10(low), np.log10(high) + 1e-9, 1.0)
    best = max((float(10.0**e) for e in decades), key=score)
    fine = [best * 10.0 ** (k / 3) for k in (-2, -1, 1, 2)]
    best = max([best, *(m for m in fine if low <= m <= high)], key=score)
    return replace(method, mu=best)


def tuned_tv(x: torch.Tensor, y: torch.Tensor, A: LinearOperator, eps: float = 3e-3) -> Method:
    """Smoothed TV with mu tuned on the images `x`; `Lip(grad TV) <= 8/eps` sets the first step."""
    options = PGDOptions(800, 1e-3, acceleration="anderson", tau=eps / 4)
    return tune_mu(Method("tv", TV(eps), options=options), x, y, A, 1e-5, 1e-2)


def evaluate(methods: Sequence[Method], x: torch.Tensor, y: torch.Tensor, A: LinearOperator) -> dict[str, Any]:
    """Figures of each method on images `x` `[N, C, H, W]` from measurements `y` `[N, m]`, all on one device.

    Returns name -> `psnr_mean`, `psnr_median`, `ssim_mean`, `psnr` and `ssim` per image, `iterations` and `gradients`
    per image, `status` counts, `mu`, `seconds`; and, where a method "tv" is among them, `vs_tv`: mean and median of
    the paired differences in dB, a 95 % bootstrap interval of the mean, and the number of wins.
    """
    names = [m.name for m in methods]
    if len(set(names)) != len(names):
        raise InputError(f"Methods must have different names, but are {names}; rename one.")
    out = {m.name: _figures(m, x, y, A) for m in methods}
    if "tv" in out:
        reference = np.array(out["tv"]["psnr"])
        for name, figures in out.items():
            if name != "tv":
                figures["vs_tv"] = paired(np.array(figures["psnr"]), reference)
    return out


def _figures(method: Method, x: torch.Tensor, y: torch.Tensor, A: LinearOperator) -> dict[str, Any]:
    began = time.perf_counter()
    sol = run(method, y, A)
    if y.is_cuda:
        torch.cuda.synchronize(y.device)
    seconds = time.perf_counter() - began
    image = sol.x if isinstance(sol, Solution) else sol
    p, s = psnr(image, x), ssim(image, x)
    solved = isinstance(sol, Solution)
    return {
        "psnr_mean": float(p.mean()),
        "psnr_median": float(np.median(p.cpu().numpy())),
        "ssim_mean": float(s.mean()),
        "psnr": p.tolist(),
        "ssim": s.tolist(),
        "iterations": sol.iterations.tolist() if solved else [0] * len(x),
        "gradients": sol.gradients.tolist() if solved else [0] * len(x),
        "status": counts(sol.status) if solved else {"converged": len(x)},
        "mu": method.mu,
        "seconds": seconds,
    }


def paired(a: np.ndarray, b: np.ndarray, draws: int = 10_000) -> dict[str, Any]:
    """Differences `a - b` per image: mean, median, 95 % bootstrap interval of the mean (fixed seed), wins."""
    d = a - b
    rng = np.random.Generator(np.random.PCG64(0))
    means = d[rng.integers(0, len(d), (draws, len(d)))].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return {
        "mean": float(d.mean()),
        "median": float(np.median(d)),
        "interval": [float(low), float(high)],
        "wins": int((d > 0).sum()),
        "images": len(d),
    }
