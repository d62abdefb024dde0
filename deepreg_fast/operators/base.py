"""Base class and registry of linear operators (docs/math.md, M2)."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import weakref
from collections.abc import Callable, Hashable
from operator import is_
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn

from .. import checks
from ..ambient import full_precision, outside_inference
from ..backend.gpu.graphs import Signature
from ..batched.linalg import expand
from ..errors import InputError
from ..solvers.cg import CGOptions, cg
from ..solvers.lanczos import extreme_eigenvalues
from ..solvers.linear_system import Map
from ..solvers.protocols import fails_per_image
from ..status import Status

_REGISTRY: dict[str, Callable[..., LinearOperator]] = {}
Gamma = float | torch.Tensor
T = TypeVar("T")
_LANCZOS_STEPS = 30
_SMALLEST = 1e-30
_DERIVED = ("_derived", "_transformed")
"""Attributes that are computed from the buffers and stored."""


class LinearOperator(nn.Module):
    """Base class of linear operators from images `[B, C, H, W]` to measurements `[B, *measurement_shape]`.

    A subclass defines `_forward` and `_adjoint`. Everything else follows, by a closed form where there is one
    (docs/math.md, M2):

    * If `A A^T = g I`, the subclass sets `gram_scale = g`.
    * If `(A A^T + c I)^{-1}` has a closed form, it defines `_gram_solve(r, c)` with `c` `[B]` or `[1]`, from which
      `prox_l2`, `shifted_inverse` and `A_dagger` follow.
    * Otherwise CG solves these systems. `_precondition(v, c)`, an approximation of `(A^T A + c I)^{-1} v` that is
      symmetric positive definite, makes it faster.

    Parameters
    ----------
    image_shape : (C, H, W)
    measurements : int or tuple of int
        The shape of the measurements of one image; an integer m means `(m,)`.

    Attributes
    ----------
    image_shape : (C, H, W)
    measurement_shape : tuple of int
    measurements : int
        The number of measurements per image.
    gram_scale : float or None
    batch : int or None
        The number of images for which the operator holds parameters of their own, such as one mask for each image; None
        if all images have the same. The names of those buffers are in `per_image`.

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
    batch: int | None = None
    per_image: tuple[str, ...] = ()

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

    def _gram_solve(self, r: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        """`(A A^T + c I)^{-1} r`, c `[B]` or `[1]`."""
        assert self.gram_scale is not None
        return r / (self.gram_scale + expand(c, r))

    def _shifted_inverse(self, v: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        """`(A^T A + c I)^{-1} v` in closed form, c `[B]` or `[1]`."""
        if self.gram_scale is not None:
            s = expand(c, v)
            return (v - self._normal(v) / (self.gram_scale + s)) / s
        return (v - self._adjoint(self._gram_solve(self._forward(v), c))) / expand(c, v)

    def _prox(self, z: torch.Tensor, y: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
        """`prox_l2` in closed form, gamma `[B]` or `[1]`."""
        if self.gram_scale is not None:
            g = expand(gamma, z)
            return self._correct(z, y, g / (1.0 + g * self.gram_scale))
        return z + self._adjoint(self._gram_solve(y - self._forward(z), 1.0 / gamma))

    def _precondition(self, v: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        """An approximation of `(A^T A + c I)^{-1} v`, symmetric positive definite; c `[B]` or `[1]`."""
        raise NotImplementedError

    # -- products ------------------------------------------------------------------------------------------------------

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

    def sqnorm(self) -> float:
        """`||A||^2`, the largest eigenvalue of `A^T A`: exact where it is known, otherwise an estimate by Lanczos'
        method from below. For an operator with parameters for each image, the largest of all images."""
        return float(self.sqnorms().max())

    def sqnorms(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """`sqnorm` of each image if the operator has parameters for each, `[B]`, otherwise `[1]`; float64, stored.

        An estimate takes products with images of `dtype`; default: that of the first float buffer, otherwise float64.
        """
        buffers = [b for b in self.buffers() if b is not None]
        if dtype is None:
            dtype = next((b.dtype for b in buffers if b.is_floating_point()), torch.float64)
        device = buffers[0].device if buffers else torch.device("cpu")
        return self._derive(("sqnorms", dtype), buffers, lambda: self._square_norms(device, dtype))

    @outside_inference
    @torch.no_grad()
    def _derive(self, key: Hashable, buffers: list[torch.Tensor], compute: Callable[[], T]) -> T:
        """`compute()`, stored under `key` until one of the buffers is replaced or changed."""
        versions = [b._version for b in buffers]
        stored = self.__dict__.setdefault("_derived", {})
        if key in stored:
            # The tensors themselves are compared: a new one may have the address of one that is gone.
            known, known_versions, value = stored[key]
            if len(known) == len(buffers) and all(map(is_, known, buffers)) and known_versions == versions:
                return value
        value = compute()
        stored[key] = list(buffers), versions, value
        return value

    @outside_inference
    @full_precision
    @torch.no_grad()
    def _square_norms(self, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        if self.gram_scale is not None:
            return torch.full((1,), self.gram_scale, dtype=torch.float64, device=device)
        # The same start for every image, so that the result does not depend on an image's place in the batch.
        generator = torch.Generator().manual_seed(0)
        v = torch.randn(self.image_shape, generator=generator, dtype=torch.float64, device="cpu").to(device, dtype)
        largest = extreme_eigenvalues(self.normal, v.expand(self.batch or 1, *v.shape).clone(), _LANCZOS_STEPS)[1]
        if not bool(torch.isfinite(largest).all()):
            raise InputError(
                f"{type(self).__name__} must map finite images to finite measurements, but does not; check its buffers."
            )
        return largest

    # -- closed forms, or CG -------------------------------------------------------------------------------------------

    @property
    def has_shifted_inverse(self) -> bool:
        """Whether `gram_solve`, `shifted_inverse` and `prox_l2` have closed forms."""
        return self.gram_scale is not None or self._defines("_gram_solve")

    def _defines(self, name: str) -> bool:
        """Whether a subclass defines the method."""
        return getattr(type(self), name) is not getattr(LinearOperator, name)

    @property
    def preconditioned(self) -> bool:
        """Whether `precondition` is defined: in closed form, or as an approximation."""
        return self.has_shifted_inverse or self._defines("_precondition")

    @full_precision
    def precondition(self, v: torch.Tensor, c: Gamma) -> torch.Tensor:
        """`(A^T A + c I)^{-1} v`, or an approximation of it that is symmetric positive definite, for use in CG."""
        number = _numbers(c, self._image(v, "v"), "c", zero=False)
        return self._shifted_inverse(v, number) if self.has_shifted_inverse else self._precondition(v, number)

    @full_precision
    def A_dagger(self, y: torch.Tensor) -> torch.Tensor:
        """The minimum-norm solution `A^T (A A^T)^{-1} y`.

        With `gram_scale = g` it is `A^T y / g`. Otherwise it is the limit `A^T (A A^T + c I)^{-1} y`, with c the
        square root of the machine epsilon times `sqnorm()`.
        """
        self._measured(y, "y")
        if self.gram_scale is not None:
            return self.A_adjoint(y) / self.gram_scale
        return self._adjoint(self.gram_solve(y, torch.finfo(y.dtype).eps ** 0.5 * self.sqnorm()))

    @full_precision
    def gram_solve(self, r: torch.Tensor, c: Gamma) -> torch.Tensor:
        """`(A A^T + c I)^{-1} r`, `c > 0` a number or `[B]`."""
        number = _numbers(c, self._measured(r, "r"), "c", zero=False)
        if self.has_shifted_inverse:
            return self._gram_solve(r, number)
        # (A A^T + c I)^{-1} r = (r - A (A^T A + c I)^{-1} A^T r) / c would lose digits for a small c.
        s = expand(number, r)
        return self._by_cg(lambda p: self._forward(self._adjoint(p)) + s * p, r, None, None, "gram_solve")

    @full_precision
    def shifted_inverse(self, v: torch.Tensor, c: Gamma) -> torch.Tensor:
        """`(A^T A + c I)^{-1} v`, `c > 0` a number or `[B]`."""
        number = _numbers(c, self._image(v, "v"), "c", zero=False)
        if self.has_shifted_inverse:
            return self._shifted_inverse(v, number)
        s = expand(number, v)
        preconditioner = (lambda p: self._precondition(p, number)) if self.preconditioned else None
        return self._by_cg(lambda p: self._normal(p) + s * p, v, None, preconditioner, "shifted_inverse")

    @full_precision
    def prox_l2(self, z: torch.Tensor, y: torch.Tensor, gamma: Gamma, x0: torch.Tensor | None = None) -> torch.Tensor:
        """`argmin_x 1/2||x - z||^2 + gamma/2 ||y - A x||^2`, `gamma >= 0` a number or `[B]`.

        With `A A^T = g I` it is `z + gamma/(1 + gamma g) A^T (y - A z)`, with another closed form of `gram_solve`
        `z + A^T (A A^T + I/gamma)^{-1} (y - A z)`. Otherwise CG solves `(I + gamma A^T A) x = z + gamma A^T y` from
        `x0` (default: z). An image for which CG fails gets NaN; if all fail, an `InputError` is raised.
        """
        self._image(z, "z")
        checks.same_kind(z, checks.measured(y, self.measurement_shape), "z and y")
        if y.shape[0] != z.shape[0]:
            raise InputError(f"z and y must hold one batch, but hold {len(z)} images and {len(y)} measurements.")
        if self.gram_scale is not None and not isinstance(gamma, torch.Tensor):
            gamma = checks.number(gamma, "gamma", 0.0)
            return self._correct(z, y, gamma / (1.0 + gamma * self.gram_scale))
        number = _numbers(gamma, z, "gamma")
        if self.has_shifted_inverse:
            return self._prox(z, y, number)
        g = expand(number, z)
        # With gamma = 0 the system is the identity; the preconditioner must not divide by it.
        c = 1.0 / number.clamp_min(_SMALLEST)
        preconditioner = (lambda p: self._precondition(p, c) * expand(c, p)) if self.preconditioned else None
        start = z if x0 is None else x0
        return self._by_cg(
            lambda p: p + g * self._normal(p), z + g * self._adjoint(y), start, preconditioner, "prox_l2"
        )

    def _by_cg(
        self, matvec: Map, b: torch.Tensor, x0: torch.Tensor | None, preconditioner: Map | None, method: str
    ) -> torch.Tensor:
        if torch.is_grad_enabled() and b.requires_grad:
            raise InputError(
                f"{method} of {type(self).__name__} is solved by CG, which autograd does not follow; "
                "detach the tensors, or define a closed form."
            )
        tolerance = 1e-13 if b.dtype == torch.float64 else 1e-6
        with torch.no_grad():
            sol = cg(matvec, b, CGOptions(500, tolerance), x0=x0, preconditioner=preconditioner)
        failed = (sol.residual > 1e-3) & (sol.status != int(Status.NON_FINITE))
        if not bool(failed.any()):
            return sol.x
        if not fails_per_image() and bool(failed.all()):
            raise InputError(
                f"{method} of {type(self).__name__} must be solved to 1e-3, but CG stopped at residual "
                f"{float(sol.residual.max()):.1e}; scale the operator to norm one or define a closed form."
            )
        return torch.where(expand(failed, sol.x), torch.nan, sol.x)

    def _transform_once(
        self, y: torch.Tensor, transform: Callable[[torch.Tensor], torch.Tensor], stamp: object = None
    ) -> torch.Tensor:
        """`transform(y)`, stored while the same tensor y comes again, as in the rounds of a recovery."""
        if type(y) is not torch.Tensor or y.requires_grad or y.is_inference():
            return transform(y)
        reference, key, value = self.__dict__.get("_transformed", (None, None, None))
        if reference is None or reference() is not y or key != (y._version, stamp):
            value = transform(y)
            self.__dict__["_transformed"] = weakref.ref(y), (y._version, stamp), value
        return value

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in _DERIVED}

    # -- parameters for each image -------------------------------------------------------------------------------------

    @outside_inference
    def select(self, idx: torch.Tensor) -> LinearOperator:
        """The operator of the images `idx` `[b]`; this operator itself if its parameters are the same for all images.

        Solvers use it when some images of a batch have ended.
        """
        if self.batch is None:
            return self
        part = copy.copy(self)
        part._buffers = {n: b[idx] if b is not None and n in self.per_image else b for n, b in self._buffers.items()}
        part._modules = {n: m.select(idx) if isinstance(m, LinearOperator) else m for n, m in self._modules.items()}
        part.batch = len(idx)
        return part

    # -- measurements as people see them -------------------------------------------------------------------------------

    def as_image(self, y: torch.Tensor) -> torch.Tensor:
        """Measurements as images `[B, C', H', W']` for display: themselves if they have the shape of an image,
        otherwise the minimum-norm solution."""
        self._measured(y, "y")
        return y if len(self.measurement_shape) == 3 else self.A_dagger(y)

    # -- checks --------------------------------------------------------------------------------------------------------

    def _image(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return self._here(checks.images(x, name, self.image_shape), name)

    def _measured(self, y: torch.Tensor, name: str) -> torch.Tensor:
        return self._here(checks.measured(y, self.measurement_shape, name), name)

    def _here(self, t: torch.Tensor, name: str) -> torch.Tensor:
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

    # -- files ---------------------------------------------------------------------------------------------------------

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

    # -- algebra -------------------------------------------------------------------------------------------------------

    def __matmul__(self, other: LinearOperator) -> LinearOperator:
        """The composition `(A @ B) x = A (B x)`; the measurements of B are images for A."""
        from .algebra import Composition

        return Composition(self, other)

    def __mul__(self, factor: float) -> LinearOperator:
        """`factor A`."""
        from .algebra import Scaled

        return Scaled(self, factor)

    __rmul__ = __mul__


def _numbers(value: Gamma, like: torch.Tensor, name: str, *, zero: bool = True) -> torch.Tensor:
    """A number as `[1]`, or `[B]`, in the dtype of `like`. A tensor's sign is not checked: that would synchronize."""
    if isinstance(value, torch.Tensor):
        if value.ndim > 1 or (value.ndim == 1 and len(value) not in (1, len(like))):
            raise InputError(
                f"{name} must be one number or one for each of the {len(like)} images, "
                f"but has shape {list(value.shape)}."
            )
        return value.to(dtype=like.dtype, device=like.device).reshape(-1)
    value = checks.number(value, name, 0.0, open_low=not zero)
    return torch.full((1,), value, dtype=like.dtype, device=like.device)


def register(kind: str, cls: Callable[..., LinearOperator]) -> None:
    """Register a class (or a function) for files: `describe()['kind'] == kind`, and the rest are its arguments."""
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
