"""The SRM's products in C++, for float32 tensors on the CPU (`csrc/cpu/srm.inc`)."""

from __future__ import annotations

from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import nn

from ...functional import hadamard
from ..reference import srm_key
from .extension import extension, instruction_set, plain

_TRANSFORMS = ("dct", "hadamard", "walsh")
_SRMS: WeakKeyDictionary[nn.Module, tuple[Any, CpuSrm | None]] = WeakKeyDictionary()


class CpuSrm:
    """The C++ kernels of one SRM, with copies of its buffers.

    Raises
    ------
    ValueError, IndexError
        If the kernels do not cover the buffers.
    """

    def __init__(self, A: Any, isa: str) -> None:
        module, _ = extension()
        assert module is not None
        self._shape, self._measurements = A.image_shape, A.measurements
        matrices = [
            torch.from_numpy(hadamard.hadamard(n).astype("int8")) if A.transform == "hadamard" else None
            for n in A.image_shape[1:]
        ]
        self._kernels = module.Srm(
            _TRANSFORMS.index(A.transform),
            *A.image_shape,
            A.block or 0,
            A.measurements,
            A.rows,
            A.signs,
            A.perm,
            *matrices,
            isa,
        )

    def current(self, A: Any) -> bool:
        """Whether the operator's buffers equal the copies, by comparison of all values."""
        try:
            return self._kernels.current(A.rows, A.signs, A.perm)
        except ValueError:
            return False

    def _apply(
        self, product: int, x: torch.Tensor | None, y: torch.Tensor | None, weight: float | torch.Tensor = 0.0
    ) -> torch.Tensor:
        like = cast(torch.Tensor, y if x is None else x)
        scalar, weights = (0.0, weight.to(like)) if isinstance(weight, torch.Tensor) else (weight, None)
        x, y, weights = (None if t is None else plain(t) for t in (x, y, weights))
        count = len(like)
        out = like.new_empty((count, self._measurements) if product == 0 else (count, *self._shape))
        self._kernels.apply(product, count, torch.get_num_threads(), x, y, weights, scalar, out)
        return out

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`A x`."""
        return self._apply(0, x, None)

    def adjoint(self, y: torch.Tensor) -> torch.Tensor:
        """`A^T y`."""
        return self._apply(1, None, y)

    def normal(self, x: torch.Tensor) -> torch.Tensor:
        """`A^T A x`."""
        return self._apply(2, x, None)

    def correct(self, x: torch.Tensor, y: torch.Tensor, weight: float | torch.Tensor) -> torch.Tensor:
        """`x_b + weight_b A^T (y_b - A x_b)`, `weight` `[B]` or a number."""
        return self._apply(3, x, y, weight)


def find(A: Any) -> CpuSrm | None:
    """The products of this SRM, from a cache; None if the kernels do not cover it."""
    isa = instruction_set()
    kind = (isa, A.transform, A.block, A.image_shape, A.measurements)
    cached = _SRMS.get(A)
    if cached is not None and cached[0] == kind and cached[1] is not None and cached[1].current(A):
        return cached[1]
    # An SRM that the kernels do not cover is cached under this key until its buffers change.
    key = (isa, *srm_key(A))
    if cached is None or cached[1] is not None or cached[0] != key:
        try:
            cached = (kind, CpuSrm(A, isa))
        except (ValueError, IndexError):
            cached = (key, None)
        _SRMS[A] = cached
    return cached[1]
