"""The variants that a module of kernels ships: each kernel with the types and constants of its launches. Also the
arguments on which its machine code does not depend."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from inspect import signature
from typing import Any

import triton


@dataclass(frozen=True)
class Variant:
    """A kernel as it is compiled: types of the arguments by name (`"*fp32"`, `"i32"`), and its constants."""

    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, object]
    num_warps: int
    num_stages: int
    maxnreg: int | None = None
    """Maximum registers per thread; None if the compiler decides."""


def variant(kernel: Any, constexprs: dict[str, Any], types: dict[str, str], num_warps: int, num_stages: int) -> Variant:
    """A variant whose arguments are pointers to float32 unless `types` says otherwise."""
    names = [n for n in kernel.arg_names if n not in constexprs]
    return Variant(kernel, {n: types.get(n, "*fp32") for n in names}, constexprs, num_warps, num_stages)


def unspecialized(*integers: str, anywhere: Iterable[str] | None = ()) -> Callable[[Any], Any]:
    """`triton.jit` for a kernel whose machine code depends neither on these integers nor on the tensors' alignment.

    Triton compiles a kernel again for an integer that is 1 or divisible by 16, and for a tensor that is not aligned to
    16 bytes. Integers that depend on the batch size would cost a compilation for some batches, perhaps inside the
    capture of a CUDA graph. `anywhere`: tensors of which a thread reads single numbers, so that knowing their alignment
    has no benefit; None for all.
    """

    def decorate(function: Any) -> Any:
        # Triton 3.6 rejects constants among the names; annotations are strings here.
        arguments = [n for n, p in signature(function).parameters.items() if "constexpr" not in str(p.annotation)]
        tensors = tuple(arguments if anywhere is None else anywhere)
        jit: Any = triton.jit
        return jit(function, do_not_specialize=integers, do_not_specialize_on_alignment=tensors)

    return decorate
