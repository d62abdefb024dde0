"""Sweeps of a conv chain in one launch each, by `csrc/cuda/conv_chain.cu` (docs/kernels.md).

They cover networks 1 -> C -> C -> 1 with C <= 16 and the head red, without a LayerNorm or with one over the channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ...functional.conv_chain import ConvChainForm
from ..active import active_mask, mask_bytes
from . import nvrtc
from .fused_pack import CHANNELS, NUMBERS, pack
from .memory import hold
from .packed import packed

if TYPE_CHECKING:
    from .activations import SavedActivations
    from .chain_options import ChainOptions

SOURCE = "conv_chain.cu"
SWEEPS = ("hvp", "gradient")
MOST_BLOCKS, ROWS, REACH = 12, 3, 3


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

    def options(self, sweep: str, norm: bool) -> tuple[str, ...]:
        """Compiler options for the kernels of a sweep with or without a LayerNorm."""
        return (f"-DCHAIN_BLOCKS={self.blocks}", f"-DCHAIN_NORM={int(norm)}", f"-DCHAIN_SWEEP={SWEEPS.index(sweep)}")


def kernel_name(sweep: str, norm: bool) -> str:
    """A sweep's kernel."""
    return f"chain_{sweep}_norm" if norm else f"chain_{sweep}"


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
    return 4 * (rings + taps + pairs + 22 * 256 + 96 + NUMBERS)


def bands(images: int, strips: int, height: int, multiprocessors: int) -> int:
    """The bands of rows of an image that make the busiest multiprocessor process the fewest rows."""

    def rows(n: int) -> int:
        return -(-images * strips * n // multiprocessors) * (-(-height // n) + 2 * REACH)

    return min(range(1, max(1, height // 8) + 1), key=rows)


def unsupported_reason(form: ConvChainForm) -> str | None:
    """None if the kernel covers this network, otherwise the reason."""
    net: Any = form.net
    if form.head != "red" or len(net.convs) != 3 or net.norm == "image" or net.convs[0].out_channels > CHANNELS:
        return f"it has three layers, up to {CHANNELS} channels, the head red, and no LayerNorm or one over pixels."
    return None


@dataclass(frozen=True)
class Machine:
    """A GPU: multiprocessors, shared memory of a block, and the compiled kernels for compiler options."""

    multiprocessors: int
    shared_limit: int
    launcher: Callable[[tuple[str, ...]], Launcher]


def machine_of(device: torch.device) -> Machine | None:
    """The GPU; None without one."""
    if device.type != "cuda":
        return None
    count = torch.cuda.get_device_properties(device).multi_processor_count
    return Machine(count, nvrtc.shared_limit(device), lambda options: nvrtc.module(SOURCE, options, device))


@dataclass(frozen=True)
class Chain:
    """A network's packed parameters and numbers, and the launch for images of one size."""

    machine: Machine
    how: Plan
    packed: Tensor
    alpha: float
    eps: float
    channels: int
    norm: bool

    def launch(self, sweep: str, like: Tensor, tensors: Sequence[Tensor | None]) -> None:
        """Launch a sweep over images shaped as `like` `[B, H, W]`, with its first arguments."""
        hold(self)
        count, height, width = like.shape
        state = torch.zeros(5, count, dtype=torch.int32, device=like.device)
        tensors = (*tensors, mask_bytes(active_mask(like)), state[0], state[1:], self.packed)
        parts = bands(count, self.how.strips, height, self.machine.multiprocessors)
        blocks = min(self.machine.multiprocessors, count * self.how.strips * parts)
        pointers = [np.uint64(0 if t is None else t.data_ptr()) for t in tensors]
        floats = [np.float32(x) for x in (self.alpha, self.eps, 1 / self.channels)]
        kernel = kernel_name(sweep, self.norm)
        launcher = self.machine.launcher(self.how.options(sweep, self.norm))
        # The second and third launch repeat images whose numbers overflowed.
        for attempt, name in enumerate((kernel, f"{kernel}_measure", kernel)):
            numbers = [np.int32(n) for n in (height, width, count, parts, attempt)]
            launcher.launch(name, blocks, 32 * self.how.blocks, self.how.shared, [*pointers, *floats, *numbers])


def chain_of(form: ConvChainForm, width: int, machine: Machine, packed: Tensor, most: int = MOST_BLOCKS) -> Chain:
    """The launch for images of `width` columns, in strips of at most `16 most` columns."""
    net: Any = form.net
    norm = net.norm == "pixel"
    eps = float(net.norms[0].eps) if norm else 0.0
    how = plan(width, machine.shared_limit, most)
    return Chain(machine, how, packed, float(form.alpha), eps, net.convs[0].out_channels, norm)


@dataclass(frozen=True)
class FusedHvp:
    """Products with the Hessian at a point: `u` `[B, H, W]`, `z` and `g` `[B, H, W, 16]` of layers 2 and 1."""

    chain: Chain
    u: Tensor
    z: Tensor
    g: Tensor
    u_max: Tensor

    def moved(self, put: Callable[[Tensor], Tensor]) -> FusedHvp:
        """A copy that reads `put(t)` instead of each tensor t."""
        chain = replace(self.chain, packed=put(self.chain.packed))
        return FusedHvp(chain, *(put(t) for t in (self.u, self.z, self.g, self.u_max)))

    def product(self, v: Tensor) -> Tensor:
        """`hess r v`, `[B, 1, H, W]`."""
        out = torch.empty_like(v)
        if len(v):
            tensors = (self.u, v, self.z, self.g, out, self.u_max, largest(v))
            self.chain.launch("hvp", self.u, tensors)
        return out


def gradient(chain: Chain, u: Tensor, z: Tensor | None = None, g: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The gradient `[B, H, W]`, and the energy `[B, tiles]`, float64, of each 16 pixels; planes to save are written."""
    count, height, _ = u.shape
    out = torch.empty_like(u)
    energies = u.new_empty(count, height * chain.how.strips * chain.how.blocks, dtype=torch.float64)
    if count:
        chain.launch("gradient", u, (u, z, g, out, energies, largest(u)))
    return energies, out


def largest(images: Tensor) -> Tensor:
    """The largest absolute value of each image, `[B]`."""
    return torch.linalg.vector_norm(images.flatten(1), torch.inf, 1)


def chain(form: ConvChainForm, like: Tensor, options: ChainOptions) -> Chain | None:
    """The launch for images `[B, 1, H, W]`, or None if it is not wanted or does not cover the network."""
    if not options.fused or unsupported_reason(form) is not None or not len(like):
        return None
    machine = machine_of(like.device)
    if machine is None or (options.precision, options.storage) != ("tf32x3", "float32"):
        return None
    net: Any = form.net
    modules = (*net.convs, *(net.norms if net.norm == "pixel" else ()))
    parameters = [p for m in modules for p in (m.weight, m.bias)]
    # The list of convolutions is the key, because the network is that of the other kernels' layout.
    settings = (float(net.gain), net.norm)
    [(layout, _)] = packed(net.convs, parameters, settings, like.device, lambda: [(pack(form), parameters[0])])
    return chain_of(form, like.shape[-1], machine, layout)


def value_and_grad(
    form: ConvChainForm, x: Tensor, options: ChainOptions, saved: SavedActivations | None = None
) -> tuple[Tensor, Tensor] | None:
    """The value `[B]` and the gradient, writing the activations to save; None where this sweep does not cover."""
    how = chain(form, x, options)
    if how is None:
        return None
    from ...kernels.conv_chain.pixel_norm import BLOCK, total  # pyright: ignore[reportMissingImports]

    u = (x.detach() - form.center).contiguous()[:, 0] if saved is None else saved.c
    energies, grad = gradient(how, u, *((None, None) if saved is None else (saved.z[2], saved.g[1])))
    value, (count, tiles) = u.new_empty(len(u)), energies.shape
    total[count,](energies, mask_bytes(active_mask(u)), value, tiles, BLOCK=BLOCK, BLOCKS=-(-tiles // BLOCK))
    return value, grad.view(x.shape)


def hvp(form: ConvChainForm, x: Tensor, options: ChainOptions, saved: SavedActivations) -> FusedHvp | None:
    """The products at x; None where this sweep does not cover."""
    how = chain(form, x, options)
    return None if how is None else FusedHvp(how, saved.c, saved.z[2], saved.g[1], largest(saved.c))
