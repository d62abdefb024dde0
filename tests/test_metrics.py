from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from deepreg_fast.errors import InputError
from deepreg_fast.evaluation.metrics import psnr, ssim


def noisy(seed: int = 0, shape: tuple[int, ...] = (3, 1, 20, 24)) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    ref = torch.rand(shape, generator=g, dtype=torch.float64)
    return ref + 0.1 * torch.randn(shape, generator=g, dtype=torch.float64), ref


def ssim_by_its_formula(x: np.ndarray, y: np.ndarray) -> float:
    """Equations 12 to 16 of Wang et al. 2004, window by window."""
    t = np.arange(-5, 6)
    w = np.exp(-(t[:, None] ** 2 + t[None, :] ** 2) / (2 * 1.5**2))
    w /= w.sum()
    c1, c2 = 0.01**2, 0.03**2
    scores = []
    for i in range(x.shape[0] - 10):
        for j in range(x.shape[1] - 10):
            a, b = x[i : i + 11, j : j + 11], y[i : i + 11, j : j + 11]
            ma, mb = (w * a).sum(), (w * b).sum()
            va, vb = (w * (a - ma) ** 2).sum(), (w * (b - mb) ** 2).sum()
            cov = (w * (a - ma) * (b - mb)).sum()
            scores.append((2 * ma * mb + c1) * (2 * cov + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2)))
    return float(np.mean(scores))


def test_psnr_of_a_known_error():
    ref = torch.full((2, 1, 4, 4), 0.5)
    x = ref.clone()
    x[0] += 0.1
    x[1] += 0.01
    # the float32 sums 0.5 + 0.1 and 0.5 + 0.01 are off by up to 3e-8, which moves 20 dB and 40 dB by up to 3e-5
    assert torch.allclose(psnr(x, ref), torch.tensor([20.0, 40.0], dtype=torch.float64), rtol=0, atol=3e-5)


def test_psnr_agrees_with_its_formula_and_has_float64_digits():
    x, ref = noisy()
    for got, a, b in zip(psnr(x, ref), x.numpy(), ref.numpy(), strict=True):
        assert math.isclose(float(got), 10 * math.log10(1 / np.mean((a - b) ** 2)), rel_tol=1e-12)
    assert psnr(x.float(), ref.float()).dtype == torch.float64


def test_psnr_of_equal_and_of_broken_images():
    x, ref = noisy()
    x[0] = ref[0]
    x[1, 0, 3, 3] = math.nan
    x[2, 0, 3, 3] = math.inf
    values = psnr(x, ref)
    assert values[0] == math.inf
    assert torch.isnan(values[1])
    assert values[2] == -math.inf


def test_ssim_agrees_with_its_formula():
    x, ref = noisy()
    for got, a, b in zip(ssim(x, ref), x.numpy(), ref.numpy(), strict=True):
        # skimage forms variances as E[a^2] - E[a]^2: a few float64 roundings of numbers near 1
        assert math.isclose(float(got), ssim_by_its_formula(a[0], b[0]), abs_tol=1e-12)


def test_ssim_of_equal_images_is_one_and_of_broken_ones_nan():
    x, ref = noisy()
    x[0] = ref[0]
    x[1, 0, 0, 0] = math.nan
    values = ssim(x.float(), ref.float())
    assert values.dtype == torch.float64
    assert math.isclose(float(values[0]), 1.0, abs_tol=1e-12)
    assert torch.isnan(values[1])
    assert 0 < values[2] < 1


def test_ssim_averages_the_channels():
    x, ref = noisy(shape=(2, 3, 16, 16))
    each = torch.stack([ssim(x[:, c : c + 1], ref[:, c : c + 1]) for c in range(3)]).mean(0)
    assert torch.allclose(ssim(x, ref), each, rtol=0, atol=1e-12)


@pytest.mark.parametrize("metric", [psnr, ssim])
@pytest.mark.parametrize(
    ("x", "ref", "words"),
    [
        (torch.rand(1, 20, 20), torch.rand(1, 1, 20, 20), "x must be"),
        (torch.rand(1, 1, 20, 20), torch.rand(1, 1, 20, 21), "ref must hold images of shape"),
        (torch.rand(2, 1, 20, 20), torch.rand(1, 1, 20, 20), "hold 2 and 1"),
        (torch.zeros(1, 1, 20, 20, dtype=torch.uint8), torch.rand(1, 1, 20, 20), "uint8"),
    ],
)
def test_bad_input(metric, x: torch.Tensor, ref: torch.Tensor, words: str):
    with pytest.raises(InputError, match=words):
        metric(x, ref)


def test_ssim_needs_its_window():
    with pytest.raises(InputError, match="at least 11x11"):
        ssim(torch.rand(1, 1, 10, 40), torch.rand(1, 1, 10, 40))
