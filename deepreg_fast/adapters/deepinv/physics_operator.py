"""The products of any deepinv physics as an operator."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import torch

from ...errors import InputError
from ...operators import LinearOperator
from .package import deepinv, flatten
from .parameters import batch_sizes, dtype_of, select_images, tensors


class PhysicsOperator(LinearOperator):
    """The products of a deepinv `LinearPhysics` for real images.

    CG solves the systems, unless `wrap` sets `projection_scale` because `A A^T` is a multiple of a projection.
    """

    def __init__(
        self, physics: Any, image_shape: tuple[int, int, int], batch: int | None, complex_images: bool
    ) -> None:
        super().__init__(image_shape, 1)
        self.physics = physics
        self.dtype = dtype_of(physics)
        self.complex_images = complex_images
        self.batch = batch
        self._template: tuple[tuple[torch.Size, bool], ...] | None = None
        self._normal_is_product = True
        # Random images for the checks: another number than any that the physics could have parameters for.
        self._count = batch or next(n for n in range(2, 1000) if n not in batch_sizes(physics))
        self._store_shapes(physics.A(self._deepinv_images(self.samples(1)[0])))

    def samples(self, count: int, seed: int = 0) -> list[torch.Tensor]:
        """Random normal images, one batch each, in the dtype and on the device of the physics."""
        device = next((b.device for b in tensors(self.physics).values()), torch.device("cpu"))
        generator = torch.Generator().manual_seed(seed)
        size = (count, self._count, *self.image_shape)
        draw = torch.randn(size, generator=generator, dtype=torch.float64, device="cpu")
        return list(draw.to(device, self.dtype or torch.float32))

    def _deepinv_images(self, x: torch.Tensor) -> torch.Tensor:
        if self.dtype is not None and x.dtype != self.dtype:
            name = str(self.dtype).removeprefix("torch.")
            raise InputError(
                f"Images and measurements must be {name}, as {type(self.physics).__name__} computes, but are "
                f"{str(x.dtype).removeprefix('torch.')}; convert them, or the physics with physics.to(torch.float64)."
            )
        return torch.complex(x, torch.zeros_like(x)) if self.complex_images else x

    def _store_shapes(self, y: Any) -> None:
        """Store the shapes of measurements."""
        parts = [y] if isinstance(y, torch.Tensor) else list(y)
        expected = self._count
        if not all(isinstance(p, torch.Tensor) and p.ndim >= 2 and len(p) == expected for p in parts):
            raise InputError(
                f"{type(self.physics).__name__}.A must map {expected} images to {expected} measurements, but does not; "
                "its parameters must be those of one image, or of each image of the batch."
            )
        self._template = tuple((p.shape[1:], p.is_complex()) for p in parts)
        self._is_list = not isinstance(y, torch.Tensor)
        self._measurement_shape = tuple(flatten(y).shape[1:])
        self.measurements = math.prod(self._measurement_shape)

    def _unflatten(self, y: torch.Tensor) -> Any:
        assert self._template is not None
        sizes = [math.prod(shape) * (2 if is_complex else 1) for shape, is_complex in self._template]
        parts = []
        for piece, (shape, is_complex) in zip(y.flatten(1).split(sizes, 1), self._template, strict=True):
            real = piece.reshape(len(y), *shape, 2) if is_complex else piece.reshape(len(y), *shape)
            parts.append(torch.view_as_complex(real.contiguous()) if is_complex else real)
        return deepinv().utils.TensorList(parts) if self._is_list else parts[0]

    def _forward(self, x: torch.Tensor) -> torch.Tensor:
        return flatten(self.physics.A(self._deepinv_images(x)))

    def _adjoint(self, y: torch.Tensor) -> torch.Tensor:
        return self._image_of(self.physics.A_adjoint(self._unflatten(y)), y)

    def _normal(self, x: torch.Tensor) -> torch.Tensor:
        if not self._normal_is_product:
            return super()._normal(x)
        return self._image_of(self.physics.A_adjoint_A(self._deepinv_images(x)), x)

    def _image_of(self, x: Any, like: torch.Tensor) -> torch.Tensor:
        x = x.real if x.is_complex() else x
        if tuple(x.shape[1:]) != self.image_shape:
            raise InputError(
                f"{type(self.physics).__name__}.A_adjoint must return images of shape {list(self.image_shape)}, but "
                f"returns shape {list(x.shape[1:])}; is img_size right?"
            )
        if x.dtype != like.dtype:
            raise InputError(
                f"{type(self.physics).__name__}.A_adjoint must return {like.dtype} for {like.dtype}, but returns "
                f"{x.dtype}; convert the measurements to {x.dtype}."
            )
        return x

    def sqnorms(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """`||A||^2` of each image if it has parameters for each, else `[1]`; estimated in the physics' dtype."""
        return super().sqnorms(dtype or self.dtype)

    def select(self, idx: torch.Tensor) -> LinearOperator:
        """The operator of the images `idx`."""
        if self.batch is None:
            return self
        part = super().select(idx)
        part._modules["physics"] = select_images(self.physics, idx, self.batch)
        return part

    def describe(self) -> dict[str, Any]:
        """Raises: a physics of another package cannot be rebuilt from a file."""
        raise InputError(
            f"A wrapped {type(self.physics).__name__} cannot be written to a file, because only deepinv can rebuild "
            "it; save the physics with torch.save and wrap it anew with from_deepinv."
        )

    def fingerprint(self) -> str:
        """SHA-256 of the class, deepinv's version, and the buffers."""
        kind = type(self.physics)
        digest = hashlib.sha256(f"{kind.__module__}.{kind.__qualname__} {deepinv().__version__}".encode())
        for name, buffer in sorted(tensors(self.physics).items()):
            digest.update(name.encode())
            digest.update(buffer.detach().cpu().resolve_conj().contiguous().numpy().tobytes())
        return digest.hexdigest()
