"""What is timed: sizes, and what a case is made of."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from ..backend import use_backend
from ..lipschitz import spectrum
from ..regularizers import RED
from .timing import Timed

INPUTS = 3
"""Inputs that take turns, so that none stays in the caches by being the only one."""


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

    def regularizer(self) -> RED:
        """A regularizer with all weights random. Its Hessian has eigenvalues of both signs."""
        reg = RED(self.channels, self.depth, self.norm, seed=self.seed)
        g = torch.Generator().manual_seed(self.seed)
        with torch.no_grad():
            for p in reg.parameters():
                p.add_(0.05 * torch.randn(p.shape, generator=g))
        return reg

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
        """`INPUTS` batches of smooth images with a little noise."""
        g = torch.Generator().manual_seed(1000 * self.seed + stream)
        found = []
        for _ in range(INPUTS):
            coarse = torch.rand(self.batch, 1, 6, 6, generator=g)
            x = torch.nn.functional.interpolate(coarse, self.size, mode="bicubic")
            found.append((x + 0.02 * torch.randn(x.shape, generator=g)).contiguous())
        return found

    @property
    def pixels(self) -> int:
        """Of the batch."""
        return self.batch * self.size**2

    def sweep_flops(self) -> int:
        """Multiply-adds (two flops) of a forward and a backward pass of the convolutions, as direct sums."""
        c = self.channels
        return 2 * 2 * self.pixels * 9 * (2 * c + (self.depth - 2) * c * c)


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
