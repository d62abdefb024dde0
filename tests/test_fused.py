"""`@fused` and `@decision`: which calls run a kernel; kernels, protocols and definitions have the same signatures."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch

import deepreg_fast as dr
from deepreg_fast import backend
from deepreg_fast.backend.cpu.vectors import CpuVectors
from deepreg_fast.batched.fused import decision, fused
from deepreg_fast.batched.linalg import dot

from .helpers import DEFINITIONS, normal


def methods(kernels: type) -> dict[str, Callable[..., Any]]:
    return {name: f for name, f in vars(kernels).items() if inspect.isfunction(f) and not name.startswith("_")}


def parameters(f: Callable[..., Any]) -> list[tuple[str, Any]]:
    return [(name, p.kind) for name, p in inspect.signature(f).parameters.items() if name != "self"]


def test_the_protocols_list_every_definition() -> None:
    listed = methods(backend.VectorKernels) | methods(backend.DecisionKernels)
    assert set(listed) == set(DEFINITIONS)
    for name, protocol in listed.items():
        assert parameters(protocol) == parameters(DEFINITIONS[name]), name


@pytest.mark.parametrize("kernels", ["cpu", "gpu", "decisions"])
def test_kernels_have_the_signatures_of_their_definitions(kernels: str) -> None:
    if kernels == "cpu":
        found: type = CpuVectors
    else:
        pytest.importorskip("triton")
        from deepreg_fast.backend.gpu.decisions import GpuDecisions
        from deepreg_fast.backend.gpu.vectors import GpuVectors

        found = GpuVectors if kernels == "gpu" else GpuDecisions
    protocol = backend.DecisionKernels if kernels == "decisions" else backend.VectorKernels
    assert methods(found) and set(methods(found)) <= set(methods(protocol))
    for name, kernel in methods(found).items():
        assert parameters(kernel) == parameters(DEFINITIONS[name]), name


class Kernels:
    """Kernels of the steps below, which return something else than their definitions."""

    def move(self, x: torch.Tensor, *rest: object) -> str:
        return "kernel"

    choose = move


@pytest.fixture(name="steps")
def _steps() -> tuple[Any, Any, Any]:
    @fused("x", "pair", in_place=True)
    def move(x: torch.Tensor, s: torch.Tensor, pair: tuple[torch.Tensor, torch.Tensor]) -> str:
        return "definition"

    @fused("x")
    def other(x: torch.Tensor) -> str:
        return "definition"

    @decision
    def choose(numbers: tuple[torch.Tensor, ...], eps: float) -> str:
        return "definition"

    return move, other, choose


@pytest.fixture(name="kernels")
def _kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend.cpu.CpuBackend, "vectors", lambda *_: Kernels())
    monkeypatch.setattr(backend.cpu.CpuBackend, "decisions", lambda *_: Kernels(), raising=False)
    monkeypatch.setattr(backend.cpu.CpuBackend, "unavailable", lambda *_: None)


def test_which_calls_run_a_kernel(steps: tuple[Any, Any, Any], kernels: None) -> None:
    move, other, choose = steps
    x, s = normal(3, 4), normal(3)
    assert move(x, s, (x, x)) == choose((s, s), 0.1) == "kernel"
    assert other(x) == move.definition(x, s, (x, x)) == choose.definition((s, s), 0.1) == "definition"
    different = [normal(3, 5), normal(3, 4).float(), normal(4, 3).t(), normal(3, 4).requires_grad_(), x.to("meta")]
    for t in different:
        assert move(x, s, (x, t)) == "definition"
    assert move(x[:0], s[:0], (x[:0], x[:0])) == "definition"
    with dr.use_backend("reference"):
        assert move(x, s, (x, x)) == choose((s, s), 0.1) == "definition"


def test_without_kernels(steps: tuple[Any, Any, Any]) -> None:
    x = normal(3, 4).to("meta")
    assert steps[0](x, x, (x, x)) == steps[2]((x,), 0.1) == "definition"


def test_torch_compile_traces_the_definition() -> None:
    x = normal(3, 400).float()
    compiled = torch.compile(lambda x: dot(x, x) + 1, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), dot.definition(x, x) + 1)


def test_names_of_images_are_checked() -> None:
    with pytest.raises(KeyError, match="images"):
        fused("images")(lambda x: x)
