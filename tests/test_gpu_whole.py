"""The GPU backend as a whole without a GPU: Triton in its interpreter, the CUDA C++ by g++, loops as on a device."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import nn

import deepreg_fast as dr
from deepreg_fast import backend
from deepreg_fast.backend.gpu import srm as gpu_srm
from deepreg_fast.backend.gpu.backend import GpuBackend
from deepreg_fast.batched.loop import simulate_device

from . import host_cuda
from .helpers import images, random_red, relative

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="tests/test_gpu.py runs the real one where there is a GPU"),
    pytest.mark.skipif(host_cuda.COMPILER is None, reason="no g++ to compile the CUDA sources with"),
]


class Interpreted(GpuBackend):
    """The GPU backend for CPU tensors."""

    name = "interpreted"

    def __init__(self) -> None:
        self.calls: list[str] = []

    def unavailable(self) -> str | None:
        return None

    def serves(self, like: torch.Tensor) -> str | None:
        return None if like.dtype == torch.float32 else f"it takes float32 tensors, not {like.dtype}."

    def value_and_grad(self, energy: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.calls.append("gradient")
        return super().value_and_grad(energy, x)

    def srm(self, A: nn.Module, like: torch.Tensor) -> gpu_srm.GpuSrm | None:
        if self.serves(like) is not None:
            return None
        self.calls.append("srm")
        limit, launcher = 227 * 1024, host_cuda.HostLauncher
        return gpu_srm.kept(A, lambda: gpu_srm.build(A, limit, lambda options: launcher("srm.cu")))


@pytest.fixture(name="gpu")
def _gpu() -> Iterator[Interpreted]:
    table = dict(backend._TABLE)
    found = Interpreted()
    backend.register(found)
    try:
        with dr.use_backend("interpreted"):
            yield found
    finally:
        backend._TABLE.clear()
        backend._TABLE.update(table)


@pytest.mark.parametrize(
    ("norm", "depth", "size", "rounds"),
    [
        ("none", 2, (7, 10), 4),
        ("pixel", 3, (7, 10), 3),
        ("image", 2, (7, 10), 4),
        *(pytest.param(norm, 3, (9, 10), 6, marks=pytest.mark.long) for norm in ("none", "pixel", "image")),
    ],
)
def test_a_hypergradient_is_that_of_the_reference(
    gpu: Interpreted, norm: str, depth: int, size: tuple[int, int], rounds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Fewer and larger pieces: the interpreter's time follows their number.
    monkeypatch.setattr("deepreg_fast.kernels.conv_chain.weight_gradients.TILE", (16, 32))
    monkeypatch.setattr("deepreg_fast.kernels.conv_chain.weight_gradients.DOWN", 1)
    # So many rounds and products and no more: float32 and float64 then take the same steps.
    options = {
        "options": dr.PGDOptions(rounds, 1e-12),
        "adjoint": dr.ImplicitAdjoint(dr.CGOptions(rounds // 2, 1e-12)),
    }
    reg = random_red(scale=0.05, double=False, channels=4, depth=depth, norm=norm, alpha=0.5)
    A, x = dr.SRM((1, *size), 0.4), images(2, 1, *size, dtype=torch.float32)
    with simulate_device():
        found = dr.hypergradient(x, A.A(x), A, reg, 0.1, **options)
    assert {"gradient", "srm"} <= set(gpu.calls)
    with dr.use_backend("reference"):
        A, reg, x = copy.deepcopy(A).double(), copy.deepcopy(reg).double(), x.double()
        exact = dr.hypergradient(x, A.A(x), A, reg, 0.1, **options)
    assert torch.equal(found.solution.iterations, exact.solution.iterations)
    assert relative(found.solution.x.double(), exact.solution.x) <= 1e-5
    assert found.adjoint is not None and exact.adjoint is not None
    assert relative(found.adjoint.x.double(), exact.adjoint.x) <= 1e-4
    for name, wanted in exact.theta.items():
        assert relative(found.theta[name].double(), wanted) <= 1e-4, name


def test_options_reach_the_kernels(gpu: Interpreted) -> None:
    reg, x = random_red(double=False, channels=4), images(1, 1, 8, 8, dtype=torch.float32)
    exactly, lin = reg.value_and_grad(x)[1], reg.linearize(x)
    with dr.gpu_options(storage="bfloat16"):
        roughly, rough = reg.value_and_grad(x)[1], reg.linearize(x)
    assert 0 < relative(roughly, exactly) <= 2.0**-6
    # A linearization keeps the options that it was made with.
    assert 0 < relative(rough.hvp(x), lin.hvp(x)) <= 2.0**-6
    assert torch.equal(reg.value_and_grad(x)[1], exactly)


def test_what_it_does_not_serve_goes_on_to_the_others(gpu: Interpreted) -> None:
    with dr.use_backend("auto"):
        for reg in (random_red(double=False), dr.TV()):
            assert backend.select(reg, images(1, 1, 8, 8, dtype=torch.float32)) is gpu
        assert backend.select(random_red(), images(1, 1, 8, 8)).name == "reference"
        assert backend.select(dr.ICNN(2), images(1, 1, 8, 8, dtype=torch.float32)).name == "reference"
    with pytest.raises(dr.errors.BackendUnavailable, match="ICNN"):
        backend.select(dr.ICNN(2), images(1, 1, 8, 8, dtype=torch.float32))


def test_the_real_one_says_what_it_takes() -> None:
    reason = GpuBackend().unsupported_reason(random_red(double=False), images(1, 1, 8, 8, dtype=torch.float32))
    assert reason is not None and "float32 tensors on a CUDA device, not torch.float32 on cpu" in reason
