"""What a module of kernels ships: each kernel with the types and constants it is launched with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Variant:
    """One kernel as it is compiled: types of the arguments by name (`"*fp32"`, `"i32"`), and its constants."""

    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, object]
    num_warps: int
    num_stages: int


def variant(kernel: Any, constexprs: dict[str, Any], types: dict[str, str], num_warps: int, num_stages: int) -> Variant:
    """A variant whose arguments are pointers to float32 where `types` says nothing else."""
    names = [n for n in kernel.arg_names if n not in constexprs]
    return Variant(kernel, {n: types.get(n, "*fp32") for n in names}, constexprs, num_warps, num_stages)
