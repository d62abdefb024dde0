"""The table of cases: what is timed, against whom, and the float64 answer that all of them must give."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ..backend import use_backend
from ..implicit import AdjointOptions, hypergradient, solve_adjoint
from ..lipschitz import beta_hat
from ..operators import SRM
from ..regularizers import RED
from ..solvers import PGDOptions
from . import peers
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

    def regularizer(self) -> RED:
        """A regularizer with all weights random: `h` is of the size of the image, and the Hessian is positive."""
        reg = RED(self.channels, self.depth, self.norm, seed=self.seed)
        g = torch.Generator().manual_seed(self.seed)
        with torch.no_grad():
            for p in reg.parameters():
                p.add_(0.05 * torch.randn(p.shape, generator=g))
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


def _with(name: str, f: Callable[[], Any]) -> Any:
    with use_backend(name):
        return f()


def _in(name: str, f: Timed) -> Timed:
    def timed(k: int) -> object:
        with use_backend(name):
            return f(k)

    return timed


def _double(reg: RED) -> RED:
    return copy.deepcopy(reg).double()


def _jax(reg: RED) -> tuple[peers.Jax | None, dict[str, str]]:
    if peers.jax_available():
        return peers.Jax(reg), {}
    return None, {"jax": "pip install 'deepreg-fast[bench]'"}


def gradient(p: Problem) -> Case:
    """`grad r(x)`."""
    reg, xs = p.regularizer(), p.images(1)
    best, func = peers.BestTorch(reg), peers.func_grad(reg)
    found: dict[str, Timed] = {
        "ours": _in("cpu", lambda k: reg.value_and_grad(xs[k % INPUTS])[1]),
        "torch, reference": _in("reference", lambda k: reg.value_and_grad(xs[k % INPUTS])[1]),
        "torch, best": lambda k: best.grad(xs[k % INPUTS]),
        "torch.func": lambda k: func(xs[k % INPUTS]),
    }
    jax, missing = _jax(reg)
    if jax is not None:
        runs = [jax.grad(x) for x in xs]
        found["jax"] = lambda k: runs[k % INPUTS]()
    try:
        compiled = peers.compiled_grad(reg)
        compiled(xs[0])
        found["torch.compile"] = lambda k: compiled(xs[k % INPUTS])
    except Exception as error:  # whatever a compiler lacks here is reported, not raised
        missing["torch.compile"] = f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"
    exact = [_double(reg).value_and_grad(x.double())[1] for x in xs]
    return Case("gradient", found, exact, p.sweep_flops(), 8 * p.pixels, missing=missing)


def hvp(p: Problem) -> Case:
    """`hess r(x) v` at a fixed point."""
    reg, x, vs = p.regularizer(), p.images(1)[0], p.images(2)
    ours, reference = _with("cpu", lambda: reg.linearize(x)), _with("reference", lambda: reg.linearize(x))
    best, func = peers.BestTorch(reg).products(x)[0], peers.func_hvp(reg, x)
    found: dict[str, Timed] = {
        "ours": lambda k: ours.hvp(vs[k % INPUTS]),
        "torch, reference": lambda k: reference.hvp(vs[k % INPUTS]),
        "torch, best": lambda k: best(vs[k % INPUTS]),
        "torch.func": lambda k: func(vs[k % INPUTS]),
    }
    jax, missing = _jax(reg)
    if jax is not None:
        found["jax"] = jax.hvp(x, vs)
    lin = _double(reg).linearize(x.double())
    c = -(-p.channels // 16) * 16
    kept = p.pixels * 4 * (2 * (p.depth - 1) * c + 1)
    return Case("hvp", found, [lin.hvp(v.double()) for v in vs], p.sweep_flops(), 8 * p.pixels + kept, missing=missing)


def theta(p: Problem) -> Case:
    """`d/dtheta <grad r(x), v>`."""
    reg, x, vs = p.regularizer(), p.images(1)[0], p.images(2)
    ours, reference = _with("cpu", lambda: reg.linearize(x)), _with("reference", lambda: reg.linearize(x))
    best = peers.BestTorch(reg).products(x)[1]
    found: dict[str, Timed] = {
        "ours": lambda k: list(ours.param_vjp(vs[k % INPUTS]).values()),
        "torch, reference": lambda k: list(reference.param_vjp(vs[k % INPUTS]).values()),
        "torch, best": lambda k: best(vs[k % INPUTS]),
    }
    lin = _double(reg).linearize(x.double())
    exact = [torch.cat([t.flatten() for t in lin.param_vjp(v.double()).values()]) for v in vs]
    return Case("theta", found, exact, 2 * p.sweep_flops(), 8 * p.pixels)


def _srm(transform: str) -> Callable[[Problem], Iterator[Case]]:
    def cases(p: Problem) -> Iterator[Case]:
        A, xs, gamma = SRM((1, p.size, p.size), transform=transform), p.images(3), 2.0
        A64 = copy.deepcopy(A).double()
        ys = [A.A(x) for x in p.images(4)]
        products: dict[str, tuple[Callable[[SRM, torch.Tensor, torch.Tensor], torch.Tensor], int]] = {
            "forward": (lambda op, x, y: op.A(x), 1),
            "adjoint": (lambda op, x, y: op.A_adjoint(y), 1),
            "prox": (lambda op, x, y: op.prox_l2(x, y, gamma), 2),
        }
        for name, (f, transforms) in products.items():
            found: dict[str, Timed] = {
                b: _in(n, lambda k, f=f: f(A, xs[k % INPUTS], ys[k % INPUTS]))
                for b, n in (("ours", "cpu"), ("torch, reference", "reference"))
            }
            others: dict[str, list[torch.Tensor]] = {}
            if transform == "dct":
                import scipy.fft

                alone = f"scipy, {'two transforms' if transforms == 2 else 'the transform'} alone"

                def dctn(k: int, n: int = transforms) -> torch.Tensor:
                    z = xs[k % INPUTS].numpy()
                    for i in range(n):
                        z = (scipy.fft.dctn, scipy.fft.idctn)[i](z, axes=(2, 3), norm="ortho")
                    return torch.from_numpy(z)

                found[alone] = dctn
                whole = [x.double() for x in xs]
                if transforms == 1:
                    whole = [torch.from_numpy(scipy.fft.dctn(x.numpy(), axes=(2, 3), norm="ortho")) for x in whole]
                others[alone] = whole
            target = torch.empty_like(xs[0])
            found["a copy of the image"] = lambda k, t=target: t.copy_(xs[k % INPUTS])
            others["a copy of the image"] = [x.double() for x in xs]
            exact = [f(A64, x.double(), y.double()) for x, y in zip(xs, ys, strict=True)]
            yield Case(f"{transform} {name}", found, exact, 0.0, 8 * p.pixels, others=others)

    return cases


def cg(p: Problem) -> Case:
    """The adjoint system to a true residual of 1e-4, preconditioned."""
    reg, x, bs = p.regularizer(), p.images(1)[0], [0.1 * b for b in p.images(2)]
    A, mu, options = SRM((1, p.size, p.size)), torch.full((p.batch,), 0.1), AdjointOptions("cg", 200, 1e-4)
    best = peers.BestTorch(reg)
    hvps = {
        "ours": _with("cpu", lambda: reg.linearize(x)),
        "torch, reference": _with("reference", lambda: reg.linearize(x)),
    }

    class _Best:
        hvp = staticmethod(best.products(x)[0])

    def solver(lin: Any, name: str) -> Timed:
        return _in(name, lambda k: solve_adjoint(lin, A, mu, bs[k % INPUTS], options).x)

    found = {n: solver(lin, "cpu" if n == "ours" else "reference") for n, lin in hvps.items()}
    found["torch, best"] = solver(_Best(), "reference")
    lin, A64, tight = _double(reg).linearize(x.double()), copy.deepcopy(A).double(), AdjointOptions("cg", 1000, 1e-10)
    exact = [solve_adjoint(lin, A64, mu.double(), b.double(), tight).x for b in bs]
    return Case("cg", found, exact, tolerance=1e-2)


def step(p: Problem) -> Case:
    """What one visit of the training computes: a recovery from cold, gamma, the gradients, the penalty's ascent."""
    reg, xs, mu = p.regularizer(), p.images(5), 0.1
    A, pgd, adjoint = SRM((1, p.size, p.size)), PGDOptions(100, 1e-3, "anderson"), AdjointOptions("cg", 12, 1e-2)
    deltas = [0.05 * torch.randn(x.shape, generator=torch.Generator().manual_seed(6)) for x in xs]

    def visit(k: int, r: RED = reg, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
        x, delta = xs[k % INPUTS].to(dtype), deltas[k % INPUTS].to(dtype)
        hg = hypergradient(x, A.A(x), A, r, mu, options=pgd, adjoint=adjoint)
        point = beta_hat(r, x, delta)
        delta, _ = point.ascend(delta.flatten(1).norm(dim=1))
        push = beta_hat(r, x, delta).grad_theta(torch.ones(len(x), dtype=dtype))
        return [hg.theta[n] + push[n] for n in hg.theta]

    found: dict[str, Timed] = {"ours": _in("cpu", visit), "torch, reference": _in("reference", visit)}
    wide = _double(reg)
    exact = [torch.cat([t.flatten() for t in visit(k, wide, torch.float64)]) for k in range(INPUTS)]
    return Case("step", found, exact, tolerance=5e-2)


def _one(f: Callable[[Problem], Case]) -> Callable[[Problem], Iterator[Case]]:
    def cases(p: Problem) -> Iterator[Case]:
        yield f(p)

    return cases


CASES: dict[str, Callable[[Problem], Iterator[Case]]] = {
    "gradient": _one(gradient),
    "hvp": _one(hvp),
    "theta": _one(theta),
    "dct": _srm("dct"),
    "hadamard": _srm("hadamard"),
    "walsh": _srm("walsh"),
    "cg": _one(cg),
    "step": _one(step),
}


def flat(answer: object) -> torch.Tensor:
    """Any candidate's answer as one float64 vector."""
    if isinstance(answer, torch.Tensor):
        return answer.detach().double().flatten()
    if isinstance(answer, (list, tuple)):
        return torch.cat([flat(a) for a in answer])
    return torch.from_numpy(np.array(answer, dtype=np.float64)).flatten()
