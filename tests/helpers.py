"""Small problems shared by the tests."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

import deepreg_fast as dr
from deepreg_fast.regularizers.base import Regularizer

from .kill_and_resume import config as killed_config

EPS = 2.0**-23

STEPS = ("batched.linalg", "solvers.cg", "solvers.minres", "solvers.steps", "solvers.criteria", "solvers.acceleration")
DEFINITIONS: dict[str, Callable[..., Any]] = {
    name: f.definition
    for module in STEPS
    for name, f in vars(importlib.import_module(f"deepreg_fast.{module}")).items()
    if hasattr(f, "definition")
}
"""The definitions of the solvers' steps and decisions, by name."""


def random_red(seed: int = 0, scale: float = 0.15, double: bool = True, **options: object) -> dr.RED:
    """A RED regularizer whose weights are all random (its own start has h = 0)."""
    reg = dr.RED(**{"channels": 3, "depth": 3, "gain": 2.0, **options})  # type: ignore[arg-type]
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in reg.parameters():
            p.add_(scale * torch.randn(p.shape, generator=g, dtype=torch.float32, device="cpu"))
    return reg.double() if double else reg


def grad_s(reg: Regularizer, x: torch.Tensor) -> torch.Tensor:
    """`grad s(x) = (1+alpha)(x - center) - grad r(x)`."""
    return (1.0 + reg.alpha) * (x - reg.center) - reg.value_and_grad(x)[1]


def images(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Uniform random images."""
    g = torch.Generator().manual_seed(seed)
    return torch.rand(shape, generator=g, dtype=torch.float64, device="cpu").to(dtype)


def normal(*shape: int, seed: int = 1) -> torch.Tensor:
    """Standard normal float64 numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def central(f: Callable[[float], torch.Tensor], h: float = 1e-4) -> torch.Tensor:
    """Central difference of sixth order of `f` at 0."""
    return (45 * (f(h) - f(-h)) - 9 * (f(2 * h) - f(-2 * h)) + (f(3 * h) - f(-3 * h))) / (60 * h)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """`||a - b|| / ||b||`."""
    return float((a - b).norm() / b.norm().clamp_min(1e-300))


def assert_as_exact_as_torch(
    ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]
) -> None:
    """The median over rows of our error is at most twice that of torch in the same precision, answer by answer."""

    def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
        return median(relative(f.double(), w) for f, w in zip(found, wanted, strict=True))

    for name, wanted in exact.items():
        # Where torch is exact by luck, an answer is still allowed its own rounding.
        assert error(ours[name], wanted) <= max(2.0 * error(theirs[name], wanted), 2.0 * EPS), name


def moved(
    reg: torch.nn.Module, direction: dict[str, torch.Tensor], t: float, f: Callable[[], torch.Tensor]
) -> torch.Tensor:
    """`f()` with the parameters moved by `t direction`, then moved back exactly."""
    kept = {k: v.detach().clone() for k, v in reg.named_parameters()}
    try:
        with torch.no_grad():
            for k, p in reg.named_parameters():
                p.copy_(kept[k] + t * direction[k])
        return f()
    finally:
        with torch.no_grad():
            for k, p in reg.named_parameters():
                p.copy_(kept[k])


def small_config(folder: Path, out: Path, **changes: object) -> dr.BilevelConfig:
    """A training of seconds."""
    return replace(killed_config(str(folder), str(out), 64), **{"checkpoint_seconds": 60.0, **changes})  # type: ignore[arg-type]


def log_lines(out: Path) -> list[dict[str, float]]:
    """What a run logged."""
    return [json.loads(t) for t in (out / "metrics.jsonl").read_text().splitlines()]
