"""The products of an operator: `A x`, `A^T y` and `A^T A x`, with checked arguments."""

from __future__ import annotations

import math

import numpy as np
import torch

from .. import checks
from ..ambient import full_precision
from ..backend.gpu.graphs import Signature
from ..errors import InputError
from .derived import DerivedValues
from .systems import Gamma


class Products(DerivedValues):
    """`A x`, `A^T y` and `A^T A x` of a subclass's `_forward` and `_adjoint`."""

    batch: int | None = None

    def __init__(self, image_shape: tuple[int, int, int], measurements: int | tuple[int, ...]) -> None:
        super().__init__()
        shape = tuple(image_shape) if isinstance(image_shape, (tuple, list, np.ndarray)) and len(image_shape) else ()
        if len(shape) != 3:
            raise InputError(f"image_shape must be (C, H, W), but is {image_shape!r}; a gray image has C = 1.")
        c, h, w = (checks.integer(n, "every size in image_shape", 1) for n in shape)
        self.image_shape: tuple[int, int, int] = (c, h, w)
        self._measurement_shape = tuple(measurements) if isinstance(measurements, (tuple, list)) else None
        self.measurements = measurements if isinstance(measurements, int) else math.prod(measurements)

    @property
    def measurement_shape(self) -> tuple[int, ...]:
        """The shape of the measurements of one image."""
        return self._measurement_shape or (self.measurements,)

    # -- what a subclass defines ---------------------------------------------------------------------------------------

    def _forward(self, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError(f"{type(self).__name__} must define _forward(x).")

    def _adjoint(self, y: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError(f"{type(self).__name__} must define _adjoint(y).")

    def _normal(self, x: torch.Tensor) -> torch.Tensor:
        return self._adjoint(self._forward(x))

    def _correct(self, z: torch.Tensor, y: torch.Tensor, weight: Gamma) -> torch.Tensor:
        """`z + weight A^T (y - A z)`."""
        return z + weight * self._adjoint(y - self._forward(z))

    # -- the same, checked ---------------------------------------------------------------------------------------------

    @full_precision
    def A(self, x: torch.Tensor) -> torch.Tensor:
        """`A x`, `[B, C, H, W] -> [B, *measurement_shape]`."""
        return self._forward(self._image(x, "x"))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`A x`."""
        return self.A(x)

    @full_precision
    def A_adjoint(self, y: torch.Tensor) -> torch.Tensor:
        """`A^T y`, `[B, *measurement_shape] -> [B, C, H, W]`."""
        return self._adjoint(self._measured(y, "y"))

    @full_precision
    def normal(self, x: torch.Tensor) -> torch.Tensor:
        """`A^T A x`."""
        return self._normal(self._image(x, "x"))

    # -- checks --------------------------------------------------------------------------------------------------------

    def _image(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return self._checked_placement(checks.images(x, name, self.image_shape), name)

    def _measured(self, y: torch.Tensor, name: str) -> torch.Tensor:
        return self._checked_placement(checks.measured(y, self.measurement_shape, name), name)

    def _checked_placement(self, t: torch.Tensor, name: str) -> torch.Tensor:
        """Check that `t` is on the device of the operator's buffers and has as many images; return it."""
        device = next((b.device for b in self._buffers.values() if b is not None), None)
        if device is None:
            device = next((b.device for b in self.buffers()), t.device)
        if t.device != device:
            raise InputError(
                f"{name} must be on the operator's device {device}, but is on {t.device}; "
                f"move one of them with .to({str(device)!r})."
            )
        if self.batch is not None and len(t) != self.batch:
            raise InputError(
                f"{name} must hold {self.batch} images, for each of which the operator has parameters, but holds "
                f"{len(t)}; use A.select(indices) for a part of them."
            )
        return t

    # -- CUDA graphs ---------------------------------------------------------------------------------------------------

    def capturable(self, like: torch.Tensor) -> bool:
        """Whether the products and closed forms, for images like these, can be captured in a CUDA graph: they do not
        synchronize and were warmed up by a first call. False unless a subclass overrides this."""
        return False

    def signature(self, like: torch.Tensor) -> Signature | None:
        """Everything that recorded products and closed forms depend on besides the images, so that later solves can
        reuse a CUDA graph. None (the default) if it is unknown; a graph then ends with its solve."""
        return None

    def _just(self, kind: type[Products]) -> bool:
        """Whether this is exactly a `kind`, without replaced methods."""
        return type(self) is kind and not any(callable(getattr(kind, name, None)) for name in vars(self))
