"""Base class of regularizers, `r = (1+alpha)/2 ||x - center||^2 - s`, with derivatives (docs/math.md, M8)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .. import backend, checks
from ..errors import InputError

_REGISTRY: dict[str, type[Regularizer]] = {}


class Regularizer(nn.Module):
    """Base class of regularizers; a subclass defines `energy(x) -> [B]` in PyTorch.

    The value, gradient, Hessian-vector product and parameter product follow from it (docs/math.md, M8).

    Attributes
    ----------
    alpha : float
        Of `s(x) = (1+alpha)/2 ||x - center||^2 - r(x)`, whose gradient the Lipschitz penalty bounds. If
        `Lip(grad s) <= beta`, then `(1+alpha-beta) I <= hess r <= (1+alpha+beta) I`.
    center : float
        The gray value about which the regularizer is centered.
    image_channels : int or None
        The channels that its images must have; None for any number.

    Raises
    ------
    InputError
        By its methods, if x is not a float32 or float64 batch of images with the dtype and device of the parameters.

    Examples
    --------
    >>> import torch, deepreg_fast as dr
    >>> class Quadratic(dr.Regularizer):
    ...     def energy(self, x):
    ...         return 0.5 * (x - self.center).square().flatten(1).sum(1)
    >>> x, v = torch.rand(2, 1, 4, 4), torch.rand(2, 1, 4, 4)
    >>> torch.allclose(Quadratic().linearize(x).hvp(v), v)
    True
    """

    alpha: float = 0.0
    center: float = 0.5
    image_channels: int | None = None

    def energy(self, x: torch.Tensor) -> torch.Tensor:
        """`r(x_b)`, `[B, C, H, W] -> [B]`, differentiable twice in x and once in the parameters."""
        raise NotImplementedError(f"{type(self).__name__} must define energy(x) -> [B].")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`r(x_b)`; the same as `energy`."""
        return self.energy(x)

    def value_and_grad(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`r(x_b)` `[B]` and `grad r(x_b)` `[B, C, H, W]`, neither attached to a graph.

        Raises
        ------
        InputError
            If x is not a float32 or float64 batch of images of the regularizer's kind.
        """
        self._check(x)
        if x.shape[0] == 0:
            return x.new_zeros(0), torch.zeros_like(x)
        return backend.select(self, x).value_and_grad(self, x)

    def linearize(self, x: torch.Tensor) -> backend.Linearization:
        """Save the activations at `x`; `.hvp(v)` and `.param_vjp(v)` then cost one sweep each."""
        self._check(x)
        return backend.select(self, x).linearize(self, x)

    def backend_for(self, x: torch.Tensor) -> backend.Backend:
        """The backend that computes the derivatives at `x` under the current selection."""
        return backend.select(self, x)

    def computed_by_backend(self) -> bool:
        """Whether a backend computes `value_and_grad`, that is, it is not overridden."""
        return type(self).value_and_grad is Regularizer.value_and_grad and "value_and_grad" not in vars(self)

    def rescaled(self, scale: float) -> Regularizer:
        """`r(center + scale u)/scale^2`, `u = x - center`, `scale > 0`: the energy at another contrast, with the same
        Hessians. The result shares this regularizer's weights or has copies of them."""
        if checks.number(scale, "scale", 0.0, open_low=True) == 1.0:
            return self
        from .scaled import Scaled

        return Scaled(self, scale)

    def _check(self, x: torch.Tensor) -> None:
        checks.images(x)
        if self.image_channels not in (None, x.shape[1]):
            remedy = "PerChannel applies it to each channel" if self.image_channels == 1 else "convert the images"
            raise InputError(
                f"{type(self).__name__} takes images [B, {self.image_channels}, H, W], but x has shape "
                f"{list(x.shape)}; {remedy}."
            )
        for p in self.parameters():
            checks.same_kind(x, p, f"x and the parameters of {type(self).__name__}")

    def altered(self) -> str | None:
        """How this energy differs from its class's definition (a hook, a replaced layer); None if it does not. Kernels
        support unaltered energies only."""
        return None

    def describe(self) -> dict[str, Any]:
        """JSON values that rebuild this regularizer without its weights: the registered name under `kind`, and the
        constructor arguments. An unregistered class is only named; load its weight files with
        `deepreg_fast.load(path, reg)`."""
        return {"kind": f"{type(self).__module__}.{type(self).__qualname__}"}


def register(kind: str, cls: type[Regularizer]) -> None:
    """Register a class for weight files: `describe()['kind'] == kind`, and the rest are constructor arguments."""
    _REGISTRY[kind] = cls


def from_description(description: dict[str, Any]) -> Regularizer:
    """Rebuild a regularizer (with initial weights) from the result of `describe()`."""
    kind = description.get("kind")
    if kind not in _REGISTRY:
        raise InputError(
            f"The regularizer's kind must be one of {sorted(_REGISTRY)}, but is {kind!r}; "
            "build yours and give it to load(path, reg), or register its class with "
            "deepreg_fast.regularizers.register(kind, cls)."
        )
    try:
        return _REGISTRY[kind](**{k: v for k, v in description.items() if k != "kind"})
    except TypeError as error:
        raise InputError(f"The description of a {kind!r} regularizer does not fit its class: {error}.") from error


def written(reg: Any) -> Any:
    """The original regularizer if `reg` is the result of `torch.compile`, otherwise `reg`.

    Kernels need no compiler, and compiled code has no second derivative.
    """
    original = getattr(reg, "_orig_mod", None)
    return original if isinstance(original, Regularizer) else reg


def backend_of_parts(backends: Sequence[backend.Backend]) -> backend.Backend:
    """The first backend that is not batch-invariant (then the sum of the parts is not either), or the first."""
    return next((b for b in backends if not b.batch_invariant), backends[0])


def sum_by_name(
    whole: nn.Module, parts: Iterable[tuple[nn.Module, Mapping[str, torch.Tensor]]]
) -> dict[str, torch.Tensor]:
    """Gradients of the parameters of `whole` from those of its parts, in order. A parameter that several parts share
    has one name in the whole and another in each part."""
    names = {id(p): n for n, p in whole.named_parameters()}
    out: dict[str, torch.Tensor] = {}
    for part, gradients in parts:
        name_in_whole = {n: names[id(p)] for n, p in part.named_parameters()}
        for k, g in gradients.items():
            name = name_in_whole[k]
            out[name] = out[name] + g if name in out else g
    return out


def as_regularizer(reg: nn.Module) -> Regularizer:
    """`reg` itself if it is a `Regularizer`, otherwise the regularizer with the energy `r(x) = reg(x)`."""
    reg = written(reg)
    if isinstance(reg, Regularizer):
        return reg
    if isinstance(reg, nn.Module):
        from .energy import EnergyRegularizer

        return EnergyRegularizer(reg)
    raise InputError(f"reg must be an nn.Module that maps images to one energy each, but is {reg!r}.")
