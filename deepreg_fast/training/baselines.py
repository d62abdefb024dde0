"""Baselines for bi-level training, with the same loop, data and network (docs/math.md, M12)."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import numpy as np
import torch

from ..batched.linalg import dot, norm
from ..regularizers import ICNN, DenoiserField
from ..regularizers.base import Regularizer
from .build import regularizer_of
from .config import BaselineConfig
from .lanes import Batch
from .objective import LaneGradients, Objective, Stats
from .placement import read
from .trainer import Trainer

# Random-number key of the validation noise; no training step has this number.
_VALIDATION = 2**32 - 1


class Baseline(Objective[BaselineConfig]):
    """Base of the baselines. The noise of a step is a function of (seed, step, sample)."""

    lane_columns = ("loss",)

    def _rng(self, *key: int) -> np.random.Generator:
        return np.random.Generator(np.random.PCG64([self.config.seed, 4, *key]))

    def _noise(self, shape: tuple[int, ...], *key: int) -> np.ndarray:
        return self._rng(*key).standard_normal(shape, dtype=np.float32)

    def _add_noise(self, x: torch.Tensor, noise: np.ndarray) -> torch.Tensor:
        return x + self.config.noise_level * self.run.placement.upload(torch.from_numpy(noise))

    def noisy(self, batch: Batch) -> torch.Tensor:
        """The images with the noise of this step, which is drawn for the whole batch."""
        noise = self._noise((batch.total, *batch.x.shape[1:]), self.run.step_done)
        return self._add_noise(batch.x, noise[batch.positions])

    def noisy_validation(self) -> torch.Tensor:
        """The validation images with noise, the same at each validation."""
        return self._add_noise(self.run.validation, self._noise(tuple(self.run.validation.shape), _VALIDATION))

    def gradients(self, batch: Batch) -> LaneGradients:
        """The gradient of each lane alone."""
        parts = [self.lane(b) for b in batch.split()]
        stats = read({k: torch.stack([p[1][k] for p in parts]) for k in self.lane_columns})
        return LaneGradients([theta for theta, _ in parts], stats)

    @abstractmethod
    def lane(self, batch: Batch) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Gradient of one lane's share of the loss, and the lane's columns."""

    def backward(self, loss: torch.Tensor) -> dict[str, torch.Tensor]:
        """The gradient of a loss in theta, by torch."""
        return dict(zip(self.run.names, torch.autograd.grad(loss, self.run.params), strict=True))

    def observe(self, stats: Stats) -> dict[str, Any]:
        """The sums over the lanes."""
        return {k: float(v.sum()) for k, v in stats.items()}


class Denoiser(Baseline):
    """`||d(x + w) - x||^2` of a denoiser d."""

    method = "denoiser"

    def build(self) -> Regularizer:
        """Build the denoiser from the conv chain."""
        return DenoiserField(**self.config.chain())

    def lane(self, batch: Batch) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Gradient of the denoised images' mean squared error."""
        assert isinstance(self.run.reg, DenoiserField)
        error = self.run.reg.denoise(self.noisy(batch)) - batch.x
        loss = len(batch.x) / batch.total * (1e3 * error.square().mean())
        return self.backward(loss), {"loss": loss.detach()}

    def validate(self) -> dict[str, Any]:
        """PSNR of the denoised validation images."""
        assert isinstance(self.run.reg, DenoiserField)
        with torch.no_grad():
            error = self.run.reg.denoise(self.noisy_validation()) - self.run.validation
        return _denoising_score(error)


class GradientStep(Baseline):
    """`||grad r(x + w) - w||^2`, the loss of the denoiser `x - grad r(x)`."""

    method = "gradient_step"

    def build(self) -> Regularizer:
        """Build the same regularizer as bi-level training."""
        return regularizer_of(self.config)

    def lane(self, batch: Batch) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """The gradient is `param_vjp(2 (grad r - w))`."""
        noisy = self.noisy(batch)
        lin = self.run.reg.linearize(noisy)
        error = lin.grad - (noisy - batch.x)
        scale = 1e3 / batch.pixels
        return lin.param_vjp(2.0 * scale * error), {"loss": scale * dot(error, error).sum()}

    def validate(self) -> dict[str, Any]:
        """PSNR of the denoised validation images."""
        noisy = self.noisy_validation()
        return _denoising_score(noisy - self.run.reg.value_and_grad(noisy)[1] - self.run.validation)


class Adversarial(Baseline):
    """`E f(x) - E f(x_naive) + weight E (||grad f(x_mix)|| - 1)_+^2` of a critic f."""

    method = "adversarial"
    lane_columns = ("loss", "gap", "slope")

    def build(self) -> Regularizer:
        """Build the input-convex network."""
        c = self.config
        options = {"gain": c.gain, "center": c.center, "image_channels": c.image_channels, "seed": c.seed}
        return ICNN(c.channels, c.depth, c.rho, **options)

    def _critic(self, x: torch.Tensor) -> torch.Tensor:
        assert isinstance(self.run.reg, ICNN)
        return self.run.reg.net(x - self.run.reg.center)

    def _naive(self, x: torch.Tensor) -> torch.Tensor:
        A = self.run.operator(x)
        c = torch.full_like(x, self.run.reg.center)
        return c + A.A_dagger(A.A(x - c))

    def lane(self, batch: Batch) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Gradient of the critic's loss."""
        x, share = batch.x, len(batch.x) / batch.total
        naive = self._naive(x)
        mixed = self._rng(self.run.step_done).random((batch.total, 1, 1, 1), dtype=np.float32)
        t = self.run.placement.upload(torch.from_numpy(mixed[batch.positions]))
        mix = (t * x + (1 - t) * naive).requires_grad_()
        (slope,) = torch.autograd.grad(self._critic(mix).sum(), mix, create_graph=True)
        excess = (torch.sqrt(slope.square().sum((1, 2, 3)) + 1e-12) - 1.0).clamp_min(0).square().mean()
        gap = self._critic(x).mean() - self._critic(naive).mean()
        loss = share * (gap + self.config.gradient_penalty * excess)
        stats = {"loss": loss, "gap": share * gap, "slope": share * norm(slope.detach()).mean()}
        return self.backward(loss), {k: v.detach() for k, v in stats.items()}

    def validate(self) -> dict[str, Any]:
        """Gap of the critic between naive and true validation images."""
        x = self.run.validation
        with torch.no_grad():
            gap = float((self._critic(self._naive(x)) - self._critic(x)).mean())
        return {"val_gap": gap, "val_score": gap}


def _denoising_score(error: torch.Tensor) -> dict[str, Any]:
    score = float((-10.0 * torch.log10(error.square().mean((1, 2, 3)))).mean())
    return {"val_denoising_psnr": score, "val_score": score}


class DenoiserTrainer(Trainer):
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

    method = Denoiser.method
    config: BaselineConfig

    def __init__(self, config: BaselineConfig, progress: bool | None = None) -> None:
        super().__init__(config, Denoiser(config), progress)


class GradientStepTrainer(Trainer):
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

    method = GradientStep.method
    config: BaselineConfig

    def __init__(self, config: BaselineConfig, progress: bool | None = None) -> None:
        super().__init__(config, GradientStep(config), progress)


class AdversarialTrainer(Trainer):
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

    method = Adversarial.method
    config: BaselineConfig

    def __init__(self, config: BaselineConfig, progress: bool | None = None) -> None:
        super().__init__(config, Adversarial(config), progress)
