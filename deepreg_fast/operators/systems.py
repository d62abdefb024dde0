"""The linear systems of operators without closed forms, solved by CG."""

from __future__ import annotations

import torch

from .. import checks
from ..batched.linalg import expand
from ..errors import InputError
from ..solvers.cg import CGOptions, cg
from ..solvers.linear_system import Map
from ..solvers.protocols import fails_per_image
from ..status import Status

Gamma = float | torch.Tensor


def per_image_numbers(value: Gamma, like: torch.Tensor, name: str, *, zero: bool = True) -> torch.Tensor:
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


def solve_by_cg(
    name: str, matvec: Map, b: torch.Tensor, *, x0: torch.Tensor | None = None, preconditioner: Map | None = None
) -> torch.Tensor:
    """Solve `matvec(x) = b` for the method `name`, "method of Class" in messages, to the accuracy of the dtype.

    An image for which CG fails gets NaN. If all fail, an `InputError` is raised, unless a solver handles failed images.
    """
    if torch.is_grad_enabled() and b.requires_grad:
        raise InputError(
            f"{name} is solved by CG, which autograd does not follow; detach the tensors, or define a closed form."
        )
    tolerance = 1e-13 if b.dtype == torch.float64 else 1e-6
    with torch.no_grad():
        sol = cg(matvec, b, CGOptions(500, tolerance), x0=x0, preconditioner=preconditioner)
    failed = (sol.residual > 1e-3) & (sol.status != int(Status.NON_FINITE))
    if not bool(failed.any()):
        return sol.x
    if not fails_per_image() and bool(failed.all()):
        raise InputError(
            f"{name} must be solved to 1e-3, but CG stopped at residual {float(sol.residual.max()):.1e}; "
            "scale the operator to norm one or define a closed form."
        )
    return torch.where(expand(failed, sol.x), torch.nan, sol.x)
