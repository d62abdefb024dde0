"""Blur kernels, and the checks of a user's own."""

from __future__ import annotations

import math
import warnings

import torch

from .. import checks
from ..errors import InputError


def gaussian_kernel(size: int, sigma: float) -> torch.Tensor:
    """A Gaussian of `size` x `size` pixels and standard deviation `sigma` pixels with sum one, float64.

    Examples
    --------
    >>> from deepreg_fast.operators import gaussian_kernel
    >>> gaussian_kernel(25, 1.6).shape
    torch.Size([25, 25])
    """
    n, sigma = checks.integer(size, "size", 1), checks.number(sigma, "sigma", 0.0, open_low=True)
    t = torch.arange(n, dtype=torch.float64, device="cpu") - (n - 1) / 2
    g = torch.exp(-0.5 * (t / sigma) ** 2)
    kernel = g[:, None] * g
    return kernel / kernel.sum()


def motion_kernel(length: float, angle: float) -> torch.Tensor:
    """A line of `length` pixels at `angle` degrees from the horizontal, counterclockwise, with sum one, float64.

    The line has a width of one pixel; each entry falls linearly with the pixel's distance from it.

    Examples
    --------
    >>> from deepreg_fast.operators import motion_kernel
    >>> motion_kernel(30, 45).shape
    torch.Size([23, 23])
    """
    length, angle = checks.number(length, "length", 1.0), checks.number(angle, "angle", -1e6, 1e6)
    half, a = (length - 1) / 2, math.radians(angle)
    dx, dy = abs(math.cos(a)), abs(math.sin(a))
    ry, rx = (math.ceil(half * d + 1 - 1e-9) - 1 for d in (dy, dx))
    y = torch.arange(-ry, ry + 1, dtype=torch.float64, device="cpu")[:, None]
    x = torch.arange(-rx, rx + 1, dtype=torch.float64, device="cpu")
    along, across = x * math.cos(a) - y * math.sin(a), x * math.sin(a) + y * math.cos(a)
    beyond = (along.abs() - half).clamp_min(0.0)
    kernel = (1.0 - (across.square() + beyond.square()).sqrt()).clamp_min(0.0)
    return kernel / kernel.sum()


def check_kernel(kernel: object, image_shape: tuple[int, int, int]) -> torch.Tensor:
    """Check a blur kernel `[h, w]`, or `[B, 1 or C, h, w]` for one per image or channel; return it as 4-D.

    Warns if it does not sum to one, or has an even size.
    """
    if not isinstance(kernel, torch.Tensor) or kernel.ndim not in (2, 4) or not kernel.is_floating_point():
        raise InputError(
            "kernel must be a float tensor [h, w], or [B, 1 or C, h, w] for one per image or channel, "
            f"but is {checks.describe(kernel)}."
        )
    k = kernel.detach() if kernel.ndim == 4 else kernel.detach()[None, None]
    c, h, w = image_shape
    if k.shape[1] not in (1, c) or not k.numel():
        raise InputError(f"kernel must have 1 or {c} channels like the images, but has shape {list(kernel.shape)}.")
    if k.shape[2] > h or k.shape[3] > w:
        raise InputError(
            f"kernel must not be larger than the images, {h} x {w}, but is {k.shape[2]} x {k.shape[3]}; "
            "crop the kernel, or use larger images."
        )
    if not bool(torch.isfinite(k).all()) or not bool((k != 0).any()):
        raise InputError("kernel must be finite and not all zero, but is not; check the file it came from.")
    if k.shape[2] % 2 == 0 or k.shape[3] % 2 == 0:
        warnings.warn(
            f"The kernel has an even size, {k.shape[2]} x {k.shape[3]}; its center is entry "
            f"({k.shape[2] // 2}, {k.shape[3] // 2}), counted from 0.",
            stacklevel=4,
        )
    sums = k.double().sum((2, 3))
    if bool(((sums - 1).abs() > 1e-3).any()):
        worst = sums.flatten()[(sums - 1).abs().flatten().argmax()]
        warnings.warn(
            f"The kernel should sum to one to preserve the brightness, but sums to {float(worst):.4g}; "
            "use kernel / kernel.sum().",
            stacklevel=4,
        )
    return k.clone()
