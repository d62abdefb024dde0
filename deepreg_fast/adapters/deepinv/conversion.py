"""Conversion between deepinv's linear physics and operators."""

from __future__ import annotations

from typing import Any

import torch

from ... import checks
from ...errors import InputError
from ...operators import SRM, LinearOperator
from .package import deepinv
from .physics import OperatorPhysics, SRMPhysics
from .wrap import wrap


def from_deepinv(
    physics: Any, img_size: tuple[int, ...], params: dict[str, torch.Tensor] | None = None
) -> LinearOperator:
    """The operator `A` of a linear deepinv physics `y = N(A x)`; its noise model N is left out.

    A `Blur`, `BlurFFT`, `Downsampling`, `Inpainting`, `Demosaicing` or `Denoising` becomes the `Blur`,
    `SuperResolution` or `Inpainting` with the same products, which has closed forms. Any other physics is called for
    its products, in the dtype of its parameters; CG solves the systems, unless `A A^T` is a multiple of a projection
    (MRI, single-pixel cameras, a change of colors), for which the closed forms are exact. Measurements keep their
    shape; complex numbers become pairs of real ones, and the parts of a `TensorList` are flattened and concatenated.

    The adjoint, linearity and repeatability are checked once with random images. Do not change the physics afterwards;
    call `from_deepinv` again, or pass `params`.

    Parameters
    ----------
    physics : deepinv.physics.LinearPhysics
    img_size : (C, H, W)
    params : dict, optional
        Parameters for `physics.update_parameters`, such as `{"mask": mask}`; they are set in a copy of the physics.
        With parameters whose first dimension is B > 1, one for each image of a batch of B, `A.batch` is B.

    Returns
    -------
    LinearOperator

    Raises
    ------
    InputError
        If deepinv is missing, or the physics is not a `LinearPhysics`, not linear, random at each call, or its
        `A_adjoint` is not the transpose of A, as in a tomography that uses `iradon`.

    Examples
    --------
    >>> import torch, deepinv, deepreg_fast as dr
    >>> physics = deepinv.physics.BlurFFT((1, 16, 16), filter=torch.full((1, 1, 3, 3), 1 / 9))
    >>> A = dr.from_deepinv(physics, (1, 16, 16))
    >>> x = torch.rand(2, 1, 16, 16)
    >>> type(A).__name__, torch.allclose(A.A(x), physics.A(x), atol=1e-6)
    ('Blur', True)
    """
    kinds = deepinv().physics
    if not isinstance(physics, kinds.LinearPhysics):
        raise InputError(
            f"physics must be a deepinv LinearPhysics, but is {type(physics).__name__}; the recovery is for linear A."
        )
    shape = LinearOperator(tuple(img_size), 1).image_shape  # type: ignore[arg-type]
    if params:
        physics = physics.clone()
        unknown = sorted(n for n in params if not hasattr(physics, n))
        if unknown:
            raise InputError(f"params must be parameters of {type(physics).__name__}, but it has no {unknown}.")
        with torch.no_grad():
            physics.update_parameters(**params)
    if isinstance(physics, (SRMPhysics, OperatorPhysics)):
        A = physics.operator
        if A.image_shape != shape:
            raise InputError(f"img_size must be that of the operator, {A.image_shape}, but is {shape}.")
        return A
    return wrap(physics, shape)


def to_deepinv(A: LinearOperator, noise_sigma: float = 0.0) -> Any:
    """The deepinv physics `y = A x + e`, `e ~ N(0, noise_sigma^2)`, of an operator.

    An `SRM` becomes a `DecomposablePhysics` with `V^T = F R` and the indicator of the rows as mask. Any other operator
    becomes a `LinearPhysics` whose `A`, `A_adjoint`, `A_adjoint_A`, `prox_l2` and `A_dagger` are those of `A`; where
    these need CG and autograd is recording, deepinv's differentiable solvers are used instead.

    Parameters
    ----------
    A : LinearOperator
    noise_sigma : float, >= 0
        Standard deviation of Gaussian noise; zero for none.

    Returns
    -------
    deepinv.physics.LinearPhysics
        Its measurements are those of `A` if they have the shape of an image, otherwise `[B, 1, 1, m]`, since deepinv
        expects four dimensions.

    Raises
    ------
    InputError
        If deepinv is missing, or an argument is invalid.

    Examples
    --------
    >>> import torch, deepreg_fast as dr
    >>> physics = dr.to_deepinv(dr.SRM((1, 16, 16), ratio=0.25), noise_sigma=0.05)
    >>> physics(torch.rand(2, 1, 16, 16)).shape
    torch.Size([2, 1, 1, 64])
    """
    package = deepinv()
    if not isinstance(A, LinearOperator):
        raise InputError(f"A must be a deepreg_fast operator such as SRM or Blur, but is {type(A).__name__}.")
    sigma = checks.number(noise_sigma, "noise_sigma", 0.0)
    physics = SRMPhysics(A) if type(A) is SRM else OperatorPhysics(A)
    if sigma > 0:
        physics.set_noise_model(package.physics.GaussianNoise(sigma))
    return physics
