"""What recoveries are judged by in training: losses of `xhat`, with their derivatives (docs/math.md, M7)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.nn.functional import conv2d

from ..batched.linalg import dot
from ..errors import InputError
from ..operators import LinearOperator

LossFunction = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
_WINDOW, _SIGMA = 11, 1.5


class Judged(NamedTuple):
    """Each image's loss `[B]`, and its derivative in `xhat` (and in the second recovery, for SURE)."""

    value: torch.Tensor
    by_x: torch.Tensor
    by_second: torch.Tensor | None = None


def l1(x_hat: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The mean absolute error of each image, `[B]`, times 10."""
    return 10.0 * (x_hat - x).abs().flatten(1).mean(1)


def dissimilarity(x_hat: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """`1 - SSIM` of each image, `[B]` (Wang et al. 2004), differentiable; as `ssim` otherwise."""
    if min(x.shape[-2:]) < _WINDOW:
        raise InputError(
            f"loss='ssim' needs crops of at least {_WINDOW} pixels (its window), but they have {x.shape[-2]} x "
            f"{x.shape[-1]}; use larger crops or another loss."
        )
    channels = x.shape[1]
    t = torch.arange(_WINDOW, dtype=x.dtype, device=x.device) - _WINDOW // 2
    g = torch.exp(-0.5 * (t / _SIGMA) ** 2)
    window = (g[:, None] * g / g.sum() ** 2).expand(channels, 1, _WINDOW, _WINDOW)

    def mean(z: torch.Tensor) -> torch.Tensor:
        return conv2d(z, window, groups=channels)

    a, b = mean(x_hat), mean(x)
    aa, bb, ab = mean(x_hat * x_hat) - a * a, mean(x * x) - b * b, mean(x_hat * x) - a * b
    c1, c2 = 0.01**2, 0.03**2
    similarity = (2 * a * b + c1) * (2 * ab + c2) / ((a * a + b * b + c1) * (aa + bb + c2))
    return 1.0 - similarity.flatten(1).mean(1)


SUPERVISED: dict[str, LossFunction] = {"l1": l1, "ssim": dissimilarity}


def supervised(loss: LossFunction, x_hat: torch.Tensor, x: torch.Tensor) -> Judged:
    """The mean over the batch of `loss(xhat, x)`, which returns `[B]` or a mean, differentiated by autograd."""
    with torch.enable_grad():
        z = x_hat.detach().requires_grad_()
        value = loss(z, x)
        if not isinstance(value, torch.Tensor) or tuple(value.shape) not in ((), (len(x),)):
            raise InputError(
                f"A loss must return one number for each of the {len(x)} images, or one in all, but returned "
                f"{tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__}."
            )
        total = value.mean()
        if not total.requires_grad:
            raise InputError("A loss must be computed from its first argument by torch, but has no gradient in it.")
        (by_x,) = torch.autograd.grad(total, z)
    values = value.detach().double()
    return Judged((values if values.ndim else values.expand(len(x))) / len(x), by_x)


def noise2noise(A: LinearOperator, x_hat: torch.Tensor, other: torch.Tensor, scale: float) -> Judged:
    """`scale ||A xhat - y'||^2` for measurements y' with other noise than those of the recovery (Lehtinen et al. 2018).

    Its mean is that of `scale ||A xhat - A x||^2` plus a constant.
    """
    misfit = A.A(x_hat) - other
    return Judged(scale * dot(misfit, misfit), 2.0 * scale * A.A_adjoint(misfit))


def sure(  # noqa: PLR0913 - the terms of the formula
    A: LinearOperator,
    x_hat: torch.Tensor,
    second: torch.Tensor,
    y: torch.Tensor,
    probe: torch.Tensor,
    sigma: float,
    tau: float,
    scale: float,
) -> Judged:
    """Stein's unbiased estimate of `scale ||A xhat - A x||^2` from y alone, up to a constant:
    `scale (||A xhat(y) - y||^2 + 2 sigma^2 div_y A xhat(y))`.

    The divergence is `<p, A xhat(y + tau p) - A xhat(y)> / tau` for a random probe p of signs (Ramani, Blu, Unser
    2008); `second` is `xhat(y + tau p)`.
    """
    Ax = A.A(x_hat)
    misfit, weight = Ax - y, 2.0 * sigma**2 / tau
    value = scale * (dot(misfit, misfit) + weight * dot(probe, A.A(second) - Ax))
    back = A.A_adjoint(probe)
    return Judged(value, scale * (2.0 * A.A_adjoint(misfit) - weight * back), scale * weight * back)
