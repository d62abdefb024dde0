"""Registration of custom operators with their own derivatives: `torch.ops.deepreg_fast.*`.

`torch.library`'s `register_autograd` has no forward mode and fails under `torch.func`. An `autograd.Function` that is
called from outside breaks the graph of `torch.compile` if it has a `jvp`. So the function is registered as the
operator's kernel at the Autograd dispatch key. There torch treats it like its built-in operators at every level of
`torch.func`, so `compile`, `grad`, `vjp`, `jvp` and their compositions work. vmap has a separate rule.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.autograd.function import Function

_C: Any = torch._C
# The namespace is defined once per process; this object keeps the registrations alive.
LIBRARY = torch.library.Library("deepreg_fast", "DEF")

_ABOVE = [
    key for name, key in _C.DispatchKey.__members__.items() if name.startswith(("Autograd", "FuncTorch", "ADInplace"))
]


def define(schema: str, compute: Callable[..., Any], fake: Callable[..., Any], vmap: Callable[..., Any]) -> Any:
    """Define the operator `schema`: `compute` on CPU and CUDA, `fake` for shapes, `vmap(info, in_dims, *args)`."""
    name = schema.split("(", 1)[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for key in ("CPU", "CUDA"):
        LIBRARY.impl(name, compute, key)
    torch.library.register_fake(f"deepreg_fast::{name}", fake, lib=LIBRARY)
    torch.library.register_vmap(f"deepreg_fast::{name}", vmap, lib=LIBRARY)
    return getattr(torch.ops.deepreg_fast, name).default


def _unchanged(*args: Any) -> tuple[Any, ...]:
    return args


def differentiate(op: Any, function: type[Function], flatten: Callable[..., tuple[Any, ...]] = _unchanged) -> None:
    """Register `function` as the derivative of `op`: `function.apply(*flatten(*args))` equals `op(*args)`.

    `flatten` unpacks lists, in which autograd does not find tensors. `function.forward` calls `op` inside
    `below_autograd()`.
    """
    lists = op._schema.returns[0].type.str() == "List[Tensor]"
    apply = single_level(function)

    def kernel(*args: Any) -> Any:
        if not _level_needs_autograd(args):
            with _C._AutoDispatchBelowAutograd():
                return op(*args)
        out = apply(*flatten(*args))
        return list(out) if lists else out

    LIBRARY.impl(op._opname, kernel, "Autograd")


def _level_needs_autograd(args: tuple[Any, ...]) -> bool:
    # Compiled code enters the levels of torch.func without updating forward_ad.
    if forward_ad._current_level >= 0 or _C._are_functorch_transforms_active():
        return True
    return torch.is_grad_enabled() and _C._any_requires_grad(*args)


def single_level(function: type[Function]) -> Callable[..., Any]:
    """`function.apply` at a single level of torch.func, as for torch's built-in operators. For use within an Autograd
    kernel, where the dispatcher iterates over the levels."""
    single: Any = super(Function, function)
    apply = single.apply

    def call(*flat: Any) -> Any:
        before = _C._functorch.get_single_level_autograd_function_allowed()
        _C._functorch.set_single_level_autograd_function_allowed(True)
        mode = _MODE.set(torch.is_grad_enabled())
        try:
            return apply(*flat)
        finally:
            _MODE.reset(mode)
            _C._functorch.set_single_level_autograd_function_allowed(before)

    return call


# Whether autograd was enabled at the call of each running function; torch disables it inside `forward`.
_MODE: ContextVar[bool] = ContextVar("deepreg_fast_grad_mode")


@contextmanager
def below_autograd() -> Iterator[None]:
    """Within this context, an operator dispatches below autograd of this level: to the next level of `torch.func`, with
    the caller's grad mode (torch disables it inside `Function.forward`), or to the computation."""
    with torch.set_grad_enabled(_MODE.get()), forward_ad._set_fwd_grad_enabled(True), _C._AutoDispatchBelowAutograd():
        yield


@contextmanager
def reenable_autograd() -> Iterator[None]:
    """Within this context, autograd and torch.func work inside an operator's `compute`, which runs below them."""
    excluded = _C._dispatch_tls_local_exclude_set()
    for key in _ABOVE:
        excluded = excluded.remove(key)
    with _C._ForceDispatchKeyGuard(_C._dispatch_tls_local_include_set(), excluded), torch.no_grad():
        yield


def differentiate_linear(op: Any, transpose: Callable[[Any], Any]) -> None:
    """Register the derivatives of an operator `op(t, which, *constants)` that is linear in t: the tangent is the
    operator itself, the cotangent the operator `transpose(which)`. So every order of derivative is defined."""

    class LinearProduct(Function):
        @staticmethod
        def forward(*args: Any) -> torch.Tensor:
            with below_autograd():
                return op(*args)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
            _, ctx.which, *constants = inputs
            tensors = [c if isinstance(c, torch.Tensor) else None for c in constants]
            ctx.constants = [None if isinstance(c, torch.Tensor) else c for c in constants]
            ctx.save_for_backward(*tensors)
            ctx.save_for_forward(*tensors)
            ctx.set_materialize_grads(False)

        @staticmethod
        def backward(ctx: Any, *cotangents: Any) -> Any:
            (c,) = cotangents
            grad = None if c is None else op(c, transpose(ctx.which), *constants_of(ctx))
            return grad, None, *[None] * len(ctx.constants)

        @staticmethod
        def jvp(ctx: Any, t: torch.Tensor | None, *rest: Any) -> Any:
            return None if t is None else op(t, ctx.which, *constants_of(ctx))

    def constants_of(ctx: Any) -> list[Any]:
        return [c if t is None else t for t, c in zip(ctx.saved_tensors, ctx.constants, strict=True)]

    differentiate(op, LinearProduct)


def fold_vmap_dim(t: torch.Tensor, dim: int | None, size: int) -> torch.Tensor:
    """Fold the mapped dimension `dim` (None: not mapped) of length `size` into the batch: `[size B, ...]`."""
    expanded = t.expand(size, *t.shape) if dim is None else t.movedim(dim, 0)
    return expanded.flatten(0, 1)


def unfold_vmap_dim(t: torch.Tensor, size: int) -> torch.Tensor:
    """The inverse of `fold_vmap_dim`: `[size B, ...]` as `[size, B, ...]`."""
    return t.unflatten(0, (size, t.shape[0] // size))


def loop_vmap(op: Any, size: int, in_dims: tuple[Any, ...], args: tuple[Any, ...]) -> tuple[Any, Any]:
    """vmap as a loop over the mapped dimension."""

    def pick(arg: Any, dim: Any, i: int) -> Any:
        if isinstance(arg, (list, tuple)):
            dims = dim if isinstance(dim, (list, tuple)) else [dim] * len(arg)
            return [pick(a, d, i) for a, d in zip(arg, dims, strict=True)]
        return arg.select(dim, i) if isinstance(arg, torch.Tensor) and dim is not None else arg

    outs = [op(*(pick(a, d, i) for a, d in zip(args, in_dims, strict=True))) for i in range(size)]
    if isinstance(outs[0], torch.Tensor):
        return torch.stack(outs), 0
    stacked = [torch.stack(parts) for parts in zip(*outs, strict=True)]
    return (tuple(stacked), (0,) * len(stacked)) if isinstance(outs[0], tuple) else (stacked, [0] * len(stacked))
