"""The Triton kernels of smoothed TV against float64: at most twice torch's own float32 error.

In Triton's interpreter, or on the GPU that is there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

import deepreg_fast as dr
from deepreg_fast.backend import active_images

from .helpers import EPS, images, normal, relative

pytest.importorskip("triton")

from deepreg_fast.backend.gpu import memory
from deepreg_fast.backend.gpu import tv as gpu_tv
from deepreg_fast.backend.gpu.backend import GpuBackend
from deepreg_fast.backend.gpu.tv import GpuTvLinearization
from deepreg_fast.functional.tv import TvForm
from deepreg_fast.kernels import tv as kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# numpy warns where the interpreter computes with NaN.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def _answers(eps: float, x: Tensor, v: Tensor) -> dict[str, Tensor]:
    """Everything that the kernels compute, by name."""
    reg, x, v = dr.TV(eps), x.to(DEVICE), v.to(DEVICE)
    assert gpu_tv.unsupported_reason(TvForm(eps), x) is None
    value, grad = gpu_tv.value_and_grad(TvForm(eps), x)
    lin = GpuTvLinearization(reg, TvForm(eps), x)
    assert lin.param_vjp(v) == {}
    found = {"value": value, "grad": grad, "kept value": lin.value, "kept": lin.grad, "hvp": lin.hvp(v)}
    return {name: t.cpu() for name, t in found.items()}


def _reference(eps: float, x: Tensor, v: Tensor) -> dict[str, Tensor]:
    with dr.use_backend("reference"):
        lin = dr.TV(eps).linearize(x)
        return {
            "value": lin.value, "grad": lin.grad, "kept value": lin.value, "kept": lin.grad, "hvp": lin.hvp(v),
        }  # fmt: skip


@settings(max_examples=4)
@given(
    count=st.integers(1, 2),
    channels=st.integers(1, 4),
    size=st.tuples(st.integers(1, 9), st.integers(1, 70)),
    eps=st.sampled_from((1e-3, 1e-2, 0.1, 1.0)),
    flat=st.booleans(),
    seed=st.integers(0, 1000),
)
@example(count=1, channels=1, size=(1, 1), eps=1e-2, flat=False, seed=0)
@example(count=2, channels=3, size=(1, 67), eps=1e-2, flat=False, seed=1)
@example(count=1, channels=1, size=(13, 1), eps=1e-2, flat=False, seed=2)
@example(count=1, channels=3, size=(9, 129), eps=1e-3, flat=False, seed=3)
@example(count=1, channels=1, size=(8, 64), eps=1e-3, flat=True, seed=4)
@example(count=1, channels=1, size=(9, 65), eps=1e-15, flat=True, seed=5)
def test_against_float64(count: int, channels: int, size: tuple[int, int], eps: float, flat: bool, seed: int) -> None:
    """`flat`: differences about as large as eps, where the smoothing matters most."""
    x = images(count, channels, *size, seed=seed)
    x = (eps * x if flat else x).float()
    v = normal(count, channels, *size, seed=seed).float()
    ours, torchs, exact = _answers(eps, x, v), _reference(eps, x, v), _reference(eps, x.double(), v.double())
    for name, wanted in exact.items():
        assert ours[name].dtype == torch.float32 and ours[name].shape == wanted.shape
        limit = max(2.0 * relative(torchs[name].double(), wanted), 2.0 * EPS)
        assert relative(ours[name].double(), wanted) <= limit, name


def test_the_product_against_differences_of_gradients() -> None:
    """Those of the definition in float64, of second order, and the error is that of the product in float32."""
    eps, h = 0.05, 1e-5
    x, v = images(2, 3, 11, 19), normal(2, 3, 11, 19)
    x, v = x.float().double(), v.float().double()
    with dr.use_backend("reference"):
        ahead, behind = (dr.TV(eps).value_and_grad(x + s * v)[1] for s in (h, -h))
    found = _answers(eps, x.float(), v.float())["hvp"]
    # h^2 r'''' / r'' is about (h / eps)^2.
    assert relative(found.double(), (ahead - behind) / (2.0 * h)) <= 16.0 * EPS + 4.0 * (h / eps) ** 2


def test_a_flat_image() -> None:
    """There the Hessian is `D^T D / eps`, and value and gradient are exactly zero."""
    eps, v = 0.125, normal(2, 1, 9, 70).float()
    found = _answers(eps, torch.full((2, 1, 9, 70), 0.3), v)
    assert not found["value"].any() and not found["grad"].any()
    w = v.double()
    down, across = w.diff(dim=2) / eps, w.diff(dim=3) / eps
    exact = torch.zeros_like(w)
    exact[:, :, 1:] += down
    exact[:, :, :-1] -= down
    exact[..., 1:] += across
    exact[..., :-1] -= across
    assert relative(found["hvp"].double(), exact) <= 2.0 * EPS


def test_one_pixel_has_no_differences() -> None:
    found = _answers(1e-2, torch.full((3, 2, 1, 1), 0.7), torch.ones(3, 2, 1, 1))
    assert all(not t.any() for t in found.values())


@contextmanager
def _poison() -> Iterator[None]:
    """New memory holds NaN, so that what is left undefined shows if it is read."""

    def poisoned(t: Tensor) -> Tensor:
        return t.fill_(torch.nan) if t.is_floating_point() else t

    fresh, like = torch.Tensor.new_empty, torch.empty_like
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "new_empty", lambda *a, **k: poisoned(fresh(*a, **k)))
        patch.setattr(torch, "empty_like", lambda t: poisoned(like(t)))
        yield


def test_neither_neighbors_nor_ended_images_change_the_bits() -> None:
    x, v = images(3, 2, 9, 70, dtype=torch.float32), normal(3, 2, 9, 70).float()
    x[1, 0, 4, 5] = torch.nan
    alone = [_answers(1e-2, x[i : i + 1], v[i : i + 1]) for i in range(3)]
    together = _answers(1e-2, x, v)
    with active_images(torch.tensor([False, True, True], device=DEVICE)), _poison():
        ended = _answers(1e-2, x, v)
    for name, t in together.items():
        for i in (0, 2):
            assert torch.equal(t[i], alone[i][name][0]), name
        assert bool(torch.isnan(t[1]).any()), name
        assert torch.equal(ended[name][2], t[2]), name
        assert bool(torch.isnan(ended[name][0]).all()), "what is not at work is left as it was"


def test_all_that_is_not_inactive_is_written() -> None:
    with _poison():
        found = _answers(1e-2, images(1, 3, 9, 65, dtype=torch.float32), normal(1, 3, 9, 65).float())
    assert all(bool(torch.isfinite(t).all()) for t in found.values())


def test_layouts_and_an_empty_batch() -> None:
    x, v = images(2, 3, 9, 12, dtype=torch.float32), normal(2, 3, 9, 12).float()
    wanted = _answers(1e-2, x, v)

    def strided(t: Tensor) -> Tensor:
        return t.transpose(2, 3).contiguous().transpose(2, 3).requires_grad_()

    found = _answers(1e-2, strided(x), strided(v))
    assert all(torch.equal(found[k], wanted[k]) and not found[k].requires_grad for k in wanted)
    empty = _answers(1e-2, x[:0], v[:0])
    assert empty["value"].shape == (0,) and empty["grad"].shape == empty["hvp"].shape == (0, 3, 9, 12)


def test_a_moved_linearization_reads_the_new_memory() -> None:
    reg, x, v = dr.TV(), images(1, 1, 9, 12, dtype=torch.float32).to(DEVICE), normal(1, 1, 9, 12).float().to(DEVICE)
    lin = GpuTvLinearization(reg, TvForm(reg.eps), x)
    homes: list[Tensor] = []
    there = lin.moved(lambda t: homes.append(t.clone()) or homes[-1])
    assert len(homes) == 1 and torch.equal(there.hvp(v), lin.hvp(v))
    other = GpuTvLinearization(reg, TvForm(reg.eps), 0.5 * x.square())
    homes[0].copy_(other.x)
    assert torch.equal(there.hvp(v), other.hvp(v)) and not torch.equal(lin.hvp(v), other.hvp(v))
    assert lin.signature() == other.signature() == GpuBackend().signature(reg, x)
    assert lin.signature() != GpuBackend().signature(dr.TV(0.5), x)
    with pytest.raises(dr.errors.InputError, match="must have the shape"):
        lin.hvp(v[..., :4])


@pytest.mark.parametrize(
    ("eps", "shape", "word"),
    [
        (1e-2, (1, 5, 9, 9), "up to 4 channels, not 5"),
        (1e-2, (0, 9), "no pixels"),
        (1e-30, (9, 9), "this is 1.0e-30"),
        (1e-2, (50000, 50000), "50000 x 50000"),
    ],
)
def test_what_it_leaves_to_the_reference(eps: float, shape: tuple[int, ...], word: str) -> None:
    x = torch.empty(shape if len(shape) == 4 else (1, 1, *shape), device="meta")
    reason = gpu_tv.unsupported_reason(TvForm(eps), x)
    assert reason is not None and word in reason


@pytest.mark.parametrize("call", ["gradient", "product"])
def test_a_lack_of_memory_is_a_sentence(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(2, 3, 512, 512, device=DEVICE)
    lin = GpuTvLinearization(dr.TV(), TvForm(1e-2), x[:, :, :2, :2])
    lin.x = x

    def full(*_: object, **__: object) -> Tensor:
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(torch, "empty_like", full)
    monkeypatch.setattr(memory, "_free", lambda device: 3 << 20)
    with pytest.raises(dr.errors.OutOfMemory, match="needs 6 MiB .* 3 MiB are free; use a smaller batch"):
        gpu_tv.value_and_grad(TvForm(1e-2), x) if call == "gradient" else lin.hvp(x)


def test_tiles_are_those_that_are_compiled() -> None:
    compiled = {(v.constexprs["TH"], v.constexprs["TW"], v.num_warps) for v in kernels.variants()}
    assert compiled == set(kernels.TILES.values())


class Interpreted(GpuBackend):
    """The GPU backend for the tensors that there are."""

    def serves(self, like: Tensor) -> str | None:
        return None if like.dtype == torch.float32 else f"it takes float32 tensors, not {like.dtype}."


def test_it_serves_tv_alone() -> None:
    class Twice(dr.TV):
        def energy(self, x: Tensor) -> Tensor:
            return 2.0 * super().energy(x)

    gpu, x = Interpreted(), images(2, 3, 9, 9, dtype=torch.float32).to(DEVICE)
    assert gpu.unsupported_reason(dr.TV(), x) is None
    for reg, other in ((Twice(), x), (dr.TV(), x.double()), (dr.TV(1e-30), x)):
        assert gpu.unsupported_reason(reg, other) is not None
    value, grad = gpu.value_and_grad(dr.TV(0.1), x)
    lin = gpu.linearize(dr.TV(0.1), x)
    assert torch.equal(lin.value, value) and torch.equal(lin.grad, grad)
    assert getattr(lin, "capturable", False)
