"""The conv chain's energy and gradient as PyTorch custom operators, with the derivatives that its kernels implement.

`chain_value_grad(x, params) = (r, g)`, `g = grad r(x)`; `chain_vjp(x, v, params) = (H v, d/dtheta <g, v>)`; and
`chain_tangent(x, params, t) = (dr/dtheta t, dg/dtheta t)`:

- Sweeps of the backend's kernels compute the derivatives of `r` in x (`g`), of `g` in x (`H`) and of `g` in theta (the
  mixed derivative).
- The PyTorch definition computes the derivative of `r` in theta (training on the energy's value) and tangents in theta,
  for which there are no kernels.
- The products are linear in `v` and `t`. Their derivatives in x and theta would be third derivatives, which raise an
  `InputError`.

Reverse mode at one x saves the linearization in autograd's graph, so further products cost one sweep each, as those of
`linearize(x)`. In compiled code and under `torch.func` every product linearizes again (one more sweep). vmap over
images folds them into the batch; vmap over parameters, or of the parameters' products, is a loop.

A call took 0.4 ms more than `reg.value_and_grad`, and 0.5 ms more with autograd (one busy CPU core, torch 2.13).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, fields
from typing import Any

import torch
from torch.autograd.function import Function

from .. import backend
from ..ambient import full_precision
from ..batched.linalg import expand
from ..errors import InputError
from ..functional.conv_chain import ConvChainForm, ConvChainSpec, per_image
from .chain_energy import energy_of, pull_back, tangent_in_params, value_in_params
from .chain_energy import linearize as _linearize
from .library import (
    below_autograd,
    define,
    differentiate,
    fold_vmap_dim,
    loop_vmap,
    reenable_autograd,
    unfold_vmap_dim,
)
from .third_derivative import THIRD_DERIVATIVE, no_third_derivative_of

# The operators take the fields of a `ConvChainSpec` as their last arguments.
_SPEC_SCHEMA = ", ".join(f"{field.type} {field.name}" for field in fields(ConvChainSpec))

Tensors = Sequence[torch.Tensor]


def value_and_grad(form: ConvChainForm, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`r(x_b)` `[B]` and `grad r(x_b)`, differentiable."""
    spec = form.spec
    return _value_grad(x, form.parameters(), spec.head, spec.norm, spec.alpha, spec.center, spec.gain, spec.eps)


@full_precision
def _compute_value_grad(x: torch.Tensor, params: list[torch.Tensor], *tail: Any) -> tuple[torch.Tensor, torch.Tensor]:
    if x.shape[0] == 0:
        return _fake_value_grad(x)
    energy, x = energy_of(ConvChainSpec(*tail), params), x.detach()
    with reenable_autograd():
        value, grad = backend.select(energy, x).value_and_grad(energy, x)
    return value, grad.contiguous()


def _fake_value_grad(x: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape[0]), x.new_empty(x.shape)


def _vmap_value_grad(info: Any, in_dims: tuple[Any, ...], x: torch.Tensor, params: list[Any], *tail: Any) -> Any:
    if _mapped(in_dims[1]):
        return loop_vmap(_value_grad, info.batch_size, in_dims, (x, params, *tail))
    value, grad = _value_grad(fold_vmap_dim(x, in_dims[0], info.batch_size), params, *tail)
    return (unfold_vmap_dim(value, info.batch_size), unfold_vmap_dim(grad, info.batch_size)), (0, 0)


def _mapped(dims: Any) -> bool:
    return any(d is not None for d in dims) if isinstance(dims, (list, tuple)) else dims is not None


@full_precision
def _compute_vjp(
    x: torch.Tensor, v: torch.Tensor, params: list[torch.Tensor], in_x: bool, in_params: bool, *tail: Any
) -> list[torch.Tensor]:
    if x.shape[0] == 0:
        return [torch.zeros_like(t) for t in _fake_vjp(x, v, params, in_x, in_params)]
    with reenable_autograd():
        lin, names = _linearize(ConvChainSpec(*tail), x, params)
        parts = pull_back(lin, names, v.detach(), in_x, in_params)
    return [t.contiguous() for t in parts]


def _fake_vjp(
    x: torch.Tensor, v: torch.Tensor, params: list[torch.Tensor], in_x: bool, in_params: bool, *tail: Any
) -> list[torch.Tensor]:
    return [t.new_empty(t.shape) for t in ([x] if in_x else []) + (list(params) if in_params else [])]


def _vmap_vjp(  # noqa: PLR0913 - the operation's arguments
    info: Any, in_dims: tuple[Any, ...], x: Any, v: Any, params: list[Any], in_x: bool, in_params: bool, *tail: Any
) -> Any:
    if in_params or _mapped(in_dims[2]):
        return loop_vmap(_vjp, info.batch_size, in_dims, (x, v, params, in_x, in_params, *tail))
    folded = [fold_vmap_dim(t, d, info.batch_size) for t, d in zip((x, v), in_dims[:2], strict=True)]
    return [unfold_vmap_dim(t, info.batch_size) for t in _vjp(*folded, params, in_x, in_params, *tail)], [0] * int(in_x)


def _flat_value_grad(x: torch.Tensor, params: list[torch.Tensor], *tail: Any) -> tuple[Any, ...]:
    return ConvChainSpec(*tail), x, *params


class _ValueGrad(Function):
    """`(r, g)`."""

    @staticmethod
    def forward(spec: ConvChainSpec, x: torch.Tensor, *params: torch.Tensor) -> Any:
        with below_autograd():
            return _value_grad(x, list(params), *astuple(spec))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.spec, x, *params = inputs
        ctx.save_for_backward(x, output[1], *params)
        ctx.save_for_forward(x, output[1], *params)
        ctx.set_materialize_grads(False)
        ctx.linearized = None

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        w, v = cotangents
        x, grad, *params = ctx.saved_tensors
        _, in_x, *needs_params = ctx.needs_input_grad
        indices = [i for i, needed in enumerate(needs_params) if needed]
        terms: list[list[Any]] = []
        if w is not None:
            by_params = value_in_params(ctx.spec, x, w, params, indices) if indices else [None] * len(params)
            terms.append([expand(w, grad) * grad if in_x else None, *by_params])
        if v is not None:
            parts = _products(ctx, x, v, params, bool(indices))
            terms.append(
                [
                    parts[0] if in_x else None,
                    *(parts[1 + i] if needed else None for i, needed in enumerate(needs_params)),
                ]
            )
        total = [_sum(parts) for parts in zip(*terms, strict=True)]
        return None, *(total or [None] * (1 + len(params)))

    @staticmethod
    def jvp(ctx: Any, _: Any, tx: torch.Tensor | None, *tangents: Any) -> Any:
        x, grad, *params = ctx.saved_tensors
        value, gradient = [], []
        if tx is not None:
            value.append(per_image(grad * tx))
            gradient.append(_vjp(x, tx, params, True, False, *astuple(ctx.spec))[0])
        if any(t is not None for t in tangents):
            by_value, by_grad = _tangent(x, params, _filled(tangents, params), *astuple(ctx.spec))
            value.append(by_value)
            gradient.append(by_grad)
        return _sum(value), _sum(gradient)


def _products(ctx: Any, x: torch.Tensor, v: torch.Tensor, params: Tensors, in_params: bool) -> list[Any]:
    """`H v` (None if not needed) and, with `in_params`, the parameters' products."""
    in_x = ctx.needs_input_grad[1]
    if any(map(backend.needs_autograd, (x, v, *params))):
        parts = _vjp(x, v, list(params), in_x, in_params, *astuple(ctx.spec))
    else:
        if ctx.linearized is None:
            ctx.linearized = _linearize(ctx.spec, x, params)
        lin, names = ctx.linearized
        parts = pull_back(lin, names, v, in_x, in_params)
    return ([] if in_x else [None]) + list(parts)


def _filled(tangents: Sequence[torch.Tensor | None], params: Tensors) -> list[torch.Tensor]:
    return [torch.zeros_like(p) if t is None else t for t, p in zip(tangents, params, strict=True)]


def _sum(terms: Sequence[Any]) -> Any:
    present = [t for t in terms if t is not None]
    return sum(present[1:], start=present[0]) if present else None


def _flat_vjp(
    x: torch.Tensor, v: torch.Tensor, params: list[torch.Tensor], in_x: bool, in_params: bool, *tail: Any
) -> tuple[Any, ...]:
    return ConvChainSpec(*tail), in_x, in_params, no_third_derivative_of(x), v, *map(no_third_derivative_of, params)


class _Vjp(Function):
    """`(H v, d/dtheta <g, v>)`, linear in v."""

    @staticmethod
    def forward(spec: ConvChainSpec, in_x: bool, in_params: bool, x: Any, v: Any, *params: torch.Tensor) -> Any:
        with below_autograd():
            return tuple(_vjp(x, v, list(params), in_x, in_params, *astuple(spec)))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.spec, ctx.in_x, ctx.in_params, x, _, *params = inputs
        ctx.save_for_backward(x, *params)
        ctx.save_for_forward(x, *params)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        x, *params = ctx.saved_tensors
        terms = []
        if ctx.in_x and cotangents[0] is not None:
            terms.append(_vjp(x, cotangents[0], params, True, False, *astuple(ctx.spec))[0])
        of_params = cotangents[int(ctx.in_x) :]
        if any(c is not None for c in of_params):
            tangents = _filled(of_params, params)
            terms.append(_tangent(x, params, tangents, *astuple(ctx.spec))[1])
        return None, None, None, None, _sum(terms), *[None] * len(params)

    @staticmethod
    def jvp(ctx: Any, _o: Any, _x: Any, _p: Any, tx: Any, tv: Any, *tangents: Any) -> Any:
        x, *params = ctx.saved_tensors
        if tx is not None or any(t is not None for t in tangents):
            raise InputError(THIRD_DERIVATIVE)
        return tuple(_vjp(x, tv, params, ctx.in_x, ctx.in_params, *astuple(ctx.spec)))


@full_precision
def _compute_tangent(x: torch.Tensor, params: list[torch.Tensor], tangents: list[torch.Tensor], *tail: Any) -> Any:
    with reenable_autograd():
        detached = [[t.detach() for t in group] for group in (params, tangents)]
        value, grad = tangent_in_params(ConvChainSpec(*tail), x.detach(), *detached)
    return value.contiguous(), grad.contiguous()


def _vmap_tangent(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
    return loop_vmap(_tangent, info.batch_size, in_dims, args)


def _flat_tangent(x: torch.Tensor, params: list[torch.Tensor], tangents: list[torch.Tensor], *tail: Any) -> Any:
    return ConvChainSpec(*tail), no_third_derivative_of(x), *map(no_third_derivative_of, params), *tangents


class _Tangent(Function):
    """`(dr/dtheta t, dg/dtheta t)`, linear in t: the transpose of the derivatives in the parameters."""

    @staticmethod
    def forward(spec: ConvChainSpec, x: torch.Tensor, *rest: torch.Tensor) -> Any:
        with below_autograd():
            return _tangent(x, list(rest[: len(rest) // 2]), list(rest[len(rest) // 2 :]), *astuple(spec))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.spec, x, *rest = inputs
        ctx.save_for_backward(x, *rest[: len(rest) // 2])
        ctx.save_for_forward(x, *rest[: len(rest) // 2])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        x, *params = ctx.saved_tensors
        w, v = cotangents
        terms = []
        if w is not None:
            terms.append(value_in_params(ctx.spec, x, w, params, list(range(len(params)))))
        if v is not None:
            terms.append(_vjp(x, v, params, False, True, *astuple(ctx.spec)))
        total = [_sum(parts) for parts in zip(*terms, strict=True)]
        return None, None, *[None] * len(params), *(total or [None] * len(params))

    @staticmethod
    def jvp(ctx: Any, _: Any, tx: Any, *rest: Any) -> Any:
        x, *params = ctx.saved_tensors
        if tx is not None or any(t is not None for t in rest[: len(params)]):
            raise InputError(THIRD_DERIVATIVE)
        return _tangent(x, params, _filled(rest[len(params) :], params), *astuple(ctx.spec))


_value_grad = define(
    f"chain_value_grad(Tensor x, Tensor[] params, {_SPEC_SCHEMA}) -> (Tensor, Tensor)",
    _compute_value_grad,
    _fake_value_grad,
    _vmap_value_grad,
)
_vjp = define(
    f"chain_vjp(Tensor x, Tensor v, Tensor[] params, bool in_x, bool in_params, {_SPEC_SCHEMA}) -> Tensor[]",
    _compute_vjp,
    _fake_vjp,
    _vmap_vjp,
)
_tangent = define(
    f"chain_tangent(Tensor x, Tensor[] params, Tensor[] tangents, {_SPEC_SCHEMA}) -> (Tensor, Tensor)",
    _compute_tangent,
    _fake_value_grad,
    _vmap_tangent,
)
differentiate(_value_grad, _ValueGrad, _flat_value_grad)
differentiate(_vjp, _Vjp, _flat_vjp)
differentiate(_tangent, _Tangent, _flat_tangent)
