"""Losses of training other than the squared error: values, derivatives, and that they teach."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import deepreg_fast as dr
from deepreg_fast.errors import InputError
from deepreg_fast.training import losses
from deepreg_fast.training.config import LOSSES

from .helpers import images, normal

F64 = torch.float64


def config(out: Path, **more: Any) -> dr.BilevelConfig:
    settings: dict[str, Any] = {
        "steps": 30,
        "crop": 24,
        "batch": 6,
        "validation": 2,
        "validation_crop": 24,
        "validate_every": 0,
        "regularizer": "ridge",
        "filters": 4,
        "kernel_size": 3,
        "beta": 0.0,
        "lr": 2e-2,
        "mu_lr": 1e-1,
        "mu_max": 10.0,
        "warmup": 2,
        "problem": "denoise",
        "sigma": 0.1,
        "threads": 1,
    }
    return dr.BilevelConfig(out=str(out), **(settings | more))


def test_dissimilarity_is_one_minus_ssim() -> None:
    x = images(3, 2, 17, 14)
    z = (x + 0.1 * normal(3, 2, 17, 14)).requires_grad_()
    value = losses.dissimilarity(z, x)
    torch.testing.assert_close(value.detach(), 1.0 - dr.ssim(z.detach(), x), rtol=0, atol=1e-7)
    assert torch.autograd.gradcheck(lambda t: losses.dissimilarity(t, x[:1]), (z[:1],), fast_mode=True)


def test_supervised_losses_are_means_over_the_batch() -> None:
    x, z = images(3, 1, 12, 12), images(3, 1, 12, 12, seed=1)
    judged = losses.supervised(losses.l1, z, x)
    torch.testing.assert_close(judged.value, 10.0 * (z - x).abs().mean((1, 2, 3)) / 3)
    torch.testing.assert_close(judged.by_x, 10.0 * torch.sign(z - x) / x.numel())
    mean = losses.supervised(lambda a, b: (a - b).square().mean(), z, x)
    torch.testing.assert_close(mean.by_x, 2.0 * (z - x) / x.numel())
    assert float(mean.value.sum()) == pytest.approx(float((z - x).square().mean()))
    for bad, sentence in (
        (lambda a, b: (a - b).square(), "one number for each of the 3 images"),
        (lambda a, b: b.mean(), "no gradient"),
    ):
        with pytest.raises(InputError, match=sentence):
            losses.supervised(bad, z, x)


@pytest.mark.parametrize("problem", ["denoise", "blur"])
def test_sure_is_the_formula_and_its_derivative(problem: str) -> None:
    """For a linear estimator the divergence is a trace, which signs on a diagonal give exactly."""
    A = dr.Identity((1, 6, 6)) if problem == "denoise" else dr.Inpainting(torch.ones(1, 6, 6))
    x, sigma, mu, tau = images(2, 1, 6, 6), 0.2, 0.7, 0.05
    y = A.A(x) + sigma * normal(2, *A.measurement_shape)
    probe = torch.sign(normal(2, *A.measurement_shape, seed=3))

    def recovered(y: torch.Tensor) -> torch.Tensor:
        return A.A_adjoint(y) / (1.0 + mu)

    first, second = recovered(y), recovered(y + tau * probe)
    judged = losses.sure(A, first, second, y, probe, sigma, tau, 2.0)
    misfit = (A.A(first) - y).flatten(1).square().sum(1)
    torch.testing.assert_close(judged.value, 2.0 * (misfit + 2 * sigma**2 * 36 / (1 + mu)))
    z, w = first.requires_grad_(), second.requires_grad_()
    Az, Aw = A.A(z), A.A(w)
    total = 2.0 * ((Az - y).square().sum() + 2 * sigma**2 / tau * (probe * (Aw - Az)).sum())
    by_x, by_second = torch.autograd.grad(total, (z, w))
    torch.testing.assert_close(judged.by_x, by_x)
    torch.testing.assert_close(judged.by_second, by_second)


def test_noise2noise_is_its_derivative() -> None:
    A = dr.SRM((1, 6, 6), 0.5)
    z, other = images(2, 1, 6, 6).requires_grad_(), normal(2, 18)
    judged = losses.noise2noise(A, z.detach(), other, 3.0)
    (by_x,) = torch.autograd.grad(3.0 * (A.A(z) - other).square().sum(), z)
    torch.testing.assert_close(judged.by_x, by_x)
    torch.testing.assert_close(judged.value, 3.0 * (A.A(z.detach()) - other).square().sum(1))


@pytest.mark.parametrize("loss", [*LOSSES[2:], "callable"])
def test_every_loss_teaches(loss: str, tmp_path: Path) -> None:
    """Thirty steps gain half a decibel with each loss; with a wrong sign they lose."""
    function = (lambda a, b: 1e3 * (a - b).square().flatten(1).mean(1)) if loss == "callable" else None
    settings = config(tmp_path / "run", loss="mse" if loss == "callable" else loss)
    trainer = dr.BilevelTrainer(settings, progress=False, loss=function)
    before = trainer.objective.validate()["val_psnr"]
    trainer.fit()
    assert trainer.objective.validate()["val_psnr"] > before + 0.3


def test_a_callable_is_the_named_loss(tmp_path: Path) -> None:
    def mse(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return 1e3 * (a - b).square().flatten(1).mean(1)

    named = dr.BilevelTrainer(config(tmp_path / "a", steps=3), progress=False)
    given = dr.BilevelTrainer(config(tmp_path / "b", steps=3), progress=False, loss=mse)
    for p, q in zip(named.fit().parameters(), given.fit().parameters(), strict=True):
        # The same gradient up to rounding; Adam's first steps have the size of lr whatever the gradient's.
        torch.testing.assert_close(p, q, rtol=1e-2, atol=1e-3)
    assert float(named.mu) == pytest.approx(float(given.mu), rel=1e-2)


def test_sure_resumes_bit_for_bit(tmp_path: Path) -> None:
    whole = dr.BilevelTrainer(config(tmp_path / "a", steps=4, loss="sure"), progress=False).fit()
    stopped = dr.BilevelTrainer(config(tmp_path / "b", steps=4, loss="sure"), progress=False)
    gradients = stopped.gradients

    def interrupted(*arguments: Any) -> Any:
        if stopped.step_done == 2:
            raise KeyboardInterrupt
        return gradients(*arguments)

    stopped.gradients = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        stopped.fit()
    parts = dr.BilevelTrainer(config(tmp_path / "b", steps=4, loss="sure"), progress=False).resume()
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), parts.parameters(), strict=True))


def test_losses_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    for more, sentence in (
        ({"loss": "sure", "sigma": 0.0}, "needs noisy measurements"),
        ({"loss": "l1", "adjoint": "unrolled"}, "for the losses mse and psnr"),
        ({"loss": "entropy"}, "loss must be one of"),
    ):
        with pytest.raises(InputError, match=sentence):
            config(tmp_path, **more)
    trainer = dr.BilevelTrainer(config(tmp_path / "small", loss="ssim", crop=8), progress=False)
    with pytest.raises(InputError, match="at least 11 pixels"):
        trainer.fit()


def test_training_on_another_problem_writes_it_down(tmp_path: Path) -> None:
    trainer = dr.BilevelTrainer(
        config(tmp_path / "run", steps=2, problem="sr2", crop=28, validation_crop=28, validate_every=1), progress=False
    )
    trainer.fit()
    assert trainer.A.measurement_shape == (1, 14, 14)
    assert dr.load(tmp_path / "run/weights.safetensors")[1]["config"]["problem"] == "sr2"
