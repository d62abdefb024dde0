"""What is timed: sizes, and what a case is made of."""

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
"""Inputs that take turns, so that none stays in the caches by being the only one; more of a device's, see `Target`."""


@dataclass(frozen=True)
class Problem:
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
        """A regularizer with all weights random. Its Hessian has eigenvalues of both signs."""
        reg = RED(self.channels, self.depth, self.norm, seed=self.seed)
        g = torch.Generator().manual_seed(self.seed)
        with torch.no_grad():
            for p in reg.parameters():
                p.add_(0.05 * torch.randn(p.shape, generator=g, dtype=torch.float32, device="cpu"))
        return reg.to(self.target.device)

    def solvable(self, images: list[torch.Tensor], reach: float) -> RED:
        """The same with its last convolution scaled so that `||hess s||` is `reach` at the first of `images`.

        With the Hessian of `regularizer` CG meets negative curvature after a few products and would be timed for giving
        up. Below 1 `hess r` is positive there; up to 1.2 the objective still is at what is recovered.
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
        found = []
        for _ in range(self.inputs):
            coarse = torch.rand(self.batch, 1, 6, 6, generator=g, dtype=torch.float32, device="cpu")
            x = torch.nn.functional.interpolate(coarse, self.size, mode="bicubic")
            noise = torch.randn(x.shape, generator=g, dtype=torch.float32, device="cpu")
            found.append((x + 0.02 * noise).contiguous().to(self.target.device))
        return found

    def operator(self, transform: str = "dct") -> SRM:
        """The SRM of these images."""
        return SRM((1, self.size, self.size), transform=transform).to(self.target.device)

    def turns(self, f: Callable[..., Any], *inputs: Sequence[Any]) -> Timed:
        """`f` of the inputs whose turn it is."""
        return lambda k: f(*(xs[k % len(xs)] for xs in inputs))

    def exactly(self, f: Callable[..., torch.Tensor], *tensors: torch.Tensor) -> torch.Tensor:
        """`f` of the tensors in float64, a few images at a time where the target's memory is short."""
        n = self.batch
        if self.target.memory:
            # A graph of the gradient holds about 40 hidden planes.
            n = max(1, min(n, self.target.memory // (40 * 8 * self.channels * self.size**2)))
        parts = [f(*(t[i : i + n].double() for t in tensors)) for i in range(0, self.batch, n)]
        return torch.cat(parts)

    @property
    def inputs(self) -> int:
        """Batches that take turns: twice the target's cache, at least `INPUTS`."""
        return max(INPUTS, min(32, -(-2 * self.target.cache // (4 * self.pixels))))

    @property
    def pixels(self) -> int:
        """Of the batch."""
        return self.batch * self.size**2


@dataclass
class Case:
    """One thing to time. `exact[k]` is the float64 answer to input k; `flops` and `bytes` those that a call needs."""

    name: str
    candidates: dict[str, Timed]
    exact: list[torch.Tensor]
    flops: float = 0.0
    bytes: float = 0.0
    judge: str = "torch, reference"
    """The candidate whose float32 error ours may have twice."""
    others: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    """Peers that do only a part, and that part's float64 answers."""
    missing: dict[str, str] = field(default_factory=dict)
    tolerance: float | None = None
    """Where an answer is defined by a tolerance, the error that every candidate may have."""
    measure: Callable[[torch.Tensor, int], float] | None = None
    """What is held to the tolerance in the place of the relative error: of a flat float64 answer, to input k."""
    notes: dict[str, str] = field(default_factory=dict)
    """How a peer was set, by its name."""
    allowed: dict[str, float] = field(default_factory=dict)
    """Peers that may have a larger error than others, as they compute in a narrower format."""
    least: float = 0.0
    """Bytes that any implementation must move, where `bytes` counts what ours does."""

    def release(self) -> None:
        """Let go of the candidates and the answers, whose tensors the next case needs the memory of."""
        self.candidates, self.exact, self.others, self.measure = {}, [], {}, None


def under(name: str, f: Callable[[], Any]) -> Any:
    """`f()` under that backend."""
    with use_backend(name):
        return f()


def timed_under(name: str, f: Timed) -> Timed:
    """`f`, to be timed under that backend."""

    def timed(k: int) -> object:
        with use_backend(name):
            return f(k)

    return timed


def double(reg: RED) -> RED:
    """A copy in float64."""
    return copy.deepcopy(reg).double()


def flat(answer: object) -> torch.Tensor:
    """Any candidate's answer as one float64 vector."""
    if isinstance(answer, torch.Tensor):
        return answer.detach().double().flatten()
    if isinstance(answer, (list, tuple)):
        return torch.cat([flat(a) for a in answer])
    return torch.from_numpy(np.array(answer, dtype=np.float64)).flatten()
