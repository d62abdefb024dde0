"""The C++ backend against the float64 reference: at most twice torch's own float32 error, on every instruction set."""

from __future__ import annotations

import copy
import hashlib
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from statistics import median
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import deepreg_fast as dr
from deepreg_fast.backend.cpu import backend as cpu

from .helpers import images, normal, random_red, relative

pytestmark = pytest.mark.skipif(
    dr.backends()["cpu"] is not None, reason=f"the C++ extension is not built: {dr.backends()['cpu']}"
)
EPS = 2.0**-23
PIXELS = 2000


def _sets() -> list[str]:
    extension, _ = cpu._extension()
    return extension.instruction_sets() if extension is not None else []


@pytest.fixture(name="isa", params=_sets())
def _isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("DEEPREG_FAST_ISA", request.param)
    return request.param


@pytest.fixture(name="threads")
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def _answers(reg: dr.RED, x: torch.Tensor, v: torch.Tensor, backend: str) -> dict[str, torch.Tensor]:
    """Everything that a backend computes, by name, an image (of "theta": up to nine parts of the batch) a row."""
    with dr.use_backend(backend):
        value, grad = reg.value_and_grad(x)
        lin = reg.linearize(x)
        thetas = []
        for part, direction in zip(x.chunk(9), v.chunk(9), strict=True):
            theta = reg.linearize(part).param_vjp(direction)
            assert list(theta) == [n for n, p in reg.named_parameters() if p.requires_grad]
            thetas.append(torch.cat([g.flatten() for g in theta.values()]))
        return {"value": value, "grad": grad, "kept": lin.grad, "hvp": lin.hvp(v), "theta": torch.stack(thetas)}


def compare(answers: Callable[..., dict[str, torch.Tensor]], reg: Any, x: torch.Tensor, v: torch.Tensor) -> None:
    """`answers(reg, x, v, backend)` in C++, at most twice torch's own error in float32, on every instruction set.

    An answer's first dimension is that of independent draws, and the median over them counts: the error of a few
    numbers may be luck in either arithmetic, and LayerNorm is steep at pixels whose few channels are nearly equal, so
    a few such pixels make most of the error. The reference computes once for all instruction sets.
    """
    double = copy.deepcopy(reg).double()
    exact, theirs = answers(double, x.double(), v.double(), "reference"), answers(reg, x, v, "reference")

    def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
        return median(relative(f.double(), w) for f, w in zip(found, wanted, strict=True))

    # Where torch is exact by luck, an answer is still allowed its own rounding.
    bounds = {name: max(2.0 * error(theirs[name], wanted), 2.0 * EPS) for name, wanted in exact.items()}
    for isa in _sets():
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("DEEPREG_FAST_ISA", isa)
            ours = answers(reg, x, v, "cpu")
        for name, wanted in exact.items():
            assert error(ours[name], wanted) <= bounds[name], (isa, name)


@settings(max_examples=25)
@given(
    channels=st.sampled_from((1, 3, 16, 17, 32)),
    depth=st.integers(2, 5),
    head=st.sampled_from(("red", "residual", "norm")),
    norm=st.sampled_from(("none", "pixel", "image")),
    size=st.tuples(st.integers(3, 34), st.integers(3, 34)),
    seed=st.integers(0, 1000),
)
def test_against_float64(channels: int, depth: int, head: str, norm: str, size: tuple[int, int], seed: int) -> None:
    # A ratio of two rounding errors needs many of them: nine pixels alone may be twice as lucky in either arithmetic.
    shape = (max(9, PIXELS // (size[0] * size[1])), 1, *size)
    scale = 0.15 * min(1.0, (16 / channels) ** 0.5)
    reg = random_red(seed, scale, double=False, channels=channels, depth=depth, head=head, norm=norm, alpha=0.1)
    compare(_answers, reg, images(*shape, seed=seed, dtype=torch.float32), normal(*shape, seed=seed).float())


@pytest.mark.parametrize("norm", ["none", "pixel", "image"])
def test_the_headline_size(norm: str) -> None:
    reg = random_red(1, double=False, channels=16, gain=10.0, norm=norm)
    compare(_answers, reg, images(2, 1, 180, 180, dtype=torch.float32), normal(2, 1, 180, 180).float())


@pytest.mark.parametrize("norm", ["none", "pixel", "image"])
@pytest.mark.parametrize("width", [401, 830])
def test_wide_images_are_worked_on_in_strips(norm: str, width: int) -> None:
    reg = random_red(1, double=False, channels=16, norm=norm)
    compare(_answers, reg, images(2, 1, 9, width, dtype=torch.float32), normal(2, 1, 9, width).float())


@pytest.mark.parametrize("norm", ["none", "pixel", "image"])
def test_neither_neighbours_nor_threads_change_the_bits(isa: str, norm: str, threads: None) -> None:
    reg = random_red(1, double=False, channels=16, norm=norm)
    x, v = images(3, 1, 90, 31, dtype=torch.float32), normal(3, 1, 90, 31).float()
    torch.set_num_threads(1)
    one = _answers(reg, x, v, "cpu")
    for count in (2, 3):
        torch.set_num_threads(count)
        many = _answers(reg, x, v, "cpu")
        assert all(torch.equal(one[k], many[k]) for k in one)
    for i in range(3):
        alone = _answers(reg, x[i : i + 1], v[i : i + 1], "cpu")
        assert all(torch.equal(alone[k][0], one[k][i]) for k in ("value", "grad", "kept", "hvp"))
    poisoned = x.clone()
    poisoned[1, 0, 5, 5] = torch.nan
    beside = _answers(reg, poisoned, v, "cpu")
    assert all(torch.equal(beside[k][[0, 2]], one[k][[0, 2]]) for k in ("value", "grad", "kept", "hvp"))
    assert bool(torch.isnan(beside["value"][1])) and bool(torch.isnan(beside["grad"][1]).any())


def test_recovery_is_that_of_the_reference(isa: str) -> None:
    reg, A = random_red(scale=0.05, double=False, channels=8), dr.SRM((1, 32, 32), 0.3)
    x = images(4, 1, 32, 32, dtype=torch.float32)
    options = dr.PGDOptions(400, 1e-5, "anderson")
    with dr.use_backend("reference"):
        slow = dr.recover(A.A(x), A, reg, 0.1, options=options)
        slow_hg = dr.hypergradient(x, A.A(x), A, reg, 0.1, options=options)
    fast = dr.recover(A.A(x), A, reg, 0.1, options=options)
    fast_hg = dr.hypergradient(x, A.A(x), A, reg, 0.1, options=options)
    assert (slow.backend, fast.backend) == ("reference", "cpu")
    assert fast.status.eq(0).all() and (fast.x - slow.x).abs().max() <= 1e-3
    for k, g in slow_hg.theta.items():
        assert relative(fast_hg.theta[k], g) <= 1e-2
    alone = dr.recover(A.A(x)[2:3], A, reg, 0.1, options=options)
    assert torch.equal(alone.x, fast.x[2:3]), "the bits do not depend on the batch, not even for a single image"


def test_layouts_and_frozen_parameters(isa: str) -> None:
    reg = random_red(double=False, channels=5)
    reg.net.convs[1].weight.requires_grad_(False)  # type: ignore[union-attr]
    x, v = images(2, 1, 12, 20, dtype=torch.float32), normal(2, 1, 12, 20).float()
    wanted = _answers(reg, x, v, "cpu")
    for change in (
        lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
        lambda t: t.to(memory_format=torch.channels_last),
        lambda t: torch.cat([t, t], 3)[..., :20],
        lambda t: torch.cat([t.flatten().new_zeros(1), t.flatten()])[1:].view_as(t),
        lambda t: t.clone().requires_grad_(),
    ):
        found = _answers(reg, change(x), change(v), "cpu")
        assert all(torch.equal(found[k], wanted[k]) for k in wanted)
    assert reg.value_and_grad(x[:0])[1].shape == (0, 1, 12, 20)


def test_parameters_may_not_change_under_a_linearization() -> None:
    reg, x = random_red(double=False), images(1, 1, 8, 8, dtype=torch.float32)
    lin = reg.linearize(x)
    with pytest.raises(dr.errors.InputError, match="shape"):
        lin.hvp(x[..., :4])
    with torch.no_grad():
        next(reg.parameters()).add_(1.0)
    with pytest.raises(dr.errors.InputError, match="linearize"):
        lin.hvp(x)
    moved = reg.value_and_grad(x)[1]
    with dr.use_backend("reference"):
        assert relative(moved, reg.value_and_grad(x)[1]) <= 1e-5


class Twisted(dr.RED):
    """Computes something else than its base class."""

    def energy(self, x: torch.Tensor) -> torch.Tensor:
        return 2.0 * super().energy(x)


@pytest.mark.parametrize(
    ("reg", "dtype", "word"),
    [
        (dr.ICNN(channels=2), torch.float32, "conv chain"),
        (Twisted(channels=2), torch.float32, "conv chain"),
        (dr.RED(channels=2), torch.float64, "float64"),
        (dr.RED(channels=2, kernel_size=5), torch.float32, "5 x 5"),
        (dr.RED(channels=2, image_channels=3), torch.float32, "3"),
        (dr.RED(channels=2, depth=17), torch.float32, "17"),
        (dr.RED(channels=2, norm="pixel", norm_place="after"), torch.float32, "stands after"),
    ],
)
def test_what_it_leaves_to_the_reference(reg: dr.Regularizer, dtype: torch.dtype, word: str) -> None:
    channels = 3 if word == "3" else 1
    reg, x = reg.to(dtype), images(2, channels, 9, 9, dtype=dtype)
    with dr.use_backend("cpu"), pytest.raises(dr.errors.BackendUnavailable, match=word):
        reg.value_and_grad(x)
    assert reg.value_and_grad(x)[1].shape == x.shape
    assert dr.backend.select(reg, x).name == "reference"


def test_an_unknown_instruction_set_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEEPREG_FAST_ISA", "mmx")
    with pytest.raises(dr.errors.BackendUnavailable, match=r"DEEPREG_FAST_ISA.*mmx"):
        dr.RED(channels=2).value_and_grad(images(1, 1, 8, 8, dtype=torch.float32))


def test_two_python_threads_at_once() -> None:
    reg = random_red(double=False, channels=16)
    x = images(2, 1, 64, 64, dtype=torch.float32)
    wanted = reg.value_and_grad(x)[1]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: reg.value_and_grad(x)[1], range(40)))
    assert all(torch.equal(f, wanted) for f in found)


def _digest(reg: dr.RED, x: torch.Tensor, A: dr.SRM) -> str:
    """Of a gradient and of measurements (the bytes themselves would not fit into a pipe that nobody reads yet)."""
    return hashlib.sha256(reg.value_and_grad(x)[1].numpy().tobytes() + A.A(x).numpy().tobytes()).hexdigest()


def _in_a_child(queue: multiprocessing.SimpleQueue[str], reg: dr.RED, x: torch.Tensor, A: dr.SRM) -> None:
    queue.put(_digest(reg, x, A))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")
def test_a_forked_child_computes_the_same(threads: None) -> None:
    """As a DataLoader's worker does; the parent's OpenMP threads do not exist in it."""
    reg, x, A = random_red(double=False, channels=16), images(4, 1, 64, 64, dtype=torch.float32), dr.SRM((1, 64, 64))
    torch.set_num_threads(2)
    wanted = _digest(reg, x, A)
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    child = context.Process(target=_in_a_child, args=(queue, reg, x, A))
    child.start()
    child.join(60)
    if child.is_alive():
        child.kill()
    assert child.exitcode == 0 and queue.get() == wanted
