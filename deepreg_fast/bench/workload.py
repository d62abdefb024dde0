"""Benchmark problems and cases."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from ..backend import use_backend
from ..operators import SRM
from ..regularizers import RED
from ..regularizers.lipschitz import spectrum
from .target import CPU, Target
from .timing import Timed

INPUTS = 3
"""Minimum number of inputs that alternate, so that none stays in the caches; on a device more, see `Target`."""


@dataclass(frozen=True)
class Workload:
    """Sizes: `batch` gray images of `size` x `size`; a conv chain of `depth` layers and `channels` channels."""

    batch: int = 8
    size: int = 180
    channels: int = 16
    depth: int = 3
    norm: str = "pixel"
    seed: int = 0
    learned_regularizers: Path | None = None
    """A checkout of LearnedRegularizers, a peer of the case `step`."""
    target: Target = CPU

    def regularizer(self) -> RED:
        """A regularizer with random weights. Its Hessian has eigenvalues of both signs."""
        reg = RED(self.channels, self.depth, self.norm, seed=self.seed)
        g = torch.Generator().manual_seed(self.seed)
        with torch.no_grad():
            for p in reg.parameters():
                p.add_(0.05 * torch.randn(p.shape, generator=g, dtype=torch.float32, device="cpu"))
        return reg.to(self.target.device)

    def solvable(self, images: list[torch.Tensor], reach: float) -> RED:
        """`regularizer()` with its last convolution scaled so that `||hess s||` is `reach` at the first of `images`.

        With the unscaled Hessian CG finds negative curvature after a few products and stops early. For `reach` below 1,
        `hess r` is positive definite there; up to 1.2 the objective is still convex at the recovered images.
        """
        reg = self.regularizer()
        low, high = spectrum(reg, images[0], steps=40)
        last = cast(torch.nn.Conv2d, reg.net.convs[-1])
        with torch.no_grad():
            for p in last.parameters():
                p.mul_(reach / float(torch.maximum(-low, high).max()))
        return reg

    def images(self, stream: int) -> list[torch.Tensor]:
        """`inputs` batches of smooth images with a little noise, drawn on the CPU."""
        g = torch.Generator().manual_seed(1000 * self.seed + stream)
        batches = []
        for _ in range(self.inputs):
            coarse = torch.rand(self.batch, 1, 6, 6, generator=g, dtype=torch.float32, device="cpu")
            x = torch.nn.functional.interpolate(coarse, self.size, mode="bicubic")
            noise = torch.randn(x.shape, generator=g, dtype=torch.float32, device="cpu")
            batches.append((x + 0.02 * noise).contiguous().to(self.target.device))
        return batches

    def operator(self, transform: str = "dct") -> SRM:
        """The SRM for these images."""
        return SRM((1, self.size, self.size), transform=transform).to(self.target.device)

    def turns(self, f: Callable[..., Any], *inputs: Sequence[Any]) -> Timed:
        """A function of the round that calls `f` with alternating inputs."""
        return lambda k: f(*(xs[k % len(xs)] for xs in inputs))

    def exactly(self, f: Callable[..., torch.Tensor], *tensors: torch.Tensor) -> torch.Tensor:
        """`f` of the tensors in float64, with a few images at a time if the target's memory is limited."""
        n = self.batch
        if self.target.memory:
            # A graph of the gradient holds about 40 hidden planes.
            n = max(1, min(n, self.target.memory // (40 * 8 * self.channels * self.size**2)))
        parts = [f(*(t[i : i + n].double() for t in tensors)) for i in range(0, self.batch, n)]
        return torch.cat(parts)

    @property
    def inputs(self) -> int:
        """Number of alternating batches: twice the target's cache, at least `INPUTS`."""
        return max(INPUTS, min(32, -(-2 * self.target.cache // (4 * self.pixels))))

    @property
    def pixels(self) -> int:
        """Number of pixels of the batch."""
        return self.batch * self.size**2


@dataclass
class Case:
    """One benchmark case. `exact[k]` is the float64 result for input k; `flops` and `bytes` are counts of one call."""

    name: str
    candidates: dict[str, Timed]
    exact: list[torch.Tensor]
    flops: float = 0.0
    bytes: float = 0.0
    judge: str = "torch, reference"
    """The candidate whose float32 error, doubled, is the limit of our error."""
    others: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    """Float64 results of peers that compute something else, such as only a part."""
    missing: dict[str, str] = field(default_factory=dict)
    tolerance: float | None = None
    """The allowed error of every candidate, if the result is defined by a tolerance."""
    measure: Callable[[torch.Tensor, int], float] | None = None
    """Error measure that replaces the relative error: a function of the flat float64 result and the input's number."""
    notes: dict[str, str] = field(default_factory=dict)
    """Notes on the settings of peers, by name."""
    allowed: dict[str, float] = field(default_factory=dict)
    """Larger allowed errors of peers that compute in a narrower format."""
    least: float = 0.0
    """Bytes that any implementation must move, if `bytes` counts those of our kernel."""

    def release(self) -> None:
        """Free the memory of the candidates and the results for the next case."""
        self.candidates, self.exact, self.others, self.measure = {}, [], {}, None


def under(name: str, f: Callable[[], Any]) -> Any:
    """`f()` with backend `name`."""
    with use_backend(name):
        return f()


def timed_under(name: str, f: Timed) -> Timed:
    """`f`, to be timed with backend `name`."""

    def timed(k: int) -> object:
        with use_backend(name):
            return f(k)

    return timed


def double(reg: RED) -> RED:
    """A copy in float64."""
    return copy.deepcopy(reg).double()


def flat(answer: object) -> torch.Tensor:
    """Any candidate's result as one float64 vector."""
    if isinstance(answer, torch.Tensor):
        return answer.detach().double().flatten()
    if isinstance(answer, (list, tuple)):
        return torch.cat([flat(a) for a in answer])
    return torch.from_numpy(np.array(answer, dtype=np.float64)).flatten()
