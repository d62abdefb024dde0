"""Scores of a training on its validation images, recovered from a cold start; each process recovers its share."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from ..evaluation.metrics import psnr, ssim
from ..inverse.data_term import add_noise
from ..inverse.recovery import recover
from ..operators import LinearOperator
from ..regularizers.lipschitz import spectrum
from ..solvers import PGDOptions, Solution
from ..status import counts
from . import losses
from .config import UNSUPERVISED, BilevelConfig
from .hypergradients import MSE_SCALE, PROBE, Hypergradients

if TYPE_CHECKING:
    from .trainer import Trainer

_COLUMNS = ("psnr", "ssim", "gradients", "status", "score")


def bilevel_scores(config: BilevelConfig, run: Trainer, hyper: Hypergradients) -> dict[str, Any]:
    """Mean and median PSNR, mean SSIM, statuses, and the extreme eigenvalues of `hess s`, of the validation images.

    The best checkpoint is chosen by `val_score`: the mean PSNR, or minus the loss if that needs no true images.
    """
    x = run.validation
    A = run.operator(x)
    y = add_noise(A.A(x), config.sigma, seed=config.seed + 1)
    scores = _Scores(config, run, hyper, A, x, y)
    local = torch.arange(run.world.rank, len(x), run.world.size, dtype=torch.int64, device=x.device)
    # Alone, an image has the same bits whatever the number of processes.
    joint = config.lanes == 1 or run.reg.backend_for(x).batch_invariant
    pieces = [local] if joint else list(local.split(1))
    values = torch.cat([scores(rows) for rows in pieces]) if len(local) else x.new_zeros(0, len(_COLUMNS))
    columns = dict(zip(_COLUMNS, run.world.interleave(values.double().cpu(), len(x)).unbind(1), strict=True))
    low, high = spectrum(run.reg, x, steps=12)
    total = float(columns["score"].sum() if config.loss in UNSUPERVISED else columns["psnr"].mean())
    return {
        "val_psnr": float(columns["psnr"].mean()),
        "val_psnr_median": float(columns["psnr"].median()),
        "val_ssim": float(columns["ssim"].mean()),
        "val_gradients": float(columns["gradients"].mean()),
        "val_score": total if math.isfinite(total) else -math.inf,
        **{f"val_{k}": v for k, v in counts(columns["status"].long()).items()},
        "val_lambda_min": float(low.min()),
        "val_lambda_max": float(high.max()),
    }


class _Scores:
    """Recovers some validation images; `[images, columns]`."""

    def __init__(
        self,
        config: BilevelConfig,
        run: Trainer,
        hyper: Hypergradients,
        A: LinearOperator,
        x: torch.Tensor,
        y: torch.Tensor,
    ) -> None:
        self.config, self.run, self.A, self.x, self.y = config, run, A, x, y
        # Drawn for all images, whichever of them this process recovers.
        if config.loss == "noise2noise":
            self.other = add_noise(A.A(x), config.sigma, config.seed + 2)
        elif config.loss == "sure":
            self.probe = run.placement.upload(torch.from_numpy(hyper.probe(tuple(y.shape), -1)))

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        x, y = self.x[rows], self.y[rows]
        sol = recover(y, self.A, self.run.reg, self.run.mu, options=PGDOptions(300, 1e-4, acceleration="fista"))
        columns = (psnr(sol.x, x), ssim(sol.x, x), sol.gradients, sol.status, self._score(rows, sol))
        return torch.stack([t.double() for t in columns], 1)

    def _score(self, rows: torch.Tensor, sol: Solution) -> torch.Tensor:
        """Minus each image's loss, if the loss does not use the true images; otherwise 0."""
        c, A, y, scale = self.config, self.A, self.y[rows], MSE_SCALE / self.x.numel()
        if c.loss == "noise2noise":
            return -losses.noise2noise(A, sol.x, self.other[rows], scale).value
        if c.loss == "sure":
            tau, probe = PROBE * c.sigma, self.probe[rows]
            options = PGDOptions(300, 1e-4, acceleration="fista")
            second = recover(y + tau * probe, A, self.run.reg, self.run.mu, options=options, x0=sol.x, tau0=sol.tau)
            return -losses.sure(A, sol.x, second.x, y, probe, c.sigma, tau, scale).value
        return torch.zeros_like(sol.residual)
