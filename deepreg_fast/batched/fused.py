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
        images_of = _selection(definition, images)

        def kernels(arguments: tuple[Any, ...]) -> object | None:
            tensors = images_of(arguments)
            first = tensors[0]
            kind = (first.shape, first.dtype, first.device)
            if not len(first) or any((t.shape, t.dtype, t.device) != kind for t in tensors[1:]):
                return None
            if in_place and not all(t.is_contiguous() for t in tensors):
                return None
            return backend.vector_kernels(*tensors)

        return _dispatching(definition, kernels)

    return decorate


def decision(definition: Callable[P, R]) -> Fused[P, R]:
    """Decorate a decision on numbers `[B]`: call the kernel named like it of a backend for their device, or itself."""
    return _dispatching(definition, lambda arguments: backend.decision_kernels(next(tensors(arguments))))


def _dispatching(definition: Callable[P, R], kernels: Callable[[tuple[Any, ...]], object | None]) -> Fused[P, R]:
    name, compute = definition.__name__, cast("Callable[..., Any]", definition)

    @wraps(definition)
    def call(*arguments: Any) -> Any:
        # First, so that torch.compile traces the definition alone.
        kernel = None if torch.compiler.is_compiling() else getattr(kernels(arguments), name, None)
        return compute(*arguments) if kernel is None else kernel(*arguments)

    call.definition = definition  # pyright: ignore[reportAttributeAccessIssue]
    return cast("Fused[P, R]", call)


def _selection(definition: Callable[..., Any], names: tuple[str, ...]) -> Callable[[tuple[Any, ...]], list[Any]]:
    """A function from positional arguments to the tensors among those of these names."""
    parameters = signature(definition).parameters
    order = {name: i for i, name in enumerate(parameters)}
    places = [
        slice(order[name], None if parameters[name].kind is Parameter.VAR_POSITIONAL else order[name] + 1)
        for name in names
    ]
    return lambda arguments: [t for place in places for t in tensors(arguments[place])]


def tensors(values: tuple[Any, ...]) -> Iterator[torch.Tensor]:
    """The tensors in nested tuples, in order."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, tuple):
            yield from tensors(value)
