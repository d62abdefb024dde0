"""Gray regularizers on each channel of images of several channels.

The channels become images of the batch, so the gray regularizer's kernels compute every derivative.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..ambient import full_precision
from ..backend import Backend, Linearization, active_images, active_mask
from ..backend.reference import ParameterGuard
from ..batched.linalg import ordered_sum
from ..errors import InputError
from .base import Regularizer, as_regularizer, from_description, register


def gray_regularizer(reg: nn.Module | dict[str, Any], name: str) -> Regularizer:
    """A regularizer of gray images, also from its `describe()` or a module; `name` is that of the wrapper.

    Raises
    ------
    InputError
        If it takes images of more than one channel.
    """
    built = from_description(reg) if isinstance(reg, dict) else as_regularizer(reg)
    if built.image_channels not in (None, 1):
        raise InputError(
            f"{name} takes a regularizer of gray images, but {type(built).__name__} takes images of "
            f"{built.image_channels} channels; use it without {name}."
        )
    return built


def fold(x: torch.Tensor) -> torch.Tensor:
    """`[B, C, H, W] -> [B C, 1, H, W]`: every channel as an image."""
    return x.reshape(-1, 1, *x.shape[2:])


def channel_sum(value: torch.Tensor, channels: int) -> torch.Tensor:
    """`[B C] -> [B]`, added in the order of the channels."""
    return ordered_sum(value.reshape(-1, channels).unbind(1))


@contextmanager
def active_channels(x: torch.Tensor) -> Iterator[None]:
    """Within this context the mask of active images is one of the folded channels of `x` `[B, C, H, W]`."""
    mask = active_mask(x)
    with active_images(None if mask is None else mask.repeat_interleave(x.shape[1])):
        yield


class PerChannel(Regularizer):
    """A gray regularizer applied to each channel, `r(x) = sum_c reg(x_c)`.

    For color images, or any other stack of planes. The kernels of `reg` compute value and derivatives, with the bits
    of the separate channels.

    Parameters
    ----------
    reg : Regularizer, or its `describe()`, or an nn.Module that maps images to one energy each
        Takes gray images `[B, 1, H, W]`.

    Raises
    ------
    InputError
        If `reg` takes images of several channels.

    Examples
    --------
    >>> import torch, deepreg_fast as dr
    >>> gray, x = dr.Ridge(filters=2, kernel_size=3), torch.rand(2, 3, 8, 8)
    >>> value, grad = dr.PerChannel(gray).value_and_grad(x)
    >>> torch.equal(grad[:, 1:2], gray.value_and_grad(x[:, 1:2])[1])
    True
    """

    def __init__(self, reg: nn.Module | dict[str, Any]) -> None:
        super().__init__()
        self.reg = gray_regularizer(reg, type(self).__name__)
        self.alpha, self.center = self.reg.alpha, self.reg.center

    def _planes(self, x: torch.Tensor) -> torch.Tensor:
        """The gray images `[B C, 1, H, W]` that `reg` takes."""
        return fold(x)

    @full_precision
    def energy(self, x: torch.Tensor) -> torch.Tensor:
        """`sum_c reg(x_bc)`, `[B]`."""
        return channel_sum(self.reg.energy(self._planes(x)), x.shape[1])

    def value_and_grad(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`r(x_b)` `[B]` and `grad r(x_b)`, as in `Regularizer`."""
        self._check(x)
        with active_channels(x):
            value, grad = self.reg.value_and_grad(self._planes(x))
        return channel_sum(value, x.shape[1]), grad.reshape(x.shape)

    def linearize(self, x: torch.Tensor) -> Linearization:
        """The linearization of `reg` at all channels."""
        self._check(x)
        with active_channels(x):
            return _PerChannelLinearization(self.reg.linearize(self._planes(x)), x)

    def backend_for(self, x: torch.Tensor) -> Backend:
        """The backend of `reg` for all channels."""
        return self.reg.backend_for(self._planes(x))

    def rescaled(self, scale: float) -> Regularizer:
        """The rescaled `reg`, on each channel."""
        return type(self)(self.reg.rescaled(scale))

    def describe(self) -> dict[str, Any]:
        """The description of the gray regularizer."""
        return {"kind": "per_channel", "reg": self.reg.describe()}


class _PerChannelLinearization:
    """The gray regularizer's linearization at the folded channels."""

    def __init__(self, inner: Linearization, x: torch.Tensor) -> None:
        self._inner, self._guard = inner, ParameterGuard([])
        self.x = x.detach()
        self.value = channel_sum(inner.value, x.shape[1])
        self.grad = inner.grad.reshape(x.shape)

    def hvp(self, v: torch.Tensor) -> torch.Tensor:
        """`hess r(x_b) v_b`."""
        self._guard.check(v, self.x)
        with active_channels(v):
            return self._inner.hvp(fold(v)).reshape(v.shape)

    def param_vjp(self, v: torch.Tensor) -> dict[str, torch.Tensor]:
        """`sum_b d/dtheta <grad r(x_b), v_b>`, by parameter name."""
        self._guard.check(v, self.x)
        return {f"reg.{k}": g for k, g in self._inner.param_vjp(fold(v)).items()}


def for_channels(reg: Regularizer, channels: int) -> Regularizer:
    """The regularizer for images of `channels` channels: `reg`, or `PerChannel(reg)` if it takes gray images only.

    Raises
    ------
    InputError
        If it takes images of another number of channels.
    """
    if reg.image_channels in (None, channels):
        return reg
    if reg.image_channels != 1:
        raise InputError(
            f"The regularizer takes images of {reg.image_channels} channels, but they have {channels}; load images of "
            "its kind, or use another regularizer."
        )
    return PerChannel(reg)


register("per_channel", PerChannel)
