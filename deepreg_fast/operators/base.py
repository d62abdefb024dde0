"""Base class and registry of linear operators (docs/math.md, M2)."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np
import torch
from torch import nn

from .. import checks
from ..ambient import full_precision
from ..backend.gpu.graphs import Signature
from ..batched.linalg import expand
from ..errors import InputError
from ..solvers.cg import CGOptions, cg
from ..solvers.protocols import fails_per_image
from ..status import Status

_REGISTRY: dict[str, type[LinearOperator]] = {}
Gamma = float | torch.Tensor


class LinearOperator(nn.Module):
    """Base class of linear operators from images `[B, C, H, W]` to measurements `[B, m]`.

    A subclass defines `_forward` and `_adjoint`. If `A A^T = c I`, it sets `gram_scale = c`, and `A_dagger`, `prox_l2`
    and `shifted_inverse` have closed forms (docs/math.md, M2). Otherwise CG solves the proximal map, and the subclass
    defines `A_dagger`.

    Parameters
    ----------
    image_shape : (C, H, W)
    measurements : int
        The number m of measurements per image.

    Attributes
    ----------
    image_shape : (C, H, W)
    measurements : int
    gram_scale : float or None

    Raises
    ------
    InputError
        If a size is not a positive integer. The methods raise it if a tensor has the wrong shape, dtype or device.

    Examples
    --------
    >>> import torch, deepreg_fast as dr
    >>> class Half(dr.LinearOperator):
    ...     gram_scale = 1.0
    ...     def _forward(self, x):
    ...         return x[..., :2].flatten(1)
    ...     def _adjoint(self, y):
    ...         return torch.nn.functional.pad(y.reshape(-1, 1, 4, 2), (0, 2))
    >>> A = Half((1, 4, 4), 8)
    >>> x = torch.rand(1, 1, 4, 4)
    >>> torch.equal(A.A(A.A_dagger(A.A(x))), A.A(x))
    True
    """

    gram_scale: float | None = None

    def __init__(self, image_shape: tuple[int, int, int], measurements: int) -> None:
        super().__init__()
        shape = tuple(image_shape) if isinstance(image_shape, (tuple, list, np.ndarray)) and len(image_shape) else ()
        if len(shape) != 3:
            raise InputError(f"image_shape must be (C, H, W), but is {image_shape!r}; a gray image has C = 1.")
        c, h, w = (checks.integer(n, "every size in image_shape", 1) for n in shape)
        self.image_shape: tuple[int, int, int] = (c, h, w)
        self.measurements = measurements

    def _forward(self, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError(f"{type(self).__name__} must define _forward(x).")

    def _normal(self, x: torch.Tensor) -> torch.Tensor:
        return self._adjoint(self._forward(x))

    def _correct(self, z: torch.Tensor, y: torch.Tensor, weight: Gamma) -> torch.Tensor:
        """`z + weight A^T (y - A z)`."""
        return z + weight * self._adjoint(y - self._forward(z))

    def _adjoint(self, y: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError(f"{type(self).__name__} must define _adjoint(y).")

    @full_precision
    def A(self, x: torch.Tensor) -> torch.Tensor:
        """`A x`, `[B, C, H, W] -> [B, m]`."""
        return self._forward(self._here(checks.images(x, "x", self.image_shape), "x"))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`A x`."""
        return self.A(x)

    @full_precision
    def A_adjoint(self, y: torch.Tensor) -> torch.Tensor:
        """`A^T y`, `[B, m] -> [B, C, H, W]`."""
        return self._adjoint(self._here(checks.vectors(y, self.measurements), "y"))

    def _here(self, t: torch.Tensor, name: str) -> torch.Tensor:
        """Check that `t` is on the device of the operator's buffers; return it."""
        device = next((b.device for b in self._buffers.values() if b is not None), None)
        if device is None:
            device = next((b.device for b in self.buffers()), t.device)
        if t.device != device:
            raise InputError(
                f"{name} must be on the operator's device {device}, but is on {t.device}; "
                f"move one of them with .to({str(device)!r})."
            )
        return t

    @full_precision
    def normal(self, x: torch.Tensor) -> torch.Tensor:
        """`A^T A x`."""
        return self._normal(self._here(checks.images(x, "x", self.image_shape), "x"))

    @full_precision
    def A_dagger(self, y: torch.Tensor) -> torch.Tensor:
        """The minimum-norm solution `A^T (A A^T)^{-1} y`; with `gram_scale = c` it is `A^T y / c`."""
        if self.gram_scale is None:
            raise InputError(f"{type(self).__name__} must define A_dagger or declare gram_scale to start a recovery.")
        return self.A_adjoint(y) / self.gram_scale

    @property
    def has_shifted_inverse(self) -> bool:
        """Whether `shifted_inverse` has a closed form."""
        return self.gram_scale is not None

    @full_precision
    def shifted_inverse(self, v: torch.Tensor, c: Gamma) -> torch.Tensor:
        """`(A^T A + c I)^{-1} v`, `c > 0` a number or `[B]`: `(v - A^T A v / (g + c)) / c` with `A A^T = g I`."""
        if self.gram_scale is None:
            raise InputError(
                f"{type(self).__name__} has no closed form of shifted_inverse; ask has_shifted_inverse first."
            )
        s = _per_image(c, checks.images(v, "v", self.image_shape), "c", zero=False)
        return (v - self.normal(v) / (self.gram_scale + s)) / s

    @full_precision
    def prox_l2(self, z: torch.Tensor, y: torch.Tensor, gamma: Gamma) -> torch.Tensor:
        """`argmin_x 1/2||x - z||^2 + gamma/2 ||y - A x||^2`, `gamma >= 0` a number or `[B]`.

        With `A A^T = g I` it is `z + gamma/(1 + gamma g) A^T (y - A z)`; otherwise CG solves
        `(I + gamma A^T A) x = z + gamma A^T y`. An image for which CG fails gets NaN; if all fail, an `InputError` is
        raised.
        """
        self._here(checks.images(z, "z", self.image_shape), "z")
        checks.same_kind(z, checks.vectors(y, self.measurements), "z and y")
        if y.shape[0] != z.shape[0]:
            raise InputError(f"z and y must hold one batch, but hold {len(z)} images and {len(y)} measurements.")
        if self.gram_scale is not None and not isinstance(gamma, torch.Tensor):
            gamma = checks.number(gamma, "gamma", 0.0)
            return self._correct(z, y, gamma / (1.0 + gamma * self.gram_scale))
        g = _per_image(gamma, z, "gamma")
        if self.gram_scale is None:
            return self._prox_by_cg(z, y, g)
        return self._correct(z, y, g / (1.0 + g * self.gram_scale))

    def _prox_by_cg(self, z: torch.Tensor, y: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled() and any(t.requires_grad for t in (z, y, g)):
            raise InputError(
                f"The proximal map of {type(self).__name__} is solved by CG, which autograd does not follow; "
                "detach z, y and gamma, or define prox_l2."
            )
        tolerance = 1e-10 if z.dtype == torch.float64 else 1e-6
        sol = cg(lambda p: p + g * self.normal(p), z + g * self._adjoint(y), CGOptions(500, tolerance), x0=z)
        failed = (sol.residual > 1e-3) & (sol.status != int(Status.NON_FINITE))
        if not bool(failed.any()):
            return sol.x
        if not fails_per_image() and bool(failed.all()):
            raise InputError(
                f"The proximal map of {type(self).__name__} must be solved to 1e-3, but CG stopped at residual "
                f"{float(sol.residual.max()):.1e}; scale the operator to norm one or define prox_l2."
            )
        return torch.where(expand(failed, sol.x), torch.nan, sol.x)

    def capturable(self, like: torch.Tensor) -> bool:
        """Whether the products and closed forms, for images like these, can be captured in a CUDA graph: they do not
        synchronize and were warmed up by a first call. False unless a subclass overrides this."""
        return False

    def signature(self, like: torch.Tensor) -> Signature | None:
        """Everything that recorded products and closed forms depend on besides the images, so that later solves can
        reuse a CUDA graph. None (the default) if it is unknown; a graph then ends with its solve."""
        return None

    def _just(self, kind: type[LinearOperator]) -> bool:
        """Whether this is exactly a `kind`, without replaced methods."""
        return type(self) is kind and not any(callable(getattr(kind, name, None)) for name in vars(self))

    def describe(self) -> dict[str, Any]:
        """The arguments that rebuild this operator, as JSON values, with its registered name under `kind`."""
        raise InputError(f"{type(self).__name__} must define describe() to be written to a file.")

    def fingerprint(self) -> str:
        """SHA-256 of the description and the buffers. Equal operators have equal fingerprints on every platform."""
        digest = hashlib.sha256(json.dumps(self.describe(), sort_keys=True).encode())
        for name, buffer in sorted(self.named_buffers()):
            digest.update(name.encode())
            digest.update(buffer.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()


def _per_image(value: Gamma, like: torch.Tensor, name: str, *, zero: bool = True) -> torch.Tensor:
    """A number or `[B]`, reshaped to broadcast to `like`. A tensor's sign is not checked: that would synchronize."""
    if isinstance(value, torch.Tensor):
        if value.ndim > 1 or (value.ndim == 1 and len(value) not in (1, len(like))):
            raise InputError(
                f"{name} must be one number or one for each of the {len(like)} images, "
                f"but has shape {list(value.shape)}."
            )
        return expand(value.to(dtype=like.dtype, device=like.device).reshape(-1), like)
    value = checks.number(value, name, 0.0, open_low=not zero)
    return torch.full((), value, dtype=like.dtype, device=like.device)


def register(kind: str, cls: type[LinearOperator]) -> None:
    """Register a class for files: `describe()['kind'] == kind`, and the rest are constructor arguments."""
    _REGISTRY[kind] = cls


def from_description(description: dict[str, Any]) -> LinearOperator:
    """Rebuild an operator from the result of `describe()`."""
    kind = description.get("kind") if isinstance(description, dict) else description
    if not isinstance(kind, str) or kind not in _REGISTRY:
        raise InputError(
            f"The operator's kind must be one of {sorted(_REGISTRY)}, but is {kind!r}; "
            "register your class with deepreg_fast.operators.register(kind, cls) first."
        )
    try:
        return _REGISTRY[kind](**{k: v for k, v in description.items() if k != "kind"})
    except TypeError as error:
        raise InputError(f"The description of a {kind!r} operator does not fit its class: {error}.") from error
