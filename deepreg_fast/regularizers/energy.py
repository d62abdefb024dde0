"""Regularizer from a user's module that maps images to one energy each."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from .. import checks
from ..ambient import full_precision
from ..errors import InputError
from ..functional.conv_chain import per_image
from .base import Regularizer

_COUPLING = (nn.modules.batchnorm._BatchNorm,)


class EnergyRegularizer(Regularizer):
    """Regularizer from a module: `r(x) = module(x)`, or `r(x) = (1+alpha)/2 ||x - center||^2 - module(x)`.

    Parameters
    ----------
    module : nn.Module
        Maps `[B, C, H, W]` to `[B]`, twice differentiable in its input. BatchNorm is refused because it couples the
        images of a batch.
    models : "r" or "s"
        Whether the module is the regularizer r or the function s.
    alpha, center : float
        As in `Regularizer`.

    Raises
    ------
    InputError
        If an argument is invalid, or the module couples the images of a batch.

    Examples
    --------
    >>> import torch, deepreg_fast as dr
    >>> class Quartic(torch.nn.Module):
    ...     def forward(self, x):
    ...         return (x**4).flatten(1).sum(1)
    >>> reg = dr.EnergyRegularizer(Quartic())
    >>> x = torch.rand(2, 1, 4, 4)
    >>> torch.allclose(reg.value_and_grad(x)[1], 4 * x**3)
    True
    """

    def __init__(self, module: nn.Module, models: str = "r", alpha: float = 0.0, center: float = 0.5) -> None:
        super().__init__()
        if models not in ("r", "s"):
            raise InputError(f"models must be 'r' or 's', but is {models!r}.")
        if any(isinstance(m, _COUPLING) for m in module.modules()):
            raise InputError(
                "The energy of one image must not depend on the others, but the module contains BatchNorm; "
                "use GroupNorm or LayerNorm instead."
            )
        self.module = module
        self.models = models
        self.alpha = checks.number(alpha, "alpha", -math.inf)
        self.center = checks.number(center, "center", -math.inf)

    def _check(self, x: torch.Tensor) -> None:
        # A user's module may compute in several dtypes; only its first parameter is checked.
        checks.images(x)
        for p in self.parameters():
            checks.same_kind(x, p, f"x and the parameters of {type(self.module).__name__}")
            break

    def describe(self) -> dict[str, Any]:
        """The name of the module's class. `deepreg_fast.load(path, reg)` needs a regularizer that you build."""
        kind = type(self.module)
        name = f"{kind.__module__}.{kind.__qualname__}"
        return {"kind": name, "models": self.models, "alpha": self.alpha, "center": self.center}

    @full_precision
    def energy(self, x: torch.Tensor) -> torch.Tensor:
        """`r(x_b)`, `[B]`."""
        e = self.module(x)
        if not isinstance(e, torch.Tensor) or e.shape != x.shape[:1]:
            raise InputError(
                f"The module must map images {list(x.shape)} to one energy each, shape [{x.shape[0]}], "
                f"but returned {checks.describe(e)}; sum over all dimensions but the first."
            )
        if self.models == "r":
            return e
        return 0.5 * (1.0 + self.alpha) * per_image((x - self.center).square()) - e
