"""The Hessian-vector product of a conv chain in one launch, by `csrc/cuda/conv_chain.cu` (docs/kernels.md).

It covers networks 1 -> C -> C -> 1 with C <= 16 and the head red, without a LayerNorm or with one over the channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ...functional.conv_chain import ConvChainForm
from ..active import active_mask, mask_bytes
from . import nvrtc
from .memory import hold

if TYPE_CHECKING:
    from .pixel_norm import ChainOptions, SavedActivations

SOURCE = "conv_chain.cu"
CHANNELS, MOST_BLOCKS, ROWS, REACH = 16, 12, 3, 3
_NUMBERS = 20
_LOW, _HIGH = -60.0, 60.0
"""Bounds of the scales' exponents."""


class Launcher(Protocol):
    """Launches kernels of one compiled source."""

    def launch(self, kernel: str, blocks: int, threads: int, shared: int, arguments: Sequence[np.generic]) -> None:
        """Launch `blocks` blocks of `threads` threads, with `shared` bytes of shared memory per block."""
        ...


@dataclass(frozen=True)
class Plan:
    """The launch for images of one size: columns of a strip / 16, strips of an image, bytes of shared memory."""

    blocks: int
    strips: int
    shared: int

    def options(self, norm: bool) -> tuple[str, ...]:
        """Compiler options for the kernels with or without a LayerNorm."""
        return (f"-DCHAIN_BLOCKS={self.blocks}", f"-DCHAIN_NORM={int(norm)}")


def kernel_name(norm: bool) -> str:
    """The product's kernel."""
    return "chain_hvp_norm" if norm else "chain_hvp"


def plan(width: int, limit: int, most: int = MOST_BLOCKS) -> Plan:
    """The launch for images of `width` columns with at most `limit` bytes of shared memory per block, and strips of at
    most `16 most` columns."""
    blocks = max(1, min(most, -(-width // 16)))
    while blocks > 1 and shared_bytes(blocks) > limit:
        blocks -= 1
    columns = 16 * blocks
    strips = 1 if width <= columns else 1 - (columns - width) // (columns - 2 * REACH)
    return Plan(blocks, strips, shared_bytes(blocks))


def shared_bytes(blocks: int) -> int:
    """Shared memory of a strip of `16 blocks` columns: the constants of conv_chain.cuh."""
    columns = 16 * blocks
    rings = 2 * (ROWS + 2) * (columns + 2) * 16
    taps = 2 * ROWS * 9 * (columns + 4)
    pairs = 4 * (ROWS + 4) * 16 * (blocks + 1 + blocks % 2)
    return 4 * (rings + taps + pairs + 22 * 256 + 96 + _NUMBERS)


def bands(images: int, strips: int, height: int, multiprocessors: int) -> int:
    """The bands of rows of an image that make the busiest multiprocessor process the fewest rows."""

    def rows(n: int) -> int:
        return -(-images * strips * n // multiprocessors) * (-(-height // n) + 2 * REACH)

    return min(range(1, max(1, height // 8) + 1), key=rows)


# The order of channels in the columns of products: a thread has columns 2 t, 2 t + 1, 8 + 2 t, 9 + 2 t of a pixel, and
# these are the neighboring channels 4 t .. 4 t + 3.
_COLUMN = torch.arange(16)
_CHANNEL = 4 * (_COLUMN % 8 // 2) + 2 * (_COLUMN // 8) + _COLUMN % 2
_LANE, _REGISTER = torch.arange(32)[:, None], torch.arange(4)[None]
_K = (_REGISTER % 2 * 8 + _LANE % 4 * 2)[..., None] + torch.arange(2)
_N = (_REGISTER // 2 * 8 + _LANE // 4)[..., None].expand(32, 4, 2)
# The tap of each row of a window: pairs (dy, 0), (dy, 1) and (dy, 2), nothing.
_WINDOW = torch.tensor([0, 1, 2, 9, 3, 4, 5, 9, 6, 7, 8, 9, 9, 9, 9, 9])


def _power(exponent: Tensor) -> Tensor:
    return torch.exp2(exponent.nan_to_num().clamp(_LOW, _HIGH))


def _up(w: Tensor) -> Tensor:
    """The power of two that puts the largest entry into [256, 512)."""
    return _power(9 - torch.frexp(w.abs().amax())[1].double())


def _fragments(matrices: Tensor, up: Tensor) -> Tensor:
    """`[..., 16, 16]` (k, n) as fragments of an mma's second operand, high and low halves; int32 `[..., 2, 32, 4]`."""
    scaled = matrices * up
    high = scaled.half()
    parts = torch.stack([high, (scaled - high.double()).half()], -3)
    k, n = _K.to(parts.device), _N.to(parts.device)
    return parts[..., k, n].contiguous().view(torch.int32).squeeze(-1)


def _rms(w: Tensor) -> Tensor:
    """Root mean square over channels of the filters' norms."""
    return w.square().flatten(1).sum(1).mean().sqrt()


def _guesses(w: list[Tensor], norms: list[tuple[Tensor, Tensor, Tensor]], eps: float) -> Tensor:
    """Scales of a1', gu2', a2', gu1' that put a guess of their root mean square at 8, for images of about 0.3 and v of
    about 45."""
    u, v = 0.3, 45.0
    w1, w2, w2_back, w3 = (_rms(f) for f in (w[0], w[1], w[1].transpose(0, 1), w[2].transpose(0, 1)))
    rs1 = rs2 = torch.ones_like(w1)
    if norms:
        (bias1, gain1, _), (bias2, gain2, _) = norms
        gain1, gain2 = (g.square().mean().sqrt() for g in (gain1, gain2))
        rs1 = gain1 * torch.rsqrt((w1 * u).square() + bias1.square().mean() + eps)
        rs2 = gain2 * torch.rsqrt((w2 * 0.5 * gain1).square() + bias2.square().mean() + eps)
    a1 = 0.6 * rs1 * w1 * v
    n2 = rs2 * w2 * a1
    c, c1 = 0.5 * w3 * u, 0.5 * w3 * v
    gu2 = rs2 * (0.3 * c * n2 + 0.6 * c1)
    gu1 = rs1 * (0.3 * w2_back * rs2 * 0.6 * c * rs1 * w1 * v + 0.6 * w2_back * gu2)
    return _power(3 - torch.log2(torch.stack([a1, gu2, 0.6 * n2, gu1])).round())


def _by_window(taps: Tensor) -> Tensor:
    """Filters `[9, 16]` by the rows of a window."""
    return F.pad(taps, (0, 0, 0, 1))[_WINDOW.to(taps.device)]


def _by_tap(taps: Tensor) -> Tensor:
    """Filters `[9, 16]` from all columns to nine numbers."""
    return F.pad(taps.T, (0, 7))


def pack(form: ConvChainForm) -> Tensor:
    """A network's parameters in the kernel's layout, int32; PyTorch's operations, without synchronizing.

    Filters and biases before a LayerNorm are centered over their outputs, in float64.
    """
    net: Any = form.net
    w = [m.weight.detach().double().flatten(2) for m in net.convs]
    w[0], w[2] = w[0] * net.gain, w[2] / net.gain
    biases = [m.bias.detach().double() for m in net.convs][:2]
    if net.norm == "pixel":
        w[:2] = [f - f.mean(0, keepdim=True) for f in w[:2]]
        biases = [b - b.mean() for b in biases]
        gains = [(m.weight.detach().double(), m.bias.detach().double()) for m in net.norms]
        norms = [(b, *g) for b, g in zip(biases, gains, strict=True)]
    else:
        norms = []
    pad = CHANNELS - len(w[0])
    channel = _CHANNEL.to(w[0].device)
    first, last = (F.pad(f, (0, 0, 0, pad))[channel].T for f in (w[0][:, 0], -0.5 * w[2][0]))  # [tap, column]
    inner = F.pad(w[1], (0, 0, 0, pad, 0, pad))[channel][:, channel].permute(2, 1, 0)  # [tap, in, out]
    ups = [_up(f) for f in (first, inner, last)]
    fragments = [
        _fragments(inner, ups[1]),
        _fragments(inner.flip(0).transpose(1, 2), ups[1]),
        _fragments(_by_window(first), ups[0]),
        _fragments(_by_window(last.flip(0)), ups[2]),
        _fragments(_by_tap(first.flip(0)), ups[0]),
        _fragments(_by_tap(last), ups[2]),
    ]
    vectors = [F.pad(t, (0, pad)) for t in (norms[0] + norms[1] if norms else [biases[0], *[biases[0] * 0] * 5])]
    guesses = _guesses(w, norms, float(net.norms[0].eps) if norms else 0.0)
    numbers = torch.stack([1 / ups[0], 1 / ups[1], 1 / ups[2], ups[1], ups[2], *guesses])
    floats = torch.cat([*vectors, F.pad(numbers, (0, _NUMBERS - len(numbers)))]).float()
    return torch.cat([*(f.flatten() for f in fragments), floats.view(torch.int32)])


def unsupported_reason(form: ConvChainForm) -> str | None:
    """None if the kernel covers this network, otherwise the reason."""
    net: Any = form.net
    if form.head != "red" or len(net.convs) != 3 or net.norm == "image" or net.convs[0].out_channels > CHANNELS:
        return f"it has three layers, up to {CHANNELS} channels, the head red, and no LayerNorm or one over pixels."
    return None


@dataclass(frozen=True)
class FusedHvp:
    """Products with the Hessian at a point: `u` `[B, H, W]`, `z` and `g` `[B, H, W, 16]` of layers 2 and 1."""

    launcher: Launcher
    how: Plan
    packed: Tensor
    u: Tensor
    z: Tensor
    g: Tensor
    u_max: Tensor
    alpha: float
    eps: float
    channels: int
    norm: bool
    multiprocessors: int

    def moved(self, put: Callable[[Tensor], Tensor]) -> FusedHvp:
        """A copy that reads `put(t)` instead of each tensor t."""
        names = ("packed", "u", "z", "g", "u_max")
        return replace(self, **{n: put(getattr(self, n)) for n in names})

    def product(self, v: Tensor) -> Tensor:
        """`hess r v`, `[B, 1, H, W]`."""
        hold(self)
        count, height, width = self.u.shape
        out = torch.empty_like(v)
        if count == 0:
            return out
        v_max = largest(v)
        state = torch.zeros(5, count, dtype=torch.int32, device=v.device)
        active = mask_bytes(active_mask(v))
        parts = bands(count, self.how.strips, height, self.multiprocessors)
        blocks = min(self.multiprocessors, count * self.how.strips * parts)
        tensors = (self.u, v, self.z, self.g, out, self.u_max, v_max, active, state[0], state[1:], self.packed)
        pointers = [np.uint64(0 if t is None else t.data_ptr()) for t in tensors]
        floats = [np.float32(x) for x in (self.alpha, self.eps, 1 / self.channels)]
        kernel = kernel_name(self.norm)
        # The second and third launch repeat images whose numbers overflowed.
        for attempt, name in enumerate((kernel, f"{kernel}_measure", kernel)):
            numbers = [np.int32(n) for n in (height, width, count, parts, attempt)]
            self.launcher.launch(name, blocks, 32 * self.how.blocks, self.how.shared, [*pointers, *floats, *numbers])
        return out


def largest(images: Tensor) -> Tensor:
    """The largest absolute value of each image, `[B]`."""
    return torch.linalg.vector_norm(images.flatten(1), torch.inf, 1)


@dataclass(frozen=True)
class Machine:
    """What a launch depends on: multiprocessors, shared memory of a block, and the compiled kernels of a plan."""

    multiprocessors: int
    shared_limit: int
    launcher: Callable[[Plan, bool], Launcher]


def machine_of(device: torch.device) -> Machine | None:
    """The GPU; None without one."""
    if device.type != "cuda":
        return None
    count = torch.cuda.get_device_properties(device).multi_processor_count
    return Machine(count, nvrtc.shared_limit(device), lambda how, norm: nvrtc.module(SOURCE, how.options(norm), device))


def find(form: ConvChainForm, saved: SavedActivations, options: ChainOptions) -> FusedHvp | None:
    """The products at a point with these saved activations, or None if they are not asked for or not covered."""
    covered = options.fused and unsupported_reason(form) is None
    if not covered or (options.precision, options.storage) != ("tf32x3", "float32") or not len(saved.c):
        return None
    machine = machine_of(saved.c.device)
    return None if machine is None else build(form, saved, machine)


def build(form: ConvChainForm, saved: SavedActivations, machine: Machine, most: int = MOST_BLOCKS) -> FusedHvp:
    """The products at a point, in strips of at most `16 most` columns."""
    net: Any = form.net
    norm = net.norm == "pixel"
    how = plan(saved.c.shape[-1], machine.shared_limit, most)
    return FusedHvp(
        machine.launcher(how, norm), how, pack(form), saved.c, saved.z[2], saved.g[1], largest(saved.c),
        float(form.alpha), float(net.norms[0].eps) if norm else 0.0, net.convs[0].out_channels, norm,
        machine.multiprocessors,
    )  # fmt: skip
