"""The regularizer's energy and gradient for your own torch code: differentiable, and compiled without a graph break.

`reg.value_and_grad(x)` is detached from any graph, and `reg.energy(x)` runs the PyTorch definition. The functions here
use the backends' kernels, and autograd, `torch.func` and `torch.compile` can trace them. An SRM's `A.A(x)`,
`A.A_adjoint(y)`, `A.normal(x)` and `A.prox_l2(z, y, gamma)` have these properties already. The underlying operators are
`torch.ops.deepreg_fast.srm`, `srm_correct`, `chain_value_grad`, `chain_vjp` and `chain_tangent`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .. import backend, checks
from ..ambient import full_precision
from ..functional.forms import form_of
from . import conv_chain


@full_precision
def value_and_grad(reg: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`r(x_b)` and `grad r(x_b)`, both differentiable in x and in the regularizer's parameters.

    If a backend has kernels (as for `reg.value_and_grad`), both come from one sweep, and the gradient's derivatives are
    sweeps too. Otherwise autograd differentiates the PyTorch definition, to any order (docs/math.md, M8).

    Parameters
    ----------
    reg : Regularizer, or an nn.Module that maps images to one energy each
    x : Tensor `[B, C, H, W]`, float32 or float64

    Returns
    -------
    value : Tensor `[B]`
    grad : Tensor `[B, C, H, W]`

    Raises
    ------
    InputError
        If x is not a batch of images with the dtype and device of the parameters; with kernels, also for a third
        derivative.

    Examples
    --------
    >>> import torch, deepreg_fast as dr
    >>> value, grad = dr.ops.value_and_grad(dr.RED(channels=2), torch.rand(3, 1, 8, 8))
    >>> value.shape, grad.shape
    (torch.Size([3]), torch.Size([3, 1, 8, 8]))
    """
    reg = getattr(reg, "_orig_mod", reg)
    _check(reg, x)
    form = _form(reg, x)
    if form is not None:
        return conv_chain.value_and_grad(form, x)
    energy: Any = getattr(reg, "energy", reg)

    def total(t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        value = energy(t)
        return value.sum(), value

    grad, value = torch.func.grad(total, has_aux=True)(x)
    return value, grad


@full_precision
def energy(reg: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """`r(x_b)`, differentiable in x and in the parameters.

    With kernels, it is twice differentiable in x; the PyTorch definition gives its derivatives in the parameters
    (docs/math.md, M8).

    Parameters
    ----------
    reg : Regularizer, or an nn.Module that maps images to one energy each
    x : Tensor `[B, C, H, W]`, float32 or float64

    Returns
    -------
    Tensor `[B]`

    Raises
    ------
    InputError
        If x is not a batch of images with the dtype and device of the parameters.

    Examples
    --------
    >>> import torch, deepreg_fast as dr
    >>> x = torch.rand(3, 1, 8, 8, requires_grad=True)
    >>> dr.ops.energy(dr.TV(), x).sum().backward()
    >>> x.grad.shape
    torch.Size([3, 1, 8, 8])
    """
    reg = getattr(reg, "_orig_mod", reg)
    _check(reg, x)
    form = _form(reg, x)
    definition: Any = getattr(reg, "energy", reg)
    return definition(x) if form is None else conv_chain.value_and_grad(form, x)[0]


def grad(reg: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """`grad r(x_b)`, differentiable in x and in the parameters.

    With kernels, it is differentiable once in x. A vector-Jacobian product costs a linearization and a sweep; with
    `retain_graph=True`, further products at the same x cost one sweep each (docs/math.md, M8).

    Parameters
    ----------
    reg : Regularizer, or an nn.Module that maps images to one energy each
    x : Tensor `[B, C, H, W]`, float32 or float64

    Returns
    -------
    Tensor `[B, C, H, W]`

    Raises
    ------
    InputError
        As `value_and_grad`.

    Examples
    --------
    >>> import torch, deepreg_fast as dr
    >>> reg, x = dr.RED(channels=2), torch.rand(2, 1, 8, 8)
    >>> torch.allclose(dr.ops.grad(reg, x), reg.value_and_grad(x)[1], atol=1e-6)
    True
    """
    return value_and_grad(reg, x)[1]


def _check(reg: nn.Module, x: torch.Tensor) -> None:
    checks.images(x)
    for p in reg.parameters():
        checks.same_kind(x, p, f"x and the parameters of {type(reg).__name__}")
        break


def _form(reg: Any, x: torch.Tensor) -> conv_chain.ConvChainForm | None:
    """The conv chain for the operators, or None if the PyTorch definition must be differentiated."""
    form = form_of(reg)
    # Under torch.compile, the compiled code looks up the kernels when it runs.
    if not isinstance(form, conv_chain.ConvChainForm) or form.net.norm_place != "before":
        return None
    if torch.compiler.is_compiling():
        return form
    return None if backend.select(reg, x).name == "reference" else form


__all__ = ["energy", "grad", "value_and_grad"]
