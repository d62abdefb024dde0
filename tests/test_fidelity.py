"""The weight mu and the noise."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch

from deepreg_fast.errors import InputError
from deepreg_fast.inverse.data_term import LAM, add_noise, mu_with_noise, resolve_mu


def test_mu_is_lam_sigma_squared() -> None:
    y = torch.zeros(3, 5)
    assert resolve_mu(0.5, like=y).tolist() == [0.5] * 3
    assert resolve_mu(None, 8.0, 0.25, like=y).tolist() == [0.5] * 3
    per_image = resolve_mu(None, torch.tensor([1.0, 2.0, 4.0]), 0.5, like=y.double())
    assert per_image.tolist() == [0.25, 0.5, 1.0] and per_image.dtype == torch.float64
    assert resolve_mu(1.0, like=y[:0]).shape == (0,)


@pytest.mark.parametrize(
    ("mu", "lam", "sigma", "sentence"),
    [
        (None, None, None, "give one of the two"),
        (1.0, 1.0, None, "give one of the two"),
        (1.0, 1.0, 1.0, "give one of the two"),
        (None, 1.0, None, "give one of the two"),
        (0.0, None, None, "positive and finite"),
        (-1.0, None, None, "positive and finite"),
        (float("nan"), None, None, "positive and finite"),
        (float("inf"), None, None, "positive and finite"),
        (None, 1.0, 0.0, "noiseless"),
        (torch.tensor([1.0, 0.0, 1.0]), None, None, "positive and finite"),
        (torch.ones(2), None, None, "one for each of the 3 images"),
        (torch.ones(3, 1), None, None, "one for each of the 3 images"),
        ("1", None, None, "mu must be a number"),
        (None, "1", 0.1, "lam must be a number"),
    ],
)
def test_a_weight_that_is_none_gets_one_sentence(mu: object, lam: object, sigma: object, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        resolve_mu(mu, lam, sigma, like=torch.zeros(3, 5))  # type: ignore[arg-type]


def test_the_weight_grows_with_the_variance_and_never_falls_below_the_trained_one() -> None:
    assert mu_with_noise(1e-3, 0.0) == 1e-3
    assert mu_with_noise(1e-3, 0.25, 8.0) == 0.5
    assert mu_with_noise(1.0, 0.25, 8.0) == 1.0
    assert mu_with_noise(1e-6, 0.5) == LAM / 4


@pytest.mark.parametrize(
    ("mu", "sigma", "lam", "name"),
    [(0.0, 0.1, 1.0, "mu"), (1e-3, -0.1, 1.0, "sigma"), (1e-3, float("nan"), 1.0, "sigma"), (1e-3, 0.1, -1.0, "lam")],
)
def test_a_weight_for_noise_that_is_none_gets_one_sentence(mu: float, sigma: float, lam: float, name: str) -> None:
    with pytest.raises(InputError, match=f"{name} must be"):
        mu_with_noise(mu, sigma, lam)


def test_noise_is_normal_and_its_own() -> None:
    y = torch.zeros(100, 1000)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    n = add_noise(y, 2.0, seed=3).double() / 2
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(add_noise(y, 2.0, seed=3), add_noise(y, 2.0, seed=3))
    assert not torch.equal(add_noise(y, 2.0, seed=3), add_noise(y, 2.0, seed=4))
    # Five standard deviations of the estimates from 1e5 draws: mean 1/sqrt(N), variance sqrt(2/N), kurtosis sqrt(24/N).
    assert abs(n.mean()) < 5e-5**0.5 * 5**0.5 and abs(n.var() - 1) < 5 * (2e-5) ** 0.5
    assert abs((n**4).mean() - 3) < 5 * (96e-5) ** 0.5
    assert torch.equal(add_noise(y, 0.0, seed=3), y)
    assert add_noise(y[:0], 1.0, seed=0).shape == (0, 1000)


def test_golden_noise() -> None:
    n = add_noise(torch.zeros(1, 1000, dtype=torch.float64), 1.0, seed=0)
    # Six decimals, so that the last bits of log and cos do not matter.
    text = " ".join(f"{v:.6f}" for v in n[0, :4].tolist())
    assert text == "2.757021 -0.968987 1.021395 -1.193680"
    assert (
        hashlib.sha256(np.random.Philox(np.random.SeedSequence(0)).random_raw(8).tobytes()).hexdigest()[:16]
        == "f0730bfeca1b85e0"
    )


@pytest.mark.parametrize(("sigma", "seed"), [(-1.0, 0), (float("nan"), 0), (float("inf"), 0), (1.0, -1), (1.0, 0.5)])
def test_bad_noise(sigma: float, seed: int) -> None:
    with pytest.raises(InputError, match="must be"):
        add_noise(torch.zeros(1, 2), sigma, seed)
