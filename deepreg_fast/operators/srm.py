"""The structurally random matrix (Do, Gan, Nguyen, Tran 2012): `A = D F R` (docs/math.md, M3)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from .. import backend, checks
from ..ambient import outside_inference
from ..autograd import srm as srm_ops
from ..backend.gpu.graphs import Signature
from ..backend.reference import srm_key
from ..errors import InputError, OperatorMismatch
from ..functional import hadamard, walsh
from ..functional import srm as definition
from ..problem import RANDOMIZERS, TRANSFORMS
from .base import Gamma, LinearOperator, register


class SRM(LinearOperator):
    """Structurally random matrix `A x = (F R x)[rows]`, with `A A^T = I`.

    `R` randomizes the pixels, `F` is an orthonormal transform, and `rows` selects m of the d = C H W coefficients
    (docs/math.md, M3; Do, Gan, Nguyen, Tran 2012).

    Parameters
    ----------
    image_shape : (C, H, W)
    ratio : float in (0, 1], optional
        `m = max(1, round(ratio d))`. Give either `ratio` or `measurements`.
    measurements : int in [1, d], optional
        The number m itself.
    transform : "dct", "hadamard" or "walsh"
        Orthonormal 2-D DCT of each channel; `H_h X H_w^T / sqrt(hw)` with Hadamard matrices of those orders; or
        Walsh-Hadamard in blocks of `block` coefficients.
    randomizer : "sign", "permutation" or "both"
        Random signs of the pixels, a random permutation of them, or signs after the permutation.
    seed : int >= 0
        Seed of the signs, permutation and rows. The same seed gives the same operator on every platform.
    keep_dc : bool, optional
        Whether to select the coefficients that hold the mean of each channel ("walsh": of each block) first. Default:
        only for `randomizer="permutation"`, which preserves the mean.
    block : int, optional
        Block size of "walsh": a power of two that divides d. Default: the largest.

    Raises
    ------
    InputError
        If an argument is out of range, or the transform does not exist for this shape.

    Examples
    --------
    >>> import torch, deepreg_fast as dr
    >>> A = dr.SRM((1, 16, 16), ratio=0.25)
    >>> x = torch.rand(2, 1, 16, 16)
    >>> y = A.A(x)
    >>> y.shape
    torch.Size([2, 64])
    >>> torch.allclose(A.A(A.A_adjoint(y)), y, atol=1e-5)
    True
    """

    gram_scale = 1.0

    @outside_inference
    def __init__(  # noqa: PLR0913 - the operator's own description
        self,
        image_shape: tuple[int, int, int],
        ratio: float | None = None,
        measurements: int | None = None,
        transform: str = "dct",
        randomizer: str = "sign",
        seed: int = 0,
        keep_dc: bool | None = None,
        block: int | None = None,
    ) -> None:
        super().__init__(image_shape, 0)
        d = int(np.prod(self.image_shape))
        self.measurements = _measurements(d, ratio, measurements)
        self.transform = checks.choice(transform, "transform", TRANSFORMS)
        self.randomizer = checks.choice(randomizer, "randomizer", RANDOMIZERS)
        self.seed = checks.integer(seed, "seed", 0)
        self.keep_dc = self.randomizer == "permutation" if keep_dc is None else checks.boolean(keep_dc, "keep_dc")
        self.block = walsh.block_size(d, block) if transform == "walsh" else None
        if transform == "hadamard":
            for n in self.image_shape[1:]:
                hadamard.hadamard(n)
        for name, buffer in self._draw(self.seed, self.keep_dc).items():
            self.register_buffer(name, buffer)
        self.rows: torch.Tensor
        self.signs: torch.Tensor | None
        self.perm: torch.Tensor | None

    def _draw(self, seed: int, keep_dc: bool) -> dict[str, torch.Tensor | None]:
        """The buffers: `rows` sorted int64 `[m]`, `signs` int8 `[d]`, `perm` int64 `[d]`; None for an unused one."""
        d = int(np.prod(self.image_shape))
        step = self.block if self.block is not None else self.image_shape[1] * self.image_shape[2]
        signs, perm, order = _random(d, seed)
        if keep_dc:
            means = order % step == 0
            order = np.concatenate([[0], order[means & (order != 0)], order[~means]])
        return {
            "rows": torch.from_numpy(np.sort(order[: self.measurements])),
            "signs": torch.from_numpy(signs) if self.randomizer != "permutation" else None,
            "perm": torch.from_numpy(perm) if self.randomizer != "sign" else None,
        }

    def _forward(self, x: torch.Tensor) -> torch.Tensor:
        kernels = backend.srm_kernels(self, x)
        if kernels is not None:
            return kernels.forward(x)
        return srm_ops.product("forward", self, x) if srm_ops.use_operators(self, x) else definition.forward(self, x)

    def _adjoint(self, y: torch.Tensor) -> torch.Tensor:
        kernels = backend.srm_kernels(self, y)
        if kernels is not None:
            return kernels.adjoint(y)
        return srm_ops.product("adjoint", self, y) if srm_ops.use_operators(self, y) else definition.adjoint(self, y)

    def _normal(self, x: torch.Tensor) -> torch.Tensor:
        if self._products_replaced():
            return super()._normal(x)
        kernels = backend.srm_kernels(self, x)
        if kernels is not None:
            return kernels.normal(x)
        return srm_ops.product("normal", self, x) if srm_ops.use_operators(self, x) else super()._normal(x)

    def _correct(self, z: torch.Tensor, y: torch.Tensor, weight: Gamma) -> torch.Tensor:
        if self._products_replaced():
            return super()._correct(z, y, weight)
        tensors = (z, y, weight) if isinstance(weight, torch.Tensor) else (z, y)
        kernels = backend.srm_kernels(self, *tensors)
        weights = weight.reshape(-1).expand(len(z)) if isinstance(weight, torch.Tensor) else weight
        if kernels is not None:
            return kernels.correct(z, y, weights)
        if srm_ops.use_operators(self, *tensors):
            return srm_ops.correct(self, z, y, weights)
        return super()._correct(z, y, weight)

    def capturable(self, like: torch.Tensor) -> bool:
        """Whether kernels for such images exist and are capturable."""
        return not self._products_replaced() and getattr(backend.srm_kernels(self, like), "capturable", False)

    def signature(self, like: torch.Tensor) -> Signature | None:
        """The description and the buffers, from which the kernels' tables are computed; None for a subclass."""
        if not self._just(SRM):
            return None
        memory = tuple(t for t in (self.rows, self.signs, self.perm) if t is not None)
        return Signature(("srm", self.gram_scale, srm_key(self)), self, memory)

    def _products_replaced(self) -> bool:
        """Whether a subclass or this object overrides `_forward` or `_adjoint`; other products must then use these."""
        kind, names = type(self), ("_forward", "_adjoint")
        return any(getattr(kind, n) is not getattr(SRM, n) or n in vars(self) for n in names)

    def describe(self) -> dict[str, Any]:
        """Constructor arguments."""
        return {
            "kind": "srm",
            "image_shape": list(self.image_shape),
            "measurements": self.measurements,
            "transform": self.transform,
            "randomizer": self.randomizer,
            "seed": self.seed,
            "keep_dc": self.keep_dc,
            "block": self.block,
        }

    def get_extra_state(self) -> dict[str, Any]:
        """The description, stored in the state to identify its operator."""
        return self.describe()

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Adopt the state's seed; `_load_from_state_dict` has checked it."""
        self.seed, self.keep_dc = state["seed"], state["keep_dc"]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Check the state before anything is copied, so that a rejected state leaves this operator unchanged."""
        state = state_dict.get(prefix + "_extra_state")
        if state is not None:
            self._check_state(state, {k: state_dict.get(prefix + k) for k in ("rows", "signs", "perm")})
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _check_state(self, state: object, buffers: dict[str, torch.Tensor | None]) -> None:
        """The seed may differ; everything else must agree, and the buffers must be those of the state's seed."""
        expected = self.describe()
        saved = state if isinstance(state, dict) else {}
        differing = [k for k in expected if k not in ("seed", "keep_dc") and expected[k] != saved.get(k)]
        if differing:
            differences = ", ".join(f"{k}={saved.get(k)!r} (expected {expected[k]!r})" for k in differing)
            raise OperatorMismatch(
                f"The state must be of an SRM of the same kind, but has {differences}; build that operator."
            )
        seed, keep_dc = checks.integer(saved.get("seed"), "the state's seed", 0), bool(saved.get("keep_dc"))
        for name, drawn in self._draw(seed, keep_dc).items():
            buffer = buffers[name]
            if buffer is not None and (drawn is None or not torch.equal(buffer.cpu(), drawn)):
                raise OperatorMismatch(
                    f"The state's {name} must be those drawn from its seed {seed}, but differ; the file is damaged or "
                    "was written by another version: build the operator anew."
                )


def _measurements(d: int, ratio: float | None, measurements: int | None) -> int:
    if measurements is not None:
        if ratio is not None:
            raise InputError(f"Give ratio or measurements, not both (ratio={ratio!r}, measurements={measurements!r}).")
        return checks.integer(measurements, "measurements", 1, d)
    return max(1, round(checks.number(0.2 if ratio is None else ratio, "ratio", 0.0, 1.0, open_low=True) * d))


def _random(d: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Signs int8, and two random orders of `0..d-1` int64 (permutation, rows), from raw PCG64 output.

    numpy guarantees the raw stream of a bit generator, but not the results of Generator methods. So the orders come
    from sorting raw 64-bit keys.
    """
    keys = [np.random.PCG64(np.random.SeedSequence([seed, stream])).random_raw(d) for stream in range(3)]
    signs = np.where(keys[0] >> np.uint64(63), 1, -1).astype(np.int8)
    perm, order = (np.argsort(k, kind="stable").astype(np.int64) for k in keys[1:])
    return signs, perm, order


register("srm", SRM)
