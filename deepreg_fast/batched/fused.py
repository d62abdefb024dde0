"""`@fused` and `@decision`: steps defined in PyTorch beside their algorithm. A backend may have kernels of their names.

A kernel has the arguments and results of its definition (`backend/solver_kernels.py` lists all). A vector step reads
memory once; a decision, the scalar logic of a step on numbers `[B]`, is one launch instead of dozens.

Donated arguments are named in the definition's docstring. Results may alias them: a kernel changes them in place, the
definition allocates. They must not share memory with other tensors, and callers must not read them again. Images for
which `active` `[B]` is false keep their values, and their sums are undefined. Numbers `[B]` are float64 and are rounded
to the images' precision before they multiply.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import wraps
from inspect import Parameter, signature
from typing import Any, ParamSpec, Protocol, TypeVar, cast

import torch

from .. import backend

P = ParamSpec("P")
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)


class Fused(Protocol[P, R_co]):
    """A decorated definition. A call runs the kernel if there is one, `definition` always runs PyTorch."""

    @property
    def definition(self) -> Callable[P, R_co]:
        """The definition in PyTorch, as it was before the decoration."""
        ...

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R_co:
        """Positional arguments only."""
        ...


def fused(*images: str, in_place: bool = False) -> Callable[[Callable[P, R]], Fused[P, R]]:
    """Decorate a vector step: call the backend's kernel named like it, or the step itself, its definition.

    `images` names the arguments that are images `[B, ...]`, or tuples of them. A kernel is called if they have the same
    shape, dtype and device, if the batch is not empty and no autograd is involved; with `in_place`, for steps that
    donate arguments, if they are also contiguous.
    """

    def decorate(definition: Callable[P, R]) -> Fused[P, R]:
        name = definition.__name__
        places = _places(definition, images)

        def kernel(arguments: tuple[Any, ...]) -> Callable[..., Any] | None:
            first = _first(arguments[places[0]])
            # Most steps have no kernel on the CPU, so this comes before the other checks.
            implementation = getattr(backend.vector_kernels(first), name, None) if len(first) else None
            if implementation is None:
                return None
            kind = (first.shape, first.dtype, first.device)
            for place in places:
                for t in tensors(arguments[place]):
                    if (t.shape, t.dtype, t.device) != kind or (in_place and not t.is_contiguous()):
                        return None
                    if t is not first and backend.needs_autograd(t):
                        return None
            return implementation

        return _dispatching(definition, kernel)

    return decorate


def decision(definition: Callable[P, R]) -> Fused[P, R]:
    """Decorate a decision on numbers `[B]`: call the kernel named like it of a backend for their device, or itself."""
    name = definition.__name__

    def kernel(arguments: tuple[Any, ...]) -> Callable[..., Any] | None:
        return getattr(backend.decision_kernels(_first(arguments)), name, None)

    return _dispatching(definition, kernel)


def _dispatching(
    definition: Callable[P, R], kernel: Callable[[tuple[Any, ...]], Callable[..., Any] | None]
) -> Fused[P, R]:
    compute = cast("Callable[..., Any]", definition)

    @wraps(definition)
    def call(*arguments: Any) -> Any:
        # First, so that torch.compile traces the definition alone.
        implementation = None if torch.compiler.is_compiling() else kernel(arguments)
        return compute(*arguments) if implementation is None else implementation(*arguments)

    call.definition = definition  # pyright: ignore[reportAttributeAccessIssue]
    return cast("Fused[P, R]", call)


def _places(definition: Callable[..., Any], names: tuple[str, ...]) -> list[int | slice]:
    """Where the arguments of these names are among the positional ones."""
    parameters = signature(definition).parameters
    order = {name: i for i, name in enumerate(parameters)}
    return [
        slice(order[name], None) if parameters[name].kind is Parameter.VAR_POSITIONAL else order[name] for name in names
    ]


def _first(value: Any) -> torch.Tensor:
    """The first tensor in nested tuples."""
    while isinstance(value, tuple):
        value = value[0]
    return value


def tensors(value: Any) -> Iterator[torch.Tensor]:
    """The tensors in nested tuples, in order."""
    if isinstance(value, tuple):
        for part in value:
            yield from tensors(part)
    elif isinstance(value, torch.Tensor):
        yield value
