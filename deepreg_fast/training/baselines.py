"""Baselines for bi-level training, with the same loop, data and network (docs/math.md, M12)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ..batched.linalg import dot, norm
from ..regularizers import ICNN, DenoiserField
from ..regularizers.base import Regularizer
from .build import regularizer_of
from .config import BaselineConfig
from .placement import Rows, read
from .trainer import Trainer

# Random-number key of the validation noise; no training step has this number.
_VALIDATION = 2**32 - 1


class _Baseline(Trainer):
    """Base of the baselines. The noise of a step is a function of (seed, step, sample)."""

    config: BaselineConfig  # pyright: ignore[reportIncompatibleVariableOverride]

    def _rng(self, *key: int) -> np.random.Generator:
        return np.random.Generator(np.random.PCG64([self.config.seed, 4, *key]))

    def _noisy(self, x: torch.Tensor, *key: int) -> torch.Tensor:
        noise = self._rng(*key).standard_normal(tuple(x.shape), dtype=np.float32)
        return x + self.config.noise_level * self.placement.upload(torch.from_numpy(noise))

    def _set(self, loss: torch.Tensor) -> None:
        for p, g in zip(self.params, torch.autograd.grad(loss, self.params), strict=True):
            p.grad = g


class DenoiserTrainer(_Baseline):
    """RED as the paper states it: trains a denoiser `d` on `||d(x + w) - x||^2`.

    Recovery uses its field `x - d(x)` in place of `grad r` (docs/math.md, M12).

    Parameters
    ----------
    config : BaselineConfig
    progress : bool, optional
        As in `BilevelTrainer`.

    Raises
    ------
    InputError
        If a setting does not fit the images.

    Examples
    --------
    >>> import tempfile, deepreg_fast as dr
    >>> config = dr.BaselineConfig(out=tempfile.mkdtemp(), steps=2, crop=16, batch=2, validation=0, channels=2)
    >>> reg = dr.DenoiserTrainer(config, progress=False).fit()
    """

    method = "denoiser"

    def build(self) -> Regularizer:
        """Build the denoiser from the conv chain."""
        c = self.config
        return DenoiserField(**c.chain())

    def gradients(self, rows: Rows, x: torch.Tensor) -> dict[str, Any]:
        """Gradient of the denoised images' mean squared error."""
        assert isinstance(self.reg, DenoiserField)
        error = self.reg.denoise(self._noisy(x, self.step_done)) - x
        loss = 1e3 * error.square().mean()
        self._set(loss)
        return {"loss": float(loss.detach())}

    def validate(self) -> dict[str, Any]:
        """PSNR of the denoised validation images."""
        assert isinstance(self.reg, DenoiserField)
        with torch.no_grad():
            mse = (
                (self.reg.denoise(self._noisy(self.validation, _VALIDATION)) - self.validation).square().mean((1, 2, 3))
            )
        score = float((-10.0 * torch.log10(mse)).mean())
        return {"val_denoising_psnr": score, "val_score": score}


class GradientStepTrainer(_Baseline):
    """Trains the gradient-step denoiser `x - grad r(x)` on `||x + w - grad r(x + w) - x||^2`.

    Cohen et al. 2021; Hurault et al. 2022 (docs/math.md, M12).

    Parameters
    ----------
    config : BaselineConfig
    progress : bool, optional
        As in `BilevelTrainer`.

    Raises
    ------
    InputError
        If a setting does not fit the images.

    Examples
    --------
    >>> import tempfile, deepreg_fast as dr
    >>> config = dr.BaselineConfig(out=tempfile.mkdtemp(), steps=2, crop=16, batch=2, validation=0, channels=2)
    >>> reg = dr.GradientStepTrainer(config, progress=False).fit()
    """

    method = "gradient_step"

    def build(self) -> Regularizer:
        """Build the same regularizer as bi-level training."""
        return regularizer_of(self.config)

    def gradients(self, rows: Rows, x: torch.Tensor) -> dict[str, Any]:
        """`||grad r(x + w) - w||^2`, whose gradient is `param_vjp(2 (grad r - w))`."""
        noisy = self._noisy(x, self.step_done)
        lin = self.reg.linearize(noisy)
        error = lin.grad - (noisy - x)
        scale = 1e3 / x.numel()
        for p, g in zip(self.params, lin.param_vjp(2.0 * scale * error).values(), strict=True):
            p.grad = g
        return {"loss": scale * float(dot(error, error).sum())}

    def validate(self) -> dict[str, Any]:
        """PSNR of the denoised validation images."""
        noisy = self._noisy(self.validation, _VALIDATION)
        error = noisy - self.reg.value_and_grad(noisy)[1] - self.validation
        score = float((-10.0 * torch.log10(error.square().mean((1, 2, 3)))).mean())
        return {"val_denoising_psnr": score, "val_score": score}


class AdversarialTrainer(_Baseline):
    """Trains the adversarial input-convex regularizer `r(x) = rho/2 ||u||^2 + f(u)`.

    The critic `f` is small on true images and large on minimum-norm solutions:
    `E f(x) - E f(x_naive) + weight E (||grad f(x_mix)|| - 1)_+^2` (Lunz, Oktem, Schonlieb 2018; Mukherjee et al. 2020;
    docs/math.md, M12).

    Parameters
    ----------
    config : BaselineConfig
    progress : bool, optional
        As in `BilevelTrainer`.

    Raises
    ------
    InputError
        If a setting does not fit the images.

    Examples
    --------
    >>> import tempfile, deepreg_fast as dr
    >>> config = dr.BaselineConfig(out=tempfile.mkdtemp(), steps=2, crop=16, batch=2, validation=0, channels=2)
    >>> reg = dr.AdversarialTrainer(config, progress=False).fit()
    """

    method = "adversarial"

    def build(self) -> Regularizer:
        """Build the input-convex network."""
        c = self.config
        options = {"gain": c.gain, "center": c.center, "image_channels": c.image_channels, "seed": c.seed}
        return ICNN(c.channels, c.depth, c.rho, **options)

    def _critic(self, x: torch.Tensor) -> torch.Tensor:
        assert isinstance(self.reg, ICNN)
        return self.reg.net(x - self.reg.center)

    def _naive(self, x: torch.Tensor) -> torch.Tensor:
        A = self.A if x.shape[1:] == self.A.image_shape else self._operator(x)
        c = torch.full_like(x, self.reg.center)
        return c + A.A_dagger(A.A(x - c))

    def gradients(self, rows: Rows, x: torch.Tensor) -> dict[str, Any]:
        """Gradient of the critic's loss."""
        naive = self._naive(x)
        mixed = self._rng(self.step_done).random((len(x), 1, 1, 1), dtype=np.float32)
        t = self.placement.upload(torch.from_numpy(mixed))
        mix = (t * x + (1 - t) * naive).requires_grad_()
        (slope,) = torch.autograd.grad(self._critic(mix).sum(), mix, create_graph=True)
        excess = (torch.sqrt(slope.square().sum((1, 2, 3)) + 1e-12) - 1.0).clamp_min(0).square().mean()
        gap = self._critic(x).mean() - self._critic(naive).mean()
        loss = gap + self.config.gradient_penalty * excess
        self._set(loss)
        stats = read({"loss": loss, "gap": gap, "slope": norm(slope.detach()).mean()})
        return {k: float(v) for k, v in stats.items()}

    def validate(self) -> dict[str, Any]:
        """Gap of the critic between naive and true validation images."""
        with torch.no_grad():
            gap = float((self._critic(self._naive(self.validation)) - self._critic(self.validation)).mean())
        return {"val_gap": gap, "val_score": gap}
