"""The orthonormal DCT-II as a matrix, and in two dimensions (docs/math.md, M3)."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch

from ..ambient import outside_inference


@lru_cache(maxsize=64)
@outside_inference
def dct_matrix(n: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """`C[k, j] = sqrt((2 - [k=0])/n) cos(pi (2j+1) k / (2n))`, `[n, n]`, orthonormal, built in float64."""
    # The argument is reduced modulo 4n in integers, so that angles stay small.
    k, j = np.arange(n)[:, None], np.arange(n)[None, :]
    c = np.cos(np.pi * (((2 * j + 1) * k) % (4 * n)) / (2 * n)) * np.sqrt(2.0 / n)
    c[0] = np.sqrt(1.0 / n)
    return torch.from_numpy(c).to(device=device, dtype=dtype)


def separable(left: torch.Tensor, x: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """`left X right^T` for each image and channel, `[B, C, H, W]`.

    On the CPU, images are processed one at a time, which makes an image's bits independent of its batch. Measured with
    torch 2.13, a batched `matmul` folds the batch into one tall product whose kernel depends on the height, and `bmm`'s
    bits depend on an image's address (a 7 x 13 image, sixth of its batch). Other devices use the batched product; there
    an image is independent of its batch up to rounding.
    """
    if x.device.type != "cpu" or len(x) == 0:
        return torch.matmul(torch.matmul(left, x), right.T)
    planes = x.reshape(-1, *x.shape[-2:])
    return torch.stack([left @ plane @ right.T for plane in planes]).reshape(x.shape)


def dct2(x: torch.Tensor) -> torch.Tensor:
    """Orthonormal 2-D DCT-II of each channel, `[B, C, H, W]`."""
    ch, cw = (dct_matrix(n, x.dtype, x.device) for n in x.shape[-2:])
    return separable(ch, x, cw)


def idct2(x: torch.Tensor) -> torch.Tensor:
    """The inverse (and transpose) of `dct2`."""
    ch, cw = (dct_matrix(n, x.dtype, x.device) for n in x.shape[-2:])
    return separable(ch.T, x, cw.T)
