"""The table of cases: what is timed, against whom, and the float64 answer that all of them must give."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import torch

from ..operators import SRM
from ..regularizers import RED
from . import peers
from .problem import INPUTS, Case, Problem, double, timed_under, under
from .solver_cases import cg, recovery, step
from .timing import Timed


def _jax(reg: RED) -> tuple[peers.Jax | None, dict[str, str]]:
    if peers.jax_available():
        return peers.Jax(reg), {}
    return None, {"jax": "pip install 'deepreg-fast[bench]'"}


def gradient(p: Problem) -> Case:
    """`grad r(x)`."""
    reg, xs = p.regularizer(), p.images(1)
    best, func = peers.BestTorch(reg), peers.func_grad(reg)
    found: dict[str, Timed] = {
        "ours": timed_under("cpu", lambda k: reg.value_and_grad(xs[k % INPUTS])[1]),
        "torch, reference": timed_under("reference", lambda k: reg.value_and_grad(xs[k % INPUTS])[1]),
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
    exact = [double(reg).value_and_grad(x.double())[1] for x in xs]
    return Case("gradient", found, exact, p.sweep_flops(), 8 * p.pixels, missing=missing)


def hvp(p: Problem) -> Case:
    """`hess r(x) v` at a fixed point."""
    reg, x, vs = p.regularizer(), p.images(1)[0], p.images(2)
    ours, reference = under("cpu", lambda: reg.linearize(x)), under("reference", lambda: reg.linearize(x))
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
    lin = double(reg).linearize(x.double())
    # What is kept of the hidden layers, and h (csrc/cpu/sweep.h).
    kept = p.pixels * 4 * (2 * (p.depth - 2) * p.channels + 2 * (p.depth - 1) * (p.norm == "pixel") + 1)
    return Case("hvp", found, [lin.hvp(v.double()) for v in vs], p.sweep_flops(), 12 * p.pixels + kept, missing=missing)


def theta(p: Problem) -> Case:
    """`d/dtheta <grad r(x), v>`."""
    reg, x, vs = p.regularizer(), p.images(1)[0], p.images(2)
    ours, reference = under("cpu", lambda: reg.linearize(x)), under("reference", lambda: reg.linearize(x))
    best = peers.BestTorch(reg).products(x)[1]
    found: dict[str, Timed] = {
        "ours": lambda k: list(ours.param_vjp(vs[k % INPUTS]).values()),
        "torch, reference": lambda k: list(reference.param_vjp(vs[k % INPUTS]).values()),
        "torch, best": lambda k: best(vs[k % INPUTS]),
    }
    lin = double(reg).linearize(x.double())
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
                b: timed_under(n, lambda k, f=f: f(A, xs[k % INPUTS], ys[k % INPUTS]))
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
    "recover": _one(recovery),
    "step": _one(step),
}
