"""The identity: denoising."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ..backend.gpu.graphs import Signature
from .base import LinearOperator, register


class Identity(LinearOperator):
    """The identity `A x = x`, flattened to `[B, C H W]`: denoising.

    Parameters
    ----------
    image_shape : (C, H, W)

    Raises
    ------
    InputError
        If `image_shape` is not three positive integers.

    Examples
    --------
    >>> import torch, deepreg_fast as dr
    >>> dr.Identity((1, 4, 6)).A(torch.rand(3, 1, 4, 6)).shape
    torch.Size([3, 24])
    """

    gram_scale = 1.0

    def __init__(self, image_shape: tuple[int, int, int]) -> None:
        super().__init__(image_shape, 0)
        self.measurements = int(np.prod(self.image_shape))

    def _forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1)

    def _adjoint(self, y: torch.Tensor) -> torch.Tensor:
        return y.reshape(-1, *self.image_shape)

    def capturable(self, like: torch.Tensor) -> bool:
        """Always True: the products only change shapes."""
        return True

    def signature(self, like: torch.Tensor) -> Signature | None:
        """The settings; None for a subclass, whose products may differ."""
        return Signature(("identity", self.image_shape, self.gram_scale), self) if self._just(Identity) else None

    def describe(self) -> dict[str, Any]:
        """Constructor arguments."""
        return {"kind": "identity", "image_shape": list(self.image_shape)}


register("identity", Identity)
