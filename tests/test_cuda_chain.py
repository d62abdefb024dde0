"""The conv chain's fused product without a GPU: it runs on the host against float64, NVRTC compiles it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

import deepreg_fast as dr
from deepreg_fast.backend import active_images
from deepreg_fast.backend.gpu import fused_chain
from deepreg_fast.backend.gpu.chain_options import ChainOptions
from deepreg_fast.backend.gpu.conv_chain import GpuLinearization
from deepreg_fast.backend.gpu.fused_chain import FusedHvp, Machine
from deepreg_fast.backend.gpu.fused_pack import pack

from .helpers import EPS, images, normal, random_red, relative
from .host_cuda import COMPILER, HostLauncher, library

host = pytest.mark.skipif(COMPILER is None, reason="no g++ on this machine")
LIMIT = 232448  # of an H100's block
NARROW = 3
"""Blocks of a strip: 48 columns, so that strips, their seams, and images wider than a strip are cheap to run."""
_SWEEP = {"hvp": "-DCHAIN_SWEEP=0", "gradient": "-DCHAIN_SWEEP=1"}
_HOST = (f"-DCHAIN_BLOCKS={NARROW}", _SWEEP["hvp"])


@pytest.fixture(scope="module", autouse=True)
def _compiled() -> None:
    """Before any test, so that a source that does not compile is reported once."""
    if COMPILER is not None:
        library(fused_chain.SOURCE, _HOST)


def _random(seed: int = 1, scale: float = 0.15, **options: object) -> dr.RED:
    return random_red(seed, scale, double=False, **{"channels": 16, "alpha": 0.1, "head": "red", **options})


def _planes(reg: dr.RED, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """u, z of layer 2 and g of layer 1 (math.md, M10), by PyTorch in the dtype of x."""
    form = reg.kernel_form()
    assert form is not None
    net: Any = form.net
    w = [m.weight.detach() for m in net.convs]
    b = [m.bias.detach() for m in net.convs]
    w[0], w[2] = w[0] * net.gain, w[2] / net.gain
    norm = net.norm == "pixel"
    if norm:
        w[:2] = [f - f.mean(0, keepdim=True) for f in w[:2]]
        b[:2] = [f - f.mean() for f in b[:2]]

    def normalized(z: Tensor, m: Any) -> tuple[Tensor, Tensor, Tensor]:
        rs = torch.rsqrt(z.square().mean(1, keepdim=True) + m.eps)
        return z * rs * m.weight.detach()[:, None, None] + m.bias.detach()[:, None, None], z * rs, rs

    u = x - form.center
    z = F.conv2d(u, w[0], b[0], padding=1)
    z = F.conv2d(F.silu(normalized(z, net.norms[0])[0] if norm else z), w[1], b[1], padding=1)
    n, xhat, rs = normalized(z, net.norms[1]) if norm else (z, z, z)
    s = torch.sigmoid(n)
    gu = s * (1 + n * (1 - s)) * F.conv_transpose2d(-0.5 * u, w[2], padding=1)
    if norm:
        t = gu * net.norms[1].weight.detach()[:, None, None]
        gu = rs * (t - xhat * (t * xhat).mean(1, keepdim=True))
    g = F.conv_transpose2d(gu, w[1], padding=1)
    z, g = (F.pad(t.permute(0, 2, 3, 1), (0, 16 - t.shape[1])).contiguous() for t in (z, g))
    return u[:, 0].contiguous(), z, g


def fused(reg: dr.RED, x: Tensor, order: int = 0, blocks: int = NARROW, sms: int = 4) -> FusedHvp:
    form = reg.kernel_form()
    assert form is not None and fused_chain.unsupported_reason(form) is None
    u, z, g = _planes(reg, x)
    chain = fused_chain.chain_of(form, x.shape[-1], _host(order, blocks, sms), pack(form), blocks)
    return FusedHvp(chain, u, z, g, fused_chain.largest(u))


def _host(order: int, blocks: int, sms: int, sweep: str = "hvp") -> Machine:
    """The host, with the kernels of `blocks` blocks also for narrower images."""
    launcher = HostLauncher(fused_chain.SOURCE, order, (f"-DCHAIN_BLOCKS={blocks}", _SWEEP[sweep]))
    return Machine(sms, LIMIT, lambda _: Wide(launcher, blocks))


class Wide:
    """Launches the kernels of more blocks than an image has."""

    def __init__(self, launcher: HostLauncher, blocks: int) -> None:
        self.launcher, self.blocks = launcher, blocks

    def launch(self, kernel: str, blocks: int, threads: int, shared: int, arguments: Sequence[np.generic]) -> None:
        """As `HostLauncher.launch`."""
        assert threads <= 32 * self.blocks and shared <= fused_chain.shared_bytes(self.blocks)
        self.launcher.launch(kernel, blocks, 32 * self.blocks, fused_chain.shared_bytes(self.blocks), arguments)


def _with_nan(t: Tensor) -> Tensor:
    """A copy in which the second image is NaN."""
    copied = t.clone()
    copied[1] = torch.nan
    return copied


def _definition(reg: dr.RED, x: Tensor, v: Tensor) -> Tensor:
    with dr.use_backend("reference"):
        return reg.linearize(x).hvp(v)


def compare(reg: dr.RED, x: Tensor, v: Tensor, found: Tensor) -> None:
    """The largest error of an image is at most twice the largest of torch in float32, or its own rounding."""
    exact = _definition(copy.deepcopy(reg).double(), x.double(), v.double())
    theirs = max(map(relative, _definition(reg, x, v).double(), exact))
    ours = max(map(relative, found.double(), exact))
    assert ours <= max(2.0 * theirs, 4.0 * EPS), (ours, theirs)


SIDES = st.integers(3, 70)
EXPONENTS = st.integers(-6, 6)


@host
@settings(max_examples=40)
@given(SIDES, SIDES, st.sampled_from(["none", "pixel"]), st.integers(1, 16), EXPONENTS, st.integers(0, 2))
@example(3, 3, "pixel", 16, 0, 0)
@example(5, 48, "none", 16, 6, 1)
@example(4, 49, "pixel", 16, -6, 2)
@example(3, 97, "pixel", 16, 0, 2)
@example(31, 3, "none", 3, 3, 2)
def test_against_float64(height: int, width: int, norm: str, channels: int, exponent: int, order: int) -> None:
    seed = height * width + channels
    reg = _random(seed, norm=norm, channels=channels)
    x, v = images(2, 1, height, width, seed=seed).float(), normal(2, 1, height, width, seed=seed + 1).float()
    v[1] *= 10.0**exponent
    compare(reg, x, v, fused(reg, x, order).product(v))


@host
@settings(max_examples=15)
@given(st.sampled_from(["none", "pixel"]), st.floats(-3, 1), st.floats(-3, 1), st.sampled_from([1e-5, 1e-2]))
@example("pixel", 1.0, -3.0, 1e-5)
@example("none", -3.0, 1.0, 1e-2)
def test_filters_and_images_of_any_size(norm: str, filters: float, contrast: float, eps: float) -> None:
    """Scales of operands are guesses from the parameters; other scales follow if a number overflows."""
    reg = _random(3, 10.0**filters, norm=norm, eps=eps)
    x, v = images(1, 1, 30, 40).float(), normal(1, 1, 30, 40).float()
    x = 0.5 + 10.0**contrast * (x - 0.5)
    compare(reg, x, v, fused(reg, x).product(v))


@host
def test_a_flat_image_needs_smaller_scales() -> None:
    """Without contrast, the LayerNorm multiplies by 1 / sqrt(eps)."""
    reg = _random(3, norm="pixel", eps=1e-7, alpha=0.0)
    with torch.no_grad():
        for p in (*reg.net.convs[0].parameters(), *reg.net.convs[1].parameters()):  # type: ignore[union-attr]
            if p.dim() == 1:
                p.zero_()
    x, v = torch.full((2, 1, 20, 20), 0.5), normal(2, 1, 20, 20).float()
    x[1] = images(1, 20, 20, seed=2).float()
    x[0] += 1e-4 * (images(1, 20, 20).float() - 0.5)
    compare(reg, x, v, fused(reg, x).product(v))


@host
@pytest.mark.parametrize("norm", ["none", "pixel"])
def test_neither_warps_nor_bands_nor_neighbors_change_the_bits(norm: str) -> None:
    reg = _random(2, norm=norm)
    x, v = images(3, 1, 41, 60).float(), normal(3, 1, 41, 60).float()
    one = fused(reg, x).product(v)
    for order in (1, 2):
        assert torch.equal(fused(reg, x, order).product(v), one), "two warps race"
    for sms in (1, 7, 30):
        assert torch.equal(fused(reg, x, sms=sms).product(v), one), "bands"
    k = fused(reg, x)
    for b in range(3):
        alone = k.moved(lambda t, b=b: t[b : b + 1] if len(t) == 3 else t)
        assert torch.equal(alone.product(v[b : b + 1])[0], one[b])
    nan_v = v.clone()
    nan_v[1, 0, 30, 3] = torch.nan
    poisoned = k.moved(lambda t: _with_nan(t) if len(t) == 3 else t)
    for came in (k.product(nan_v), poisoned.product(v)):
        assert torch.equal(came[[0, 2]], one[[0, 2]])
        assert bool(came[1].isnan().any())


@host
@pytest.mark.parametrize("norm", ["none", "pixel"])
def test_inactive_images_are_not_touched(norm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reg = _random(2, norm=norm)
    x, v = images(3, 1, 20, 30).float(), normal(3, 1, 20, 30).float()
    k = fused(reg, x)
    whole = k.product(v)
    rows = torch.tensor([True, False, True])
    made = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda t: made(t).fill_(7.0))
    with active_images(rows):
        came = k.product(v)
    assert torch.equal(came[rows], whole[rows])
    assert bool((came[1] == 7.0).all())


@host
def test_symmetric_and_empty() -> None:
    reg = _random(4, norm="pixel")
    x, v, w = images(1, 1, 33, 50).float(), normal(1, 1, 33, 50).float(), normal(1, 1, 33, 50, seed=5).float()
    k = fused(reg, x)
    left, right = ((a.double() * k.product(b).double()).sum() for a, b in ((v, w), (w, v)))
    assert abs(left - right) <= 8 * EPS * float(v.norm() * k.product(w).norm())
    assert torch.equal(k.product(0 * v), 0 * v)
    assert fused(reg, x[:0]).product(v[:0]).shape == (0, 1, 33, 50)


@host
@pytest.mark.long
@pytest.mark.parametrize("norm", ["none", "pixel"])
def test_the_headline_size(norm: str) -> None:
    reg = _random(5, norm=norm)
    x, v = images(2, 1, 180, 180).float(), normal(2, 1, 180, 180).float()
    compare(reg, x, v, fused(reg, x, blocks=fused_chain.MOST_BLOCKS, sms=132).product(v))
    x, v = images(1, 1, 40, 400).float(), normal(1, 1, 40, 400).float()
    compare(reg, x, v, fused(reg, x, 2, fused_chain.MOST_BLOCKS).product(v))


@pytest.mark.parametrize("width", [3, 16, 17, 180, 192, 193, 378, 379, 2048])
def test_strips_cover_the_image(width: int) -> None:
    how = fused_chain.plan(width, LIMIT)
    columns, outputs = 16 * how.blocks, 16 * how.blocks - 2 * fused_chain.REACH
    assert how.shared <= LIMIT
    assert columns + (how.strips - 1) * outputs >= width
    assert how.strips == 1 or width > columns + (how.strips - 2) * outputs
    assert fused_chain.plan(width, 100_000).shared <= 100_000


def test_bands_share_the_rows_among_multiprocessors() -> None:
    assert fused_chain.bands(132, 1, 180, 132) == 1
    assert fused_chain.bands(1, 1, 180, 132) == 20
    assert fused_chain.bands(1, 1, 3, 132) == 1


def test_what_the_kernel_covers() -> None:
    for options in ({"head": "norm"}, {"depth": 4}, {"channels": 17}, {"norm": "image"}):
        form = _random(**options).kernel_form()
        assert form is not None and "three layers" in str(fused_chain.unsupported_reason(form))


@pytest.mark.gpu
@pytest.mark.parametrize("norm", ["none", "pixel"])
@pytest.mark.parametrize("size", [(5, 33, 47), (3, 180, 180), (2, 64, 401), (1, 3, 3)])
def test_on_the_gpu(norm: str, size: tuple[int, int, int]) -> None:
    reg = _random(7, norm=norm)
    x, v = images(size[0], 1, *size[1:]).float(), normal(size[0], 1, *size[1:]).float()
    v[-1] *= 1e5
    on_gpu = copy.deepcopy(reg).cuda()
    form = on_gpu.kernel_form()
    assert form is not None
    lin = GpuLinearization(on_gpu, form, x.cuda(), ChainOptions(fused=True))
    assert lin._fused is not None
    with dr.use_backend("reference"):
        value, grad = copy.deepcopy(reg).double().value_and_grad(x.double())
    assert relative(lin.grad.double().cpu(), grad) <= 16 * EPS and relative(lin.value.double().cpu(), value) <= 16 * EPS
    one = lin.hvp(v.cuda())
    compare(reg, x, v, one.cpu())
    assert torch.equal(lin.hvp(v.cuda()), one)
    k = lin._fused
    for b in range(size[0]):
        alone = k.moved(lambda t, b=b: t[b : b + 1] if len(t) == size[0] else t)
        assert torch.equal(alone.product(v[b : b + 1].cuda())[0], one[b])
    graph, place = torch.cuda.CUDAGraph(), v.cuda()
    with torch.cuda.graph(graph):
        captured = k.product(place)
    captured.zero_()
    graph.replay()
    assert torch.equal(captured, one)
