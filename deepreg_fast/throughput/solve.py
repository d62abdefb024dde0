"""Recovery of a stream of images in slots."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch

from ..batched.linalg import expand
from ..errors import DataError
from ..evaluation.metrics import psnr
from ..inverse.data_term import add_noise, initial_point
from ..operators import LinearOperator
from ..regularizers.base import Regularizer
from ..solvers import PGDOptions, Slots
from ..status import Status
from .sources import Measurement

T = TypeVar("T")


@dataclass
class Result:
    """One recovered image; psnr is None where the true image is not known."""

    x: torch.Tensor
    status: str
    iterations: int
    gradients: int
    residual: float
    psnr: float | None

    def line(self) -> dict[str, Any]:
        """The numbers as JSON values; those that are not finite are null."""
        numbers = {"residual": self.residual} | ({} if self.psnr is None else {"psnr": self.psnr})
        counts = {"status": self.status, "iterations": self.iterations, "gradients": self.gradients}
        return counts | {k: v if math.isfinite(v) else None for k, v in numbers.items()}


class Solver(Generic[T]):
    """Recovers images with tags. Each result has the bits of `recover` with this image alone, if the backend is
    batch-invariant.

    Parameters
    ----------
    A, reg : on one device, with one dtype.
    weight : `mu` of an image from the standard deviation of its noise.
    options : PGDOptions
    slots : the number of images that are recovered at the same time.
    """

    def __init__(
        self,
        A: LinearOperator,
        reg: Regularizer,
        weight: Callable[[float], float],
        options: PGDOptions,
        slots: int,
    ) -> None:
        self.A, self.reg, self._weight = A, reg, weight
        first = next((p for p in reg.parameters()), torch.zeros((), dtype=torch.float32, device="cpu"))
        self._dtype = first.dtype
        self._device = next((b.device for b in A.buffers()), first.device)
        like = torch.zeros((1, *A.measurement_shape), dtype=self._dtype, device=self._device)
        x_like = torch.zeros((1, *A.image_shape), dtype=self._dtype, device=self._device)
        self._slots = Slots(A, reg, options, like, x_like, slots)
        self._images: dict[int, tuple[T, torch.Tensor | None]] = {}

    def __len__(self) -> int:
        """The number of images in the slots."""
        return len(self._images)

    def free(self) -> int:
        """The number of free slots."""
        return len(self._slots.free())

    def check(self, measurement: Measurement) -> None:
        """Raise an `InputError` if the image does not belong to the operator, or has no weight."""
        self._weight(measurement.sigma)
        truth, y = measurement.truth, measurement.y
        if truth is not None and tuple(truth.shape) != self.A.image_shape:
            raise DataError(
                f"An image must have the shape of the first one, {list(self.A.image_shape)}, but has "
                f"{list(truth.shape)}; crop the images."
            )
        if y is not None and tuple(y.shape) != self.A.measurement_shape:
            raise DataError(
                f"Measurements must have the shape of the first ones, {list(self.A.measurement_shape)}, but have "
                f"{list(y.shape)}; recover them apart."
            )

    def admit(self, images: Sequence[tuple[T, int, Measurement]]) -> None:
        """Start the recovery of images, at most `free()`, with tags and numbers, which are the seeds of added noise."""
        rows = self._slots.free()[: len(images)]
        truths = [self._on_device(m.truth) for _, _, m in images]
        y = torch.stack([self._measure(m, t, seed) for (_, seed, m), t in zip(images, truths, strict=True)])
        mu = torch.tensor([self._weight(m.sigma) for _, _, m in images], dtype=y.dtype, device=y.device)
        finite = torch.isfinite(y).flatten(1).all(1)
        x0 = initial_point(torch.where(expand(finite, y), y, 0.0), self.A, self.reg)
        self._slots.refill(rows, y, mu, x0)
        self._images.update((row, (image[0], t)) for row, image, t in zip(rows, images, truths, strict=True))

    def advance(self) -> list[tuple[T, Result]]:
        """One round; the images that have ended."""
        self._slots.round()
        rows = self._slots.ended()
        if not rows:
            return []
        sol = self._slots.take(rows)
        numbers = zip(
            sol.status.tolist(), sol.iterations.tolist(), sol.gradients.tolist(), sol.residual.tolist(), strict=True
        )
        out: list[tuple[T, Result]] = []
        for row, x, (status, iterations, gradients, residual) in zip(rows, sol.x, numbers, strict=True):
            tag, truth = self._images.pop(row)
            quality = None if truth is None else float(psnr(x[None], truth[None])[0])
            name = Status(status).name.lower()
            out.append((tag, Result(x.cpu(), name, iterations, gradients, residual, quality)))
        return out

    def _on_device(self, t: torch.Tensor | None) -> torch.Tensor | None:
        return None if t is None else t.to(device=self._device, dtype=self._dtype)

    def _measure(self, m: Measurement, truth: torch.Tensor | None, seed: int) -> torch.Tensor:
        if (y := self._on_device(m.y)) is not None:
            return y
        assert truth is not None
        return add_noise(self.A.A(truth[None]), m.sigma, seed + 1)[0]
