"""The conv chain's fused gradient without a GPU: it runs on the host against float64."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

import deepreg_fast as dr
from deepreg_fast.backend import active_images
from deepreg_fast.backend.gpu import conv_chain as gpu_chain
from deepreg_fast.backend.gpu import fused_chain
from deepreg_fast.backend.gpu.chain_options import ChainOptions
from deepreg_fast.backend.gpu.fused_chain import Machine
from deepreg_fast.backend.gpu.fused_pack import pack

from .helpers import EPS, images, normal, relative
from .host_cuda import COMPILER, library
from .test_cuda_chain import LIMIT, NARROW, _host, _planes, _random
from .test_cuda_chain import compare as compare_product

host = pytest.mark.skipif(COMPILER is None, reason="no g++ on this machine")
SIDES = st.integers(3, 70)


@pytest.fixture(scope="module", autouse=True)
def _compiled() -> None:
    """Before any test, so that a source that does not compile is reported once."""
    if COMPILER is not None:
        library(fused_chain.SOURCE, (f"-DCHAIN_BLOCKS={NARROW}", "-DCHAIN_SWEEP=1"))


def sweep(reg: dr.RED, x: Tensor, order: int = 0, sms: int = 4) -> dict[str, Tensor]:
    """Value, gradient, and what a linearization saves."""
    form = reg.kernel_form()
    assert form is not None
    chain = fused_chain.chain_of(form, x.shape[-1], _host(order, NARROW, sms, "gradient"), pack(form), NARROW)
    chain = replace(chain, how=replace(chain.how, blocks=NARROW))
    u = (x - form.center)[:, 0].contiguous()
    z, g = (torch.full((*u.shape, 16), 7.0) for _ in range(2))
    energies, grad = fused_chain.gradient(chain, u, z, g)
    return {"value": energies.sum(1).float(), "grad": grad[:, None], "z": z, "g": g}


def _definition(reg: dr.RED, x: Tensor) -> dict[str, Tensor]:
    with dr.use_backend("reference"):
        value, grad = reg.value_and_grad(x)
    return dict(zip(("value", "grad", "z", "g"), (value, grad, *_planes(reg, x)[1:]), strict=True))


def _cancellation(reg: dr.RED, x: Tensor, value: Tensor) -> float:
    """How much larger the terms (1 + alpha) / 2 u^2 and |u h| / 2 of the energy are than their sum."""
    form = copy.deepcopy(reg).double().kernel_form()
    assert form is not None
    u = x.double() - form.center
    with torch.no_grad():
        terms = 0.5 * ((1 + form.alpha) * u.square() + (u * form.net(u)).abs()).flatten(1).sum(1)
    return float((terms / value.abs()).max())


def compare(reg: dr.RED, x: Tensor, found: dict[str, Tensor]) -> None:
    """The largest error of an image is at most twice the largest of torch in float32, or its own rounding."""
    exact = _definition(copy.deepcopy(reg).double(), x.double())
    for name, theirs in _definition(reg, x).items():
        if name not in found:
            continue
        bound = max(map(relative, theirs.double(), exact[name]))
        ours = max(map(relative, found[name].double(), exact[name]))
        # Planes are intermediate; what follows from them is within twice torch's error again.
        most = 2.0 if name in ("value", "grad") else 4.0
        floor = 4.0 * EPS * (_cancellation(reg, x, exact["value"]) if name == "value" else 1.0)
        assert ours <= max(most * bound, floor), (name, ours, bound)


@host
@settings(max_examples=25)
@given(SIDES, SIDES, st.sampled_from(["none", "pixel"]), st.integers(1, 16), st.integers(0, 2))
@example(3, 3, "pixel", 16, 0)
@example(5, 48, "none", 16, 1)
@example(4, 49, "pixel", 16, 2)
@example(3, 97, "pixel", 16, 2)
def test_against_float64(height: int, width: int, norm: str, channels: int, order: int) -> None:
    seed = height * width + channels
    reg = _random(seed, norm=norm, channels=channels)
    x = images(2, 1, height, width, seed=seed).float()
    compare(reg, x, sweep(reg, x, order))


@host
@settings(max_examples=10)
@given(st.sampled_from(["none", "pixel"]), st.floats(-3, 1), st.floats(-3, 1), st.sampled_from([1e-5, 1e-2]))
def test_filters_and_images_of_any_size(norm: str, filters: float, contrast: float, eps: float) -> None:
    reg = _random(3, 10.0**filters, norm=norm, eps=eps)
    x = 0.5 + 10.0**contrast * (images(1, 1, 30, 40).float() - 0.5)
    compare(reg, x, sweep(reg, x))


@host
@pytest.mark.parametrize("norm", ["none", "pixel"])
def test_neither_warps_nor_bands_nor_neighbors_change_the_bits(norm: str) -> None:
    reg = _random(2, norm=norm)
    x = images(3, 1, 41, 60).float()
    one = sweep(reg, x)
    others = [sweep(reg, x, order) for order in (1, 2)] + [sweep(reg, x, sms=sms) for sms in (1, 30)]
    assert all(torch.equal(other[n], one[n]) for other in others for n in one)
    alone = sweep(reg, x[1:2])
    assert all(torch.equal(alone[n][0], one[n][1]) for n in ("grad", "z", "g"))
    poisoned = x.clone()
    poisoned[1, 0, 7, 7] = torch.nan
    came = sweep(reg, poisoned)
    assert all(torch.equal(came[n][[0, 2]], one[n][[0, 2]]) for n in one)
    assert bool(came["grad"][1].isnan().any())
    with active_images(torch.tensor([True, False, True])):
        came = sweep(reg, x)
    assert all(torch.equal(came[n][[0, 2]], one[n][[0, 2]]) for n in one)
    assert bool((came["z"][1] == 7.0).all())


@host
def test_without_saving() -> None:
    reg = _random(2, norm="pixel")
    x = images(1, 1, 12, 20).float()
    form = reg.kernel_form()
    assert form is not None
    chain = fused_chain.chain_of(form, 48, _host(0, NARROW, 1, "gradient"), pack(form), NARROW)
    _, grad = fused_chain.gradient(chain, (x - form.center)[:, 0].contiguous())
    assert torch.equal(grad[:, None], sweep(reg, x)["grad"])


@host
@pytest.mark.parametrize("norm", ["none", "pixel"])
def test_the_backend_uses_it_where_it_covers(norm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    kernels = {f"-DCHAIN_SWEEP={i}": _host(0, NARROW, 4, sweep) for i, sweep in enumerate(fused_chain.SWEEPS)}
    machine = Machine(4, LIMIT, lambda options: kernels[options[-1]].launcher(options))
    monkeypatch.setattr(fused_chain, "machine_of", lambda _: machine)
    reg = _random(6, norm=norm, channels=12)
    form = reg.kernel_form()
    assert form is not None
    x, v = images(2, 1, 20, 40).float(), normal(2, 1, 20, 40).float()
    options = ChainOptions(fused=True)
    lin = gpu_chain.GpuLinearization(reg, form, x, options)
    value, grad = gpu_chain.value_and_grad(form, x, options)
    assert torch.equal(lin.value, value) and torch.equal(lin.grad, grad)
    compare(reg, x, {"value": value, "grad": grad, "z": lin._kept.z[2], "g": lin._kept.g[1]})
    product = lin.hvp(v)
    compare_product(reg, x, v, product)
    assert torch.equal(lin.moved(torch.clone).hvp(v), product)
    with torch.no_grad():
        reg.net.convs[1].weight.mul_(0.5)  # type: ignore[union-attr,operator]
    compare(reg, x, dict(zip(("value", "grad"), gpu_chain.value_and_grad(form, x, options), strict=True)))
    for other in (ChainOptions(), replace(options, storage="bfloat16"), replace(options, precision="ieee")):
        assert fused_chain.chain(form, x, other) is None
