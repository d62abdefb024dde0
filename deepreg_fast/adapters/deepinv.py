"""deepinv's physics as operators, and operators, regularizers and the recovery as objects of deepinv.

Noise models are left out: a physics here is its forward operator.
"""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any

import torch
from torch import nn

from .. import checks
from ..ambient import outside_inference
from ..autograd import energy, grad
from ..errors import InputError
from ..functional import srm as definition
from ..inverse.adjoint import ImplicitAdjoint, JacobianFree
from ..inverse.layer import recover
from ..operators import SRM, Inpainting, LinearOperator
from ..regularizers.base import as_regularizer
from ..solvers import PGDOptions
from ..status import Status, counts
from .package import base, deepinv, flatten
from .wrapper import tensors, wrap

_KEPT = 4
"""Operators that a `RecoverModel` keeps."""
_ROUNDED = 1e-3
"""The largest residual of a stagnated proximal map that counts as solved."""


def from_deepinv(
    physics: Any, img_size: tuple[int, ...], params: dict[str, torch.Tensor] | None = None
) -> LinearOperator:
    """The operator `A` of a linear deepinv physics `y = N(A x)`; its noise model N is left out.

    A `Blur`, `BlurFFT`, `Downsampling`, `Inpainting`, `Demosaicing` or `Denoising` becomes the `Blur`,
    `SuperResolution` or `Inpainting` with the same products, which has closed forms. Any other physics is called for
    its products, in the dtype of its parameters; CG solves the systems, unless `A A^T` is a multiple of a projection
    (MRI, single-pixel cameras, a change of colors), for which the closed forms are exact. Measurements keep their
    shape; complex numbers become pairs of real ones, and the parts of a `TensorList` are flattened and concatenated.

    The adjoint, linearity and repeatability are checked once with random images. Change no parameter of the physics
    afterwards: call `from_deepinv` again, or give `params`.

    Parameters
    ----------
    physics : deepinv.physics.LinearPhysics
    img_size : (C, H, W)
    params : dict, optional
        Parameters for `physics.update_parameters`, such as `{"mask": mask}`; a copy of the physics gets them. With
        parameters whose first dimension is B > 1, one for each image of a batch of B, `A.batch` is B.

    Returns
    -------
    LinearOperator

    Raises
    ------
    InputError
        If deepinv is missing, or the physics is not a `LinearPhysics`, not linear, random at each call, or its
        `A_adjoint` is not the transpose of A, as that of a tomography by `iradon`.

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
    these need CG and autograd records, deepinv's solvers are used, which it can differentiate.

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


_LinearPhysics: Any = base("physics.LinearPhysics")
_DecomposablePhysics: Any = base("physics.DecomposablePhysics")
_Prior: Any = base("optim.Prior")
_Reconstructor: Any = base("models.Reconstructor")


class _Measured:
    """The shape of measurements in deepinv: an image's, or `[B, 1, 1, m]`."""

    @staticmethod
    def theirs(A: LinearOperator, y: torch.Tensor) -> torch.Tensor:
        return y if len(A.measurement_shape) == 3 else y.flatten(1)[:, None, None]

    @staticmethod
    def ours(A: LinearOperator, y: torch.Tensor) -> torch.Tensor:
        return y.reshape(len(y), *A.measurement_shape)


def _weight(gamma: Any) -> float | torch.Tensor:
    """deepinv's step size, a number or a tensor `[]`, `[B]` or `[B, 1, 1, 1]`, as a number or `[B]`."""
    return gamma.reshape(-1) if isinstance(gamma, torch.Tensor) else float(gamma)


def _point(z: Any, like: torch.Tensor) -> torch.Tensor:
    """deepinv's z, a tensor, a number or None, as images."""
    return z if isinstance(z, torch.Tensor) else torch.full_like(like, 0.0 if z is None else float(z))


class OperatorPhysics(_LinearPhysics):  # pyright: ignore[reportGeneralTypeIssues]
    """The physics of an operator; `to_deepinv` makes it."""

    def __init__(self, A: LinearOperator) -> None:
        super().__init__(img_size=A.image_shape)
        self.operator = A

    def A(self, x: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """`A x`."""
        self.update_parameters(**kwargs)
        return _Measured.theirs(self.operator, self.operator.A(x))

    def A_adjoint(self, y: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """`A^T y`."""
        self.update_parameters(**kwargs)
        return self.operator.A_adjoint(_Measured.ours(self.operator, y))

    def A_adjoint_A(self, x: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """`A^T A x`."""
        self.update_parameters(**kwargs)
        return self.operator.normal(x)

    def prox_l2(self, z: Any, y: torch.Tensor, gamma: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """`argmin_x 1/2||x - z||^2 + gamma/2 ||y - A x||^2`, by the operator; deepinv's solver options have no effect
        unless autograd has to follow CG."""
        if self._recorded(z, y, gamma):
            return super().prox_l2(z, y, gamma, *args, **kwargs)
        v = _Measured.ours(self.operator, y)
        start = z if isinstance(z, torch.Tensor) else _point(z, self.operator.A_adjoint(v))
        return self.operator.prox_l2(start, v, _weight(gamma))

    def A_dagger(self, y: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The minimum-norm solution, by the operator; deepinv's solver options have no effect unless autograd has to
        follow CG."""
        if self._recorded(y):
            return super().A_dagger(y, *args, **kwargs)
        return self.operator.A_dagger(_Measured.ours(self.operator, y))

    def _recorded(self, *values: Any) -> bool:
        """Whether CG would be needed where autograd records."""
        wants = any(isinstance(t, torch.Tensor) and t.requires_grad for t in values)
        return wants and torch.is_grad_enabled() and not self.operator.has_shifted_inverse


class SRMPhysics(_DecomposablePhysics):  # pyright: ignore[reportGeneralTypeIssues]
    """The physics of an `SRM`, `A = U diag(mask) V^T`; `to_deepinv` makes it.

    The SRM's buffers are its own, so that files hold tensors only; `operator` is an SRM with these buffers.
    """

    def __init__(self, A: SRM) -> None:
        d = math.prod(A.image_shape)
        mask = torch.zeros(1, d, dtype=torch.float32, device=A.rows.device)
        mask[0, A.rows] = 1.0
        super().__init__(img_size=A.image_shape, mask=mask, device=A.rows.device)
        self.__dict__["_operator"] = A
        for name in ("rows", "signs", "perm"):
            buffer = getattr(A, name)
            if buffer is not None:
                self.register_buffer(name, buffer)

    @property
    def operator(self) -> SRM:
        """The SRM, on the device of this physics."""
        A: SRM = self.__dict__["_operator"]
        here = {n: b for n, b in self._buffers.items() if n in A._buffers}
        if any(A._buffers[n] is not b for n, b in here.items()):
            A = copy.copy(A)
            A.__dict__ = dict(A.__dict__)
            A._buffers = {**A._buffers, **here}
            self.__dict__["_operator"] = A
        return A

    def update_parameters(self, **kwargs: Any) -> None:
        """As for every physics, but the mask stays: it is that of the rows."""
        if kwargs.get("mask") is not None:
            raise InputError("The mask of an SRM belongs to its rows and cannot be changed; build another SRM.")
        super().update_parameters(**kwargs)

    def A(self, x: torch.Tensor, mask: Any = None, **kwargs: Any) -> torch.Tensor:
        """`A x`."""
        self.update_parameters(mask=mask, **kwargs)
        return _Measured.theirs(self.operator, self.operator.A(x))

    def A_adjoint(self, y: torch.Tensor, mask: Any = None, **kwargs: Any) -> torch.Tensor:
        """`A^T y`."""
        self.update_parameters(mask=mask, **kwargs)
        return self.operator.A_adjoint(_Measured.ours(self.operator, y))

    def A_adjoint_A(self, x: torch.Tensor, mask: Any = None, **kwargs: Any) -> torch.Tensor:
        """`A^T A x`."""
        self.update_parameters(mask=mask, **kwargs)
        return self.operator.normal(x)

    def A_A_adjoint(self, y: torch.Tensor, mask: Any = None, **kwargs: Any) -> torch.Tensor:
        """`A A^T y = y`."""
        return self.A(self.A_adjoint(y, mask, **kwargs))

    def V_adjoint(self, x: torch.Tensor) -> torch.Tensor:
        """`F R x`, `[B, d]`."""
        A, v = self.operator, x.flatten(1)
        v = v if A.perm is None else v[:, A.perm]
        return definition.transform(A, v if A.signs is None else v * A.signs.to(v.dtype))

    def V(self, x: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """`(F R)^T c`, images."""
        A = self.operator
        v = definition.inverse(A, x)
        v = v if A.signs is None else v * A.signs.to(v.dtype)
        v = v if A.perm is None else torch.zeros_like(v).index_copy(1, A.perm, v)
        return v.reshape(-1, *A.image_shape)

    def U(self, x: torch.Tensor) -> torch.Tensor:
        """The coefficients of the rows, `[B, 1, 1, m]`."""
        return x[:, self.operator.rows][:, None, None]

    def U_adjoint(self, x: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Measurements at their rows, zero elsewhere, `[B, d]`."""
        rows = self.operator.rows
        return x.new_zeros(len(x), math.prod(self.operator.image_shape)).index_copy(1, rows, x.flatten(1))

    def prox_l2(self, z: Any, y: torch.Tensor, gamma: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """`z + gamma/(1 + gamma) A^T (y - A z)`."""
        v = _Measured.ours(self.operator, y)
        start = z if isinstance(z, torch.Tensor) else _point(z, self.operator.A_adjoint(v))
        return self.operator.prox_l2(start, v, _weight(gamma))

    def A_dagger(self, y: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """`A^T y`."""
        return self.operator.A_adjoint(_Measured.ours(self.operator, y))


class DeepInvPrior(_Prior):  # pyright: ignore[reportGeneralTypeIssues]
    """A regularizer as a deepinv prior `g(x) = r(x)`, with its gradient and its proximal map.

    `prox(x, gamma) = argmin_u 1/2 ||u - x||^2 + gamma r(u)`, by the solver of `recover`. All three are differentiable
    in x and the parameters of r. Give deepinv's optimizers `g_first=True` where there is the choice: their proximal
    step is then the data term's, as in `recover`.

    Parameters
    ----------
    reg : Regularizer, or an nn.Module that maps images to one energy each
    options : PGDOptions, optional
        Of `prox`; default: at most 500 iterations, tolerance 1e-5, Anderson acceleration.

    Raises
    ------
    InputError
        If deepinv is missing, or `reg` is not a regularizer.

    Warns
    -----
    UserWarning
        If `prox` does not converge for some images.

    Examples
    --------
    >>> import torch, deepreg_fast as dr
    >>> prior, x = dr.DeepInvPrior(dr.TV()), torch.rand(2, 1, 8, 8)
    >>> prior(x).shape, prior.grad(x).shape
    (torch.Size([2]), torch.Size([2, 1, 8, 8]))
    >>> bool((prior.fn(prior.prox(x, gamma=0.1)) < prior.fn(x)).all())
    True
    """

    @outside_inference
    def __init__(self, reg: nn.Module, options: PGDOptions | None = None) -> None:
        super().__init__()
        self.explicit_prior = True
        self.reg = as_regularizer(reg)
        self.options = options or PGDOptions(500, 1e-5, acceleration="anderson")

    def fn(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """`r(x)`, `[B]`; deepinv's further arguments have no effect."""
        return energy(self.reg, x)

    g = fn

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """`r(x)`, `[B]`."""
        return self.fn(x)

    def grad(self, x: torch.Tensor, *args: Any, get_energy: bool = False, **kwargs: Any) -> Any:
        """`grad r(x)`, or `(r(x), grad r(x))` if `get_energy`."""
        return (energy(self.reg, x), grad(self.reg, x)) if get_energy else grad(self.reg, x)

    def prox(self, x: torch.Tensor, *args: Any, gamma: Any = 1.0, **kwargs: Any) -> torch.Tensor:
        """`argmin_u 1/2 ||u - x||^2 + gamma r(u)`, gamma > 0 a number or one per image."""
        mask = torch.ones(x.shape[1:], dtype=torch.bool, device=x.device)
        weight = _weight(gamma)
        if isinstance(weight, torch.Tensor):
            weight = weight.to(x).expand(len(x))
        elif weight == 0.0:
            return x
        u, sol = recover(
            x, Inpainting(mask), self.reg, weight, options=self.options, x0=x.detach(), return_solution=True
        )
        # In float32 an image may stagnate at the rounding of its residual, above the tolerance.
        solved = (sol.status == int(Status.STAGNATED)) & (sol.residual <= _ROUNDED)
        failed = (sol.status != int(Status.CONVERGED)) & ~solved
        if bool(failed.any()):
            warnings.warn(
                f"The proximal map of {int(failed.sum())} of {len(x)} images did not converge "
                f"({counts(sol.status[failed])}); give DeepInvPrior other options.",
                stacklevel=2,
            )
        return u


class RecoverModel(_Reconstructor):  # pyright: ignore[reportGeneralTypeIssues]
    """The recovery as a deepinv reconstructor, `model(y, physics) = argmin_x 1/2 ||y - A x||^2 + mu r(x)`.

    It is differentiable in y, the parameters of r, and mu (`dr.ops.recover`), so that deepinv's `Trainer` and its
    losses, with or without true images, train the regularizer. mu is a parameter through its logarithm, `log_mu`.

    Parameters
    ----------
    reg : Regularizer, or an nn.Module that maps images to one energy each
    mu : float, > 0
    options : PGDOptions, optional
        Of the recovery.
    adjoint : ImplicitAdjoint or JacobianFree, optional
        How the gradient passes through the recovery.
    trainable_mu : bool
        Whether `log_mu` is a parameter; otherwise it is a buffer.

    Raises
    ------
    InputError
        If deepinv is missing or an argument is invalid; when it is called, also for every reason of `from_deepinv`.

    Examples
    --------
    >>> import torch, deepreg_fast as dr
    >>> physics, x = dr.to_deepinv(dr.SRM((1, 8, 8), ratio=0.5)), torch.rand(2, 1, 8, 8)
    >>> model = dr.RecoverModel(dr.Ridge(filters=2, kernel_size=3), mu=0.05)
    >>> (model(physics(x), physics) - x).square().mean().backward()
    >>> bool(model.log_mu.grad != 0)
    True
    """

    @outside_inference
    def __init__(
        self,
        reg: nn.Module,
        mu: float,
        options: PGDOptions | None = None,
        adjoint: ImplicitAdjoint | JacobianFree | None = None,
        trainable_mu: bool = True,
    ) -> None:
        super().__init__()
        self.reg = as_regularizer(reg)
        self.options, self.adjoint = options, adjoint
        value = torch.tensor(math.log(checks.number(mu, "mu", 0.0, open_low=True)), dtype=torch.float32, device="cpu")
        self.log_mu: torch.Tensor
        if checks.boolean(trainable_mu, "trainable_mu"):
            self.log_mu = nn.Parameter(value)
        else:
            self.register_buffer("log_mu", value)
        self.__dict__["_operators"] = []

    @property
    def mu(self) -> torch.Tensor:
        """The weight, `exp(log_mu)`."""
        return self.log_mu.exp()

    def forward(self, y: Any, physics: Any, **kwargs: Any) -> torch.Tensor:
        """Recover the images from deepinv's measurements `y` of `physics`; further arguments have no effect."""
        A = self._operator(y, physics)
        measurements = flatten(y)
        own = measurements.reshape(len(measurements), *A.measurement_shape)
        return recover(own, A, self.reg, self.mu, options=self.options, adjoint=self.adjoint)

    @torch.no_grad()
    def _operator(self, y: Any, physics: Any) -> LinearOperator:
        """The operator of a physics, stored until a parameter of the physics or the shape of its images changes."""
        named = tensors(physics) if isinstance(physics, nn.Module) else {}
        own = tuple((n, t, 0 if t.is_inference() else t._version) for n, t in named.items())
        shape = _shape_of_images(y, physics)
        stored: list[tuple[Any, ...]] = self.__dict__["_operators"]
        for other, size, known, A in stored:
            # The tensors themselves are stored and compared: a new tensor may have the address of one that is gone.
            if other is physics and size == shape and len(known) == len(own):
                if all(a[0] == b[0] and a[1] is b[1] and a[2] == b[2] for a, b in zip(known, own, strict=True)):
                    return A
        A = from_deepinv(physics, shape)
        stored.insert(0, (physics, shape, own, A))
        del stored[_KEPT:]
        return A

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_operators": []}


def _shape_of_images(y: Any, physics: Any) -> tuple[int, ...]:
    if isinstance(physics, (SRMPhysics, OperatorPhysics)):
        return physics.operator.image_shape
    if not hasattr(physics, "A_adjoint"):
        raise InputError(
            f"physics must be a deepinv LinearPhysics, but is {type(physics).__name__}; the recovery is for linear A."
        )
    return tuple(physics.A_adjoint(y).shape[1:])


__all__ = ["DeepInvPrior", "RecoverModel", "from_deepinv", "to_deepinv"]
