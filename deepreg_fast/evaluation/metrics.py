"""PSNR and SSIM per image, for a data range of 1."""

from __future__ import annotations

import torch

from .. import checks
from ..batched.linalg import dot
from ..errors import InputError

_SIGMA = 1.5
_WINDOW = 11


def psnr(x: torch.Tensor, ref: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio `10 log10(1 / mean((x - ref)^2))` in dB.

    Values outside [0, 1] are not clipped.

    Parameters
    ----------
    x, ref : Tensor `[B, C, H, W]`, data range 1

    Returns
    -------
    Tensor `[B]`, float64
        Infinity for equal images; NaN or minus infinity for an image with NaN or infinite pixels.

    Raises
    ------
    InputError
        If the two are not images of one shape.

    Examples
    --------
    >>> import torch, deepreg_fast as dr
    >>> round(float(dr.psnr(torch.zeros(1, 1, 8, 8), torch.full((1, 1, 8, 8), 0.1))), 4)
    20.0
    """
    _pair(x, ref)
    error = x.detach().double() - ref.detach().to(x.device).double()
    return -10 * torch.log10(dot(error, error) / error[:1].numel())


def ssim(x: torch.Tensor, ref: torch.Tensor) -> torch.Tensor:
    """Structural similarity (Wang, Bovik, Sheikh, Simoncelli 2004).

    Gaussian window of 11 x 11 pixels with standard deviation 1.5, biased variances, `K1 = 0.01`, `K2 = 0.03`, data
    range 1; averaged over the pixels whose window lies inside the image, then over channels
    (`skimage.metrics.structural_similarity` with the paper's settings).

    Parameters
    ----------
    x, ref : Tensor `[B, C, H, W]`, data range 1, at least 11 x 11 pixels

    Returns
    -------
    Tensor `[B]`, float64
        At most 1; NaN for an image with NaN or infinite pixels.

    Raises
    ------
    InputError
        If the two are not images of one shape, or are smaller than the window.

    Examples
    --------
    >>> import torch, deepreg_fast as dr
    >>> x = torch.rand(1, 1, 16, 16)
    >>> float(dr.ssim(x, x))
    1.0
    """
    from skimage.metrics import structural_similarity  # imported here: `import deepreg_fast` does not need it

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
