"""Wrapping of a deepinv physics: its products are checked once, and closed forms are detected."""

from __future__ import annotations

from typing import Any

import torch

from ...errors import InputError
from ...operators import LinearOperator
from .native import native_operators
from .parameters import batch_sizes
from .physics_operator import PhysicsOperator

_WORST_ADJOINT = 5e-4
"""The largest relative error of the adjoint."""


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
    for candidate in native_operators(physics, image_shape):
        if candidate.batch == generic.batch and _same_products(candidate, generic, u, Av):
            return candidate
    AtAu = generic._adjoint(Au)
    generic._normal_is_product = _close(
        generic._image_of(physics.A_adjoint_A(generic._deepinv_images(u)), u), AtAu, 1e-4
    )
    if generic.batch is not None:
        _check_selection(generic, u, Au)
    generic.projection_scale = _projection_scale(generic, AtAu)
    if generic.projection_scale is not None and _close(
        generic._forward(generic._adjoint(w)), generic.projection_scale * w
    ):
        generic.gram_scale = generic.projection_scale
    return generic


def _generic(physics: Any, image_shape: tuple[int, int, int]) -> PhysicsOperator:
    """The wrapper, for the number of images and the kind of images that the physics accepts."""
    candidates = [None, *sorted(batch_sizes(physics))]
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


def _same_products(candidate: LinearOperator, generic: PhysicsOperator, u: torch.Tensor, y: torch.Tensor) -> bool:
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
