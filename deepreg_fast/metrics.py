"""How close a recovered image is to the true one: PSNR and SSIM, per image, for a data range of 1."""

from __future__ import annotations

import torch

from . import checks
from .errors import InputError
from .linsolve.batch import dot

_SIGMA = 1.5
_WINDOW = 11


def psnr(x: torch.Tensor, ref: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio `10 log10(1 / mean((x - ref)^2))` in dB, a float64 tensor `[B]`.

    `x` and `ref` are images `[B, C, H, W]` of data range 1, compared as they are: values outside [0, 1] are not
    clipped. Equal images give infinity; an image with NaN or infinite pixels gives NaN or minus infinity.

    Raises
    ------
    InputError
        If the two are not images of one shape.
    """
    _pair(x, ref)
    error = x.detach().double() - ref.detach().to(x.device).double()
    return -10 * torch.log10(dot(error, error) / error[:1].numel())


def ssim(x: torch.Tensor, ref: torch.Tensor) -> torch.Tensor:
    """Structural similarity of Wang, Bovik, Sheikh, Simoncelli (IEEE TIP 2004), a float64 tensor `[B]`, at most 1.

    Gaussian window of 11x11 pixels with standard deviation 1.5, weighted (biased) variances, `K1 = 0.01`,
    `K2 = 0.03`, data range 1; the mean over the pixels whose window lies inside the image, then over channels
    (`skimage.metrics.structural_similarity` with the paper's settings). An image with NaN or infinite pixels gives NaN.

    Raises
    ------
    InputError
        If the two are not images of one shape, or are smaller than the window.
    """
    from skimage.metrics import structural_similarity  # here, not above: `import deepreg_fast` does without it

    _pair(x, ref)
    if min(x.shape[-2:]) < _WINDOW:
        raise InputError(
            f"SSIM needs images of at least {_WINDOW}x{_WINDOW} pixels (its window), but they have "
            f"{x.shape[-2]}x{x.shape[-1]}; use psnr for smaller ones."
        )
    values = []
    for a, b in zip(x.detach().double().cpu(), ref.detach().double().cpu(), strict=True):
        if not bool(torch.isfinite(a).all() and torch.isfinite(b).all()):
            values.append(float("nan"))
            continue
        score = structural_similarity(
            a.numpy(),
            b.numpy(),
            channel_axis=0,
            gaussian_weights=True,
            sigma=_SIGMA,
            use_sample_covariance=False,
            data_range=1.0,
        )
        values.append(float(score))  # type: ignore[arg-type]
    return torch.tensor(values, dtype=torch.float64, device=x.device)


def _pair(x: torch.Tensor, ref: torch.Tensor) -> None:
    checks.images(x)
    checks.images(ref, "ref", shape=tuple(x.shape[1:]))  # type: ignore[arg-type]
    if x.shape[0] != ref.shape[0]:
        raise InputError(
            f"x and ref must hold as many images, but hold {x.shape[0]} and {ref.shape[0]}; "
            "expand the reference to the batch first."
        )
