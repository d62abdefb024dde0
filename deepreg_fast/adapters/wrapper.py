"""A deepinv physics as an operator: its products, checked once, and the closed forms that it turns out to have."""

from __future__ import annotations

import copy
import hashlib
import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..batched.linalg import expand
from ..errors import InputError
from ..operators import Blur, Inpainting, LinearOperator, SuperResolution
from .package import deepinv, flatten

_BOUNDARIES = {"circular": "circular", "valid": "valid", "reflect": "reflect", "zeros": "zero", "constant": "zero"}
_WORST_ADJOINT = 5e-4


class PhysicsOperator(LinearOperator):
    """The products of a deepinv `LinearPhysics` for real images; CG solves the systems.

    If `A A^T` is a multiple `scale` of a projection, every closed form is exact instead, since then
    `A^T (A A^T + c I)^{-1} = A^T / (scale + c)`.
    """

    def __init__(
        self, physics: Any, image_shape: tuple[int, int, int], batch: int | None, complex_images: bool
    ) -> None:
        super().__init__(image_shape, 1)
        self.physics = physics
        self.dtype = dtype_of(physics)
        self.complex_images = complex_images
        self.batch = batch
        self.scale: float | None = None
        self._template: tuple[tuple[torch.Size, bool], ...] | None = None
        self._normal_is_product = True
        # Random images for the checks: another number than any that the physics could have parameters for.
        self._count = batch or next(n for n in range(2, 1000) if n not in _lengths(physics))
        self._learn(physics.A(self._theirs(self.samples(1)[0])))

    def samples(self, count: int, seed: int = 0) -> list[torch.Tensor]:
        """Random normal images, one batch each, in the dtype and on the device of the physics."""
        device = next((b.device for b in tensors(self.physics).values()), torch.device("cpu"))
        generator = torch.Generator().manual_seed(seed)
        size = (count, self._count, *self.image_shape)
        draw = torch.randn(size, generator=generator, dtype=torch.float64, device="cpu")
        return list(draw.to(device, self.dtype or torch.float32))

    def _theirs(self, x: torch.Tensor) -> torch.Tensor:
        if self.dtype is not None and x.dtype != self.dtype:
            name = str(self.dtype).removeprefix("torch.")
            raise InputError(
                f"Images and measurements must be {name}, as {type(self.physics).__name__} computes, but are "
                f"{str(x.dtype).removeprefix('torch.')}; convert them, or the physics with physics.to(torch.float64)."
            )
        return torch.complex(x, torch.zeros_like(x)) if self.complex_images else x

    def _learn(self, y: Any) -> None:
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
        return flatten(self.physics.A(self._theirs(x)))

    def _adjoint(self, y: torch.Tensor) -> torch.Tensor:
        return self._image_of(self.physics.A_adjoint(self._unflatten(y)), y)

    def _normal(self, x: torch.Tensor) -> torch.Tensor:
        if not self._normal_is_product:
            return super()._normal(x)
        return self._image_of(self.physics.A_adjoint_A(self._theirs(x)), x)

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

    @property
    def has_shifted_inverse(self) -> bool:
        """Whether `A A^T` is a multiple of a projection."""
        return self.scale is not None

    @property
    def preconditioned(self) -> bool:
        """As `has_shifted_inverse`."""
        return self.has_shifted_inverse

    def _gram_solve(self, r: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        assert self.scale is not None
        s = expand(c, r)
        inside = self._forward(self._adjoint(r)) / self.scale
        return inside / (self.scale + s) + (r - inside) / s

    def _shifted_inverse(self, v: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        assert self.scale is not None
        s = expand(c, v)
        return (v - self._normal(v) / (self.scale + s)) / s

    def _prox(self, z: torch.Tensor, y: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
        assert self.scale is not None
        g = expand(gamma, z)
        return self._correct(z, y, g / (1.0 + g * self.scale))

    def A_dagger(self, y: torch.Tensor) -> torch.Tensor:
        """The minimum-norm solution."""
        return super().A_dagger(y) if self.scale is None else self.A_adjoint(y) / self.scale

    def sqnorms(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """`||A||^2` of each image if it has parameters for each, else `[1]`; estimated in the physics' dtype."""
        return super().sqnorms(dtype or self.dtype)

    def _square_norms(self, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        if self.scale is not None:
            return torch.full((1,), self.scale, dtype=torch.float64, device=device)
        return super()._square_norms(device, dtype)

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


def tensors(physics: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers of the forward operator by name; those of its noise are left out."""
    named = [*physics.named_parameters(), *physics.named_buffers()]
    skip = ("noise_model.", "sensor_model.")
    return {n: t for n, t in named if not any(s in f"{n}." for s in skip) and not n.endswith("_device_holder")}


def dtype_of(physics: nn.Module) -> torch.dtype | None:
    """The real dtype in which a physics computes; None if it has no parameters in a float dtype."""
    for t in tensors(physics).values():
        if t.is_complex():
            return torch.float64 if t.dtype == torch.complex128 else torch.float32
        if t.dtype in (torch.float32, torch.float64):
            return t.dtype
    return None


def select_images(module: nn.Module, idx: torch.Tensor, batch: int) -> nn.Module:
    """A copy of a physics with the parameters of the images `idx`: those tensors whose first dimension is `batch`."""
    part = copy.copy(module)
    part.__dict__ = dict(module.__dict__)
    part._buffers = {
        n: b[idx] if b is not None and b.ndim > 2 and len(b) == batch else b for n, b in module._buffers.items()
    }
    part._modules = {n: None if m is None else select_images(m, idx, batch) for n, m in module._modules.items()}
    return part


@torch.no_grad()
def wrap(physics: Any, image_shape: tuple[int, int, int]) -> LinearOperator:
    """The operator of a physics: one of this package where its products agree, otherwise a `PhysicsOperator`.

    Raises
    ------
    InputError
        If the physics is not linear, random, or its adjoint is wrong.
    """
    generic = _generic(physics, image_shape)
    u, v = generic.samples(2)
    name = type(physics).__name__
    Au, Av = generic._forward(u), generic._forward(v)
    if not _close(generic._forward(u), Au, 1e-3):
        raise InputError(
            f"{name}.A must be deterministic, but gives other measurements at each call; move the noise to "
            "noise_model, which from_deepinv leaves out, or fix the random parameters."
        )
    if not _close(generic._forward(0.7 * u - 1.3 * v), 0.7 * Au - 1.3 * Av, 1e-3):
        raise InputError(f"{name}.A must be linear, A(a u + b v) = a A(u) + b A(v), but is not; use a LinearPhysics.")
    w = torch.randn(Au.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64, device="cpu").to(Au)
    _check_adjoint(generic, u, Au, [w, Av, Au])
    for candidate in _closed_forms(physics, image_shape):
        if candidate.batch == generic.batch and _same(candidate, generic, u, Av):
            return candidate
    AtAu = generic._adjoint(Au)
    generic._normal_is_product = _close(generic._image_of(physics.A_adjoint_A(generic._theirs(u)), u), AtAu, 1e-4)
    if generic.batch is not None:
        _check_selection(generic, u, Au)
    generic.scale = _projection_scale(generic, AtAu)
    if generic.scale is not None and _close(generic._forward(generic._adjoint(w)), generic.scale * w):
        generic.gram_scale = generic.scale
    return generic


def _lengths(physics: Any) -> set[int]:
    """The numbers of images for which a physics may have parameters of their own."""
    return {len(t) for t in tensors(physics).values() if t.ndim > 2 and len(t) > 1}


def _generic(physics: Any, image_shape: tuple[int, int, int]) -> PhysicsOperator:
    """The wrapper, for the number of images and the kind of images that the physics accepts."""
    candidates = [None, *sorted(_lengths(physics))]
    first: Exception | None = None
    for complex_images in (False, True):
        for batch in candidates:
            try:
                A = PhysicsOperator(physics, image_shape, batch, complex_images)
                A._adjoint(A._forward(A.samples(1)[0]))
            except Exception as error:  # whatever a physics raises for images that it does not fit
                first = first or error
            else:
                return A
    if isinstance(first, InputError) and len(candidates) == 1:
        raise first
    raise InputError(
        f"{type(physics).__name__} must map images of shape {list(image_shape)} to measurements and back, but raises "
        f"{type(first).__name__}: {str(first).splitlines()[0] if str(first) else ''}; is img_size right?"
    ) from first


def _check_adjoint(A: PhysicsOperator, u: torch.Tensor, Au: torch.Tensor, measurements: list[torch.Tensor]) -> None:
    """`<A u, w> = <u, A^T w>` for each w of a list.

    The error is relative to the size that the product has for random vectors, so that a wrong part of the adjoint shows
    in full however many measurements there are.
    """
    worst = 0.0
    for t in measurements:
        back = A._adjoint(t)
        left, right = _dot(Au, t), _dot(u, back)
        size = torch.maximum(_norm(Au) * _norm(t) / Au[0].numel() ** 0.5, left.abs())
        worst = max(worst, float(((left - right).abs() / size.clamp_min(1e-30)).max()))
    if not worst <= _WORST_ADJOINT:
        raise InputError(
            f"{type(A.physics).__name__}.A_adjoint must be the transpose of A, but <A u, w> and <u, A^T w> differ by "
            f"{worst:.1e}; with a wrong adjoint neither the recovery nor its gradients are right. "
            "deepinv.physics.adjoint_function computes the exact one."
        )


def _check_selection(A: PhysicsOperator, u: torch.Tensor, Au: torch.Tensor) -> None:
    """Whether the parameters of one image give its measurements."""
    last = torch.tensor([len(u) - 1], dtype=torch.int64, device=u.device)
    try:
        agrees = _close(A.select(last)._forward(u[last]), Au[last])
    except Exception:  # a physics whose other parameters do not fit one image
        agrees = False
    if not agrees:
        raise InputError(
            f"The parameters of {type(A.physics).__name__} for each of the {len(u)} images cannot be separated; "
            "give every parameter the images' dimension first, or solve the images one by one."
        )


def _projection_scale(A: PhysicsOperator, AtAu: torch.Tensor) -> float | None:
    """s if `(A^T A)^2 u = s A^T A u`, for random u only if `A^T A` is s times a projection."""
    again = A._adjoint(A._forward(AtAu))
    s = float(_dot(again, AtAu).sum() / _dot(AtAu, AtAu).sum().clamp_min(1e-30))
    return s if s > 0 and _close(again, s * AtAu) else None


def _closed_forms(physics: Any, image_shape: tuple[int, int, int]) -> list[LinearOperator]:
    """Operators of this package that a physics should equal, by its class and parameters."""
    kinds = deepinv().physics
    one = torch.ones(1, 1, dtype=torch.float32, device="cpu")

    def blur() -> LinearOperator:
        padding = getattr(physics, "padding", "circular")
        return Blur(image_shape, physics.filter, _BOUNDARIES[padding])

    def downsampling() -> LinearOperator:
        kernel = one if physics.filter is None else physics.filter
        boundary = "circular" if physics.filter is None else _BOUNDARIES[physics.padding]
        return SuperResolution(image_shape, kernel, physics.factor, boundary)

    def inpainting() -> LinearOperator:
        m = physics.mask
        m = m[(None,) * (4 - m.ndim)] if m.ndim < 4 else m
        m = m.expand(len(m), *image_shape)
        return Inpainting(m if len(m) > 1 else m[0])

    def denoising() -> LinearOperator:
        device = physics._device_holder.device
        return Inpainting(torch.ones(image_shape, dtype=torch.bool, device=device))

    makers: list[tuple[Any, Callable[[], LinearOperator]]] = [
        (kinds.Denoising, denoising),
        (kinds.Inpainting, inpainting),
        (kinds.Downsampling, downsampling),
        (kinds.BlurFFT, blur),
        (kinds.Blur, blur),
    ]
    for kind, make in makers:
        if isinstance(physics, kind):
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    return [make()]
            except (InputError, KeyError, RuntimeError):  # another padding, mask or shape: the products of the physics
                return []
    return []


def _same(candidate: LinearOperator, generic: PhysicsOperator, u: torch.Tensor, y: torch.Tensor) -> bool:
    """Whether an operator has the products of the physics, for random u and y."""
    if candidate.measurement_shape != generic.measurement_shape:
        return False
    forward = _close(candidate._forward(u), generic._forward(u), 1e-5)
    return forward and _close(candidate._adjoint(y), generic._adjoint(y), 1e-5)


def _close(a: torch.Tensor, b: torch.Tensor, tolerance: float | None = None) -> bool:
    """Whether a equals b up to the relative error `tolerance` (default: 100 units of the dtype)."""
    if a.shape != b.shape:
        return False
    limit = 100 * torch.finfo(b.dtype).eps if tolerance is None else tolerance
    return bool((a - b).double().norm() <= limit * b.double().norm())


def _dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a.double() * b.double()).flatten(1).sum(1)


def _norm(a: torch.Tensor) -> torch.Tensor:
    return a.double().flatten(1).norm(dim=1)
