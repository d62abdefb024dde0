"""The table of benchmark cases: candidates and the float64 result that each must reproduce."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import torch

from ..operators import SRM
from ..regularizers import RED
from . import counts, peers
from .solver_cases import cg, recovery, step
from .timing import Timed
from .workload import Case, Workload, double, timed_under, under


def _jax(reg: RED) -> tuple[peers.Jax | None, dict[str, str]]:
    reason = peers.why_no_jax(reg.net.convs[0].weight.device)  # type: ignore[arg-type]
    if reason is None:
        return peers.Jax(reg), {}
    return None, {"jax": reason}


def gradient(p: Workload) -> Case:
    """`grad r(x)`."""
    reg, xs = p.regularizer(), p.images(1)
    best, func = peers.BestTorch(reg), peers.func_grad(reg)
    candidates: dict[str, Timed] = {
        "ours": timed_under(p.target.ours, p.turns(lambda x: reg.value_and_grad(x)[1], xs)),
        "torch, reference": timed_under("reference", p.turns(lambda x: reg.value_and_grad(x)[1], xs)),
        "torch, best": p.turns(best.grad, xs),
        "torch.func": p.turns(func, xs),
    }
    jax, missing = _jax(reg)
    if jax is not None:
        runs = [jax.grad(x) for x in xs]
        candidates["jax"] = p.turns(lambda run: run(), runs)
    try:
        compiled = peers.compiled_grad(reg)
        compiled(xs[0])
        candidates["torch.compile"] = p.turns(compiled, xs)
    except Exception as error:  # a failing compiler is reported, not raised
        missing["torch.compile"] = one_line(error)
    reg64 = double(reg)
    exact = [p.exactly(lambda x: reg64.value_and_grad(x)[1], x) for x in xs]
    return Case("gradient", candidates, exact, counts.sweep_flops(p), counts.image_bytes(p, 2), missing=missing)


def one_line(error: Exception) -> str:
    """An error as one line of a table."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:100]}"


def hvp(p: Workload) -> Case:
    """`hess r(x) v` at a fixed point."""
    reg, x, vs = p.regularizer(), p.images(1)[0], p.images(2)
    ours, reference = (under(b, lambda: reg.linearize(x)) for b in (p.target.ours, "reference"))
    best, func = peers.BestTorch(reg).products(x)[0], peers.func_hvp(reg, x)
    candidates: dict[str, Timed] = {
        "ours": p.turns(ours.hvp, vs),
        "torch, reference": p.turns(reference.hvp, vs),
        "torch, best": p.turns(best, vs),
        "torch.func": p.turns(func, vs),
    }
    jax, missing = _jax(reg)
    if jax is not None:
        candidates["jax"] = jax.hvp(x, vs)
    reg64 = double(reg)
    exact = [p.exactly(lambda x, v: reg64.linearize(x).hvp(v), x, v) for v in vs]
    moved = counts.image_bytes(p, 3) + counts.saved_bytes_cpu(p)
    return Case("hvp", candidates, exact, counts.sweep_flops(p), moved, missing=missing)


def theta(p: Workload) -> Case:
    """`d/dtheta <grad r(x), v>`."""
    reg, x, vs = p.regularizer(), p.images(1)[0], p.images(2)
    ours, reference = (under(b, lambda: reg.linearize(x)) for b in (p.target.ours, "reference"))
    best = peers.BestTorch(reg).products(x)[1]
    candidates: dict[str, Timed] = {
        "ours": p.turns(lambda v: list(ours.param_vjp(v).values()), vs),
        "torch, reference": p.turns(lambda v: list(reference.param_vjp(v).values()), vs),
        "torch, best": p.turns(best, vs),
    }
    reg64 = double(reg)

    def parameters(x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.cat([t.flatten() for t in reg64.linearize(x).param_vjp(v).values()])[None]

    exact = [p.exactly(parameters, x, v).sum(0) for v in vs]
    return Case("theta", candidates, exact, 2 * counts.sweep_flops(p), counts.image_bytes(p, 2))


Product = Callable[[SRM, torch.Tensor, torch.Tensor], torch.Tensor]
PRODUCTS: dict[str, tuple[Product, int]] = {
    "forward": (lambda op, x, y: op.A(x), 1),
    "adjoint": (lambda op, x, y: op.A_adjoint(y), 1),
    "prox": (lambda op, x, y: op.prox_l2(x, y, 2.0), 2),
}
"""The timed products of an SRM, and their numbers of transforms."""


def srm_case(p: Workload, transform: str, name: str, product: Product) -> Case:
    """One product of an SRM, compared with torch's and with a copy of the image."""
    A, xs = p.operator(transform), p.images(3)
    A64 = copy.deepcopy(A).double()
    ys = [A.A(x) for x in p.images(4)]
    candidates: dict[str, Timed] = {
        b: timed_under(n, p.turns(lambda x, y: product(A, x, y), xs, ys))
        for b, n in (("ours", p.target.ours), ("torch, reference", "reference"))
    }
    target = torch.empty_like(xs[0])
    candidates["a copy of the image"] = p.turns(target.copy_, xs)
    exact = [product(A64, x.double(), y.double()) for x, y in zip(xs, ys, strict=True)]
    others = {"a copy of the image": [x.double() for x in xs]}
    return Case(f"{transform} {name}", candidates, exact, 0.0, counts.image_bytes(p, 2), others=others)


def _srm(transform: str) -> Callable[[Workload], Iterator[Case]]:
    def cases(p: Workload) -> Iterator[Case]:
        for name, (product, transforms) in PRODUCTS.items():
            case = srm_case(p, transform, name, product)
            if transform == "dct":
                _add_scipy(case, p.images(3), transforms)
            yield case

    return cases


def _add_scipy(case: Case, xs: list[torch.Tensor], transforms: int) -> None:
    import scipy.fft

    name = f"scipy, {'two transforms' if transforms == 2 else 'the transform'} alone"

    def dctn(k: int) -> torch.Tensor:
        z = xs[k % len(xs)].numpy()
        for i in range(transforms):
            z = (scipy.fft.dctn, scipy.fft.idctn)[i](z, axes=(2, 3), norm="ortho")
        return torch.from_numpy(z)

    exact = [x.double() for x in xs]
    if transforms == 1:
        exact = [torch.from_numpy(scipy.fft.dctn(x.numpy(), axes=(2, 3), norm="ortho")) for x in exact]
    case.candidates[name], case.others[name] = dctn, exact


def one(f: Callable[[Workload], Case]) -> Callable[[Workload], Iterator[Case]]:
    """A table entry with a single case."""

    def cases(p: Workload) -> Iterator[Case]:
        yield f(p)

    return cases


CASES: dict[str, Callable[[Workload], Iterator[Case]]] = {
    "gradient": one(gradient),
    "hvp": one(hvp),
    "theta": one(theta),
    "dct": _srm("dct"),
    "hadamard": _srm("hadamard"),
    "walsh": _srm("walsh"),
    "cg": one(cg),
    "recover": one(recovery),
    "step": one(step),
}
