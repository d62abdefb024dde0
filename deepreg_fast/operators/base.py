"""The base class of linear operators (docs/math.md, M2)."""

from __future__ import annotations

import copy
import hashlib
import json
from typing import Any

import torch

from .. import checks
from ..ambient import full_precision, outside_inference
from ..batched.linalg import expand
from ..errors import InputError
from ..solvers.lanczos import extreme_eigenvalues
from ..solvers.linear_system import Map
from .products import Products
from .registry import from_description, register
from .systems import Gamma, per_image_numbers, solve_by_cg

_LANCZOS_STEPS = 30
_SMALLEST = 1e-30


class LinearOperator(Products):
    """Base class of linear operators from images `[B, C, H, W]` to measurements `[B, *measurement_shape]`.

    A subclass defines `_forward` and `_adjoint`. Everything else follows, in closed form if there is one
    (docs/math.md, M2):

    * If `A A^T = g I`, the subclass sets `gram_scale = g`. If `A A^T = g P` with a projection P, it sets
      `projection_scale = g`.
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
    gram_scale, projection_scale : float or None
    batch : int or None
        The number of images for which the operator has separate parameters, such as one mask per image; None if all
        images share them. `per_image` has the names of the separate buffers.

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
    projection_scale: float | None = None
    per_image: tuple[str, ...] = ()

    # -- closed forms --------------------------------------------------------------------------------------------------

    def _scale(self) -> float | None:
        """g if `A A^T` is g times the identity or a projection: then `A^T (A A^T + c I)^{-1} = A^T / (g + c)`."""
        return self.projection_scale if self.gram_scale is None else self.gram_scale

    def _gram_solve(self, r: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        """`(A A^T + c I)^{-1} r`, c `[B]` or `[1]`."""
        s = expand(c, r)
        if self.projection_scale is not None:
            in_range = self._forward(self._adjoint(r)) / self.projection_scale
            return in_range / (self.projection_scale + s) + (r - in_range) / s
        assert self.gram_scale is not None
        return r / (self.gram_scale + s)

    def _shifted_inverse(self, v: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        """`(A^T A + c I)^{-1} v` in closed form, c `[B]` or `[1]`."""
        s, scale = expand(c, v), self._scale()
        if scale is not None:
            return (v - self._normal(v) / (scale + s)) / s
        return (v - self._adjoint(self._gram_solve(self._forward(v), c))) / s

    def _prox(self, z: torch.Tensor, y: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
        """`prox_l2` in closed form, gamma `[B]` or `[1]`."""
        scale = self._scale()
        if scale is not None:
            g = expand(gamma, z)
            return self._correct(z, y, g / (1.0 + g * scale))
        return z + self._adjoint(self._gram_solve(y - self._forward(z), 1.0 / gamma))

    def _precondition(self, v: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        """An approximation of `(A^T A + c I)^{-1} v`, symmetric positive definite; c `[B]` or `[1]`."""
        raise NotImplementedError

    # -- the norm ------------------------------------------------------------------------------------------------------

    def sqnorm(self) -> float:
        """`||A||^2`, the largest eigenvalue of `A^T A`: exact if it is known, otherwise a lower estimate by Lanczos'
        method. For an operator with parameters for each image, the maximum over the images."""
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
    @full_precision
    @torch.no_grad()
    def _square_norms(self, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        scale = self._scale()
        if scale is not None:
            return torch.full((1,), scale, dtype=torch.float64, device=device)
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
        return self._scale() is not None or self._defines("_gram_solve")

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
        number = per_image_numbers(c, self._image(v, "v"), "c", zero=False)
        return self._shifted_inverse(v, number) if self.has_shifted_inverse else self._precondition(v, number)

    @full_precision
    def A_dagger(self, y: torch.Tensor) -> torch.Tensor:
        """The minimum-norm solution `A^T (A A^T)^{-1} y`.

        With `gram_scale` or `projection_scale` g it is `A^T y / g`. Otherwise it is approximated by
        `A^T (A A^T + c I)^{-1} y`, with c the square root of the machine epsilon times `sqnorm()`.
        """
        self._measured(y, "y")
        scale = self._scale()
        if scale is not None:
            return self.A_adjoint(y) / scale
        return self._adjoint(self.gram_solve(y, torch.finfo(y.dtype).eps ** 0.5 * self.sqnorm()))

    @full_precision
    def gram_solve(self, r: torch.Tensor, c: Gamma) -> torch.Tensor:
        """`(A A^T + c I)^{-1} r`, `c > 0` a number or `[B]`."""
        number = per_image_numbers(c, self._measured(r, "r"), "c", zero=False)
        if self.has_shifted_inverse:
            return self._gram_solve(r, number)
        # (A A^T + c I)^{-1} r = (r - A (A^T A + c I)^{-1} A^T r) / c would lose digits for a small c.
        s = expand(number, r)
        return self._by_cg("gram_solve", lambda p: self._forward(self._adjoint(p)) + s * p, r)

    @full_precision
    def shifted_inverse(self, v: torch.Tensor, c: Gamma) -> torch.Tensor:
        """`(A^T A + c I)^{-1} v`, `c > 0` a number or `[B]`."""
        number = per_image_numbers(c, self._image(v, "v"), "c", zero=False)
        if self.has_shifted_inverse:
            return self._shifted_inverse(v, number)
        s = expand(number, v)
        preconditioner = (lambda p: self._precondition(p, number)) if self.preconditioned else None
        return self._by_cg("shifted_inverse", lambda p: self._normal(p) + s * p, v, preconditioner=preconditioner)

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
        number = per_image_numbers(gamma, z, "gamma")
        if self.has_shifted_inverse:
            return self._prox(z, y, number)
        g = expand(number, z)
        # With gamma = 0 the system is the identity; the preconditioner must not divide by it.
        c = 1.0 / number.clamp_min(_SMALLEST)
        preconditioner = (lambda p: self._precondition(p, c) * expand(c, p)) if self.preconditioned else None
        b, start = z + g * self._adjoint(y), z if x0 is None else x0
        return self._by_cg("prox_l2", lambda p: p + g * self._normal(p), b, x0=start, preconditioner=preconditioner)

    def _by_cg(self, method: str, matvec: Map, b: torch.Tensor, **options: Any) -> torch.Tensor:
        return solve_by_cg(f"{method} of {type(self).__name__}", matvec, b, **options)

    # -- parameters for each image -------------------------------------------------------------------------------------

    @outside_inference
    def select(self, idx: torch.Tensor) -> LinearOperator:
        """The operator of the images `idx` `[b]`; this operator itself if its parameters are the same for all images.

        Solvers use it when some images of a batch have finished.
        """
        if self.batch is None:
            return self
        part = copy.copy(self)
        part._buffers = {n: b[idx] if b is not None and n in self.per_image else b for n, b in self._buffers.items()}
        part._modules = {n: m.select(idx) if isinstance(m, LinearOperator) else m for n, m in self._modules.items()}
        part.batch = len(idx)
        return part

    # -- display -------------------------------------------------------------------------------------------------------

    def as_image(self, y: torch.Tensor) -> torch.Tensor:
        """Measurements as images `[B, C', H', W']` for display: themselves if they have the shape of an image,
        otherwise the minimum-norm solution."""
        self._measured(y, "y")
        return y if len(self.measurement_shape) == 3 else self.A_dagger(y)

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


__all__ = ["Gamma", "LinearOperator", "from_description", "register"]
