"""Benchmark cases of a CUDA device: those of the CPU with a GPU's peers and counts, and some more."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ..batched.linalg import expand
from ..functional.dct import dct2
from ..functional.walsh import walsh_blocks
from ..inverse.adjoint import ImplicitAdjoint, solve_adjoint
from ..solvers import CGOptions
from . import cases, counts, peers, peers_cuda
from .ceilings import tf32
from .solver_cases import MU, cg, recovery, step, true_residual
from .timing import Timed
from .workload import Case, Workload, double, timed_under, under

Transform = Callable[[torch.Tensor], torch.Tensor]
GRAPH, TF32 = "ours, replayed graph", "torch, best in TF32"


def gradient(p: Workload) -> Case:
    """`grad r(x)`."""
    case = cases.gradient(p)
    _in_tf32(case)
    return _finished(p, case, counts.gradient(p))


def linearize(p: Workload) -> Case:
    """`grad r(x)` and the saved activations for later products."""
    reg, xs = p.regularizer(), p.images(1)
    best, reg64 = peers.BestTorch(reg), double(reg)
    candidates: dict[str, Timed] = {
        n: timed_under(b, p.turns(lambda x: reg.linearize(x).grad, xs))
        for n, b in (("ours", p.target.ours), ("torch, reference", "reference"))
    }
    candidates["torch, best"] = p.turns(lambda x: best.graph(x)[1].detach(), xs)
    exact = [p.exactly(lambda x: reg64.value_and_grad(x)[1], x) for x in xs]
    return _finished(p, Case("linearize", candidates, exact), counts.linearize(p))


def hvp(p: Workload) -> Case:
    """`hess r(x) v` at a fixed point."""
    case, reg, x, vs = cases.hvp(p), p.regularizer(), p.images(1)[0], p.images(2)
    _in_tf32(case)
    compiled, note = peers_cuda.fastest(
        peers_cuda.compiled_products(reg, x), vs[0], lambda f: p.target.clock.measure(lambda _: f(vs[0]), 0, 5)
    )
    if compiled is None:
        case.missing["torch.compile"] = note
    else:
        case.candidates["torch.compile"], case.notes["torch.compile"] = p.turns(compiled, vs), note
    return _finished(p, case, counts.hvp(p))


def theta(p: Workload) -> Case:
    """`d/dtheta <grad r(x), v>`."""
    return _finished(p, cases.theta(p), counts.theta(p))


def _srm(transform: str) -> Callable[[Workload], Iterator[Case]]:
    products: dict[str, tuple[cases.Product, int]] = {
        **cases.PRODUCTS,
        "normal": (lambda op, x, y: op.normal(x), 2),
    }

    def cases_of(p: Workload) -> Iterator[Case]:
        A = p.operator(transform)
        for name, (product, transforms) in products.items():
            case = cases.srm_case(p, transform, name, product)
            if transform == "dct":
                _alone(case, p, "cuFFT", peers_cuda.fft_dct2, dct2, transforms)
            elif transform == "walsh":
                _fast_walsh(case, p, A.block or 1, transforms)
            yield _finished(p, case, counts.srm(p, A, name, transforms))

    return cases_of


def _fast_walsh(case: Case, p: Workload, block: int, times: int) -> None:
    name, reason = "fast_hadamard_transform", peers_cuda.why_no_fast_walsh(block)
    if reason is not None:
        case.missing[name] = reason
        return

    def exact(x: torch.Tensor) -> torch.Tensor:
        return walsh_blocks(x.flatten(1), block).reshape(x.shape)

    _alone(case, p, name, lambda x: peers_cuda.fast_walsh(x, block), exact, times)


def _alone(case: Case, p: Workload, name: str, transform: Transform, exact: Transform, times: int) -> None:
    """Add a peer that computes only the product's transform, applied once or twice."""
    xs = p.images(3)

    def repeated(x: torch.Tensor, f: Transform = transform) -> torch.Tensor:
        for _ in range(times):
            x = f(x)
        return x

    name = f"{name}, {'two transforms' if times == 2 else 'the transform'} alone"
    case.candidates[name], case.others[name] = p.turns(repeated, xs), [repeated(x.double(), exact) for x in xs]


def cg_iteration(p: Workload, steps: int = 16) -> Case:
    """CG with a fixed number of iterations, compared with its Hessian and operator products alone, to show the rest.

    In float32 no image stagnates within these iterations, so all images are active to the end.
    """
    xs, bs = p.images(1), [0.1 * b for b in p.images(2)]
    reg, x, A = p.solvable(xs, 0.9), xs[0], p.operator()
    mu, options = x.new_full((p.batch,), MU), ImplicitAdjoint(CGOptions(steps, 0.0))
    lin = under(p.target.ours, lambda: reg.linearize(x))
    count: Any = _Counted(lin)
    with_counts = timed_under(p.target.ours, lambda k: solve_adjoint(count, A, mu, bs[0], options))
    with_counts(0)
    products = count.products

    def alone(v: torch.Tensor) -> torch.Tensor:
        out = v
        for _ in range(products):
            out = A.normal(v) + expand(mu, v) * lin.hvp(v)
        return out

    def solved(b: torch.Tensor) -> torch.Tensor:
        return solve_adjoint(lin, A, mu, b, options).x

    name = f"{products} products and operators alone"
    candidates: dict[str, Timed] = {
        n: timed_under(p.target.ours, p.turns(f, bs)) for n, f in (("ours", solved), (name, alone))
    }
    reg64, A64 = double(reg), copy.deepcopy(A).double()
    exact = [p.exactly(lambda x, v: A64.normal(v) + MU * reg64.linearize(x).hvp(v), x, b) for b in bs]
    # The residual needs no exact result, only its shape. These iterations reach far less than the tolerance.
    case = Case("cg iteration", candidates, bs, others={name: exact}, tolerance=1e-2)
    case.measure = true_residual(p, reg, A, x, bs)
    case.notes[name] = f"{steps} iterations of CG took {products} products; the target is 1.15 times these"
    return case


class _Counted:
    """A linearization that counts its products."""

    def __init__(self, lin: Any) -> None:
        self.lin, self.products = lin, 0

    def hvp(self, v: torch.Tensor) -> torch.Tensor:
        """The product; increments the counter."""
        self.products += 1
        return self.lin.hvp(v)


def _in_tf32(case: Case) -> None:
    """Add the best formulation with TF32, the default of torch's convolutions."""
    f = case.candidates["torch, best"]

    def timed(k: int) -> object:
        with tf32(True):
            return f(k)

    case.candidates[TF32], case.allowed[TF32] = timed, 1e-2
    case.notes[TF32] = "torch's default for convolutions; the others compute in float32"


def _finished(p: Workload, case: Case, count: counts.Count) -> Case:
    """Add the counts, and our kernel as a replayed graph."""
    case.flops, case.bytes, case.least = count.flops, count.moved, count.least
    try:
        case.candidates[GRAPH] = peers_cuda.replayed(case.candidates["ours"], p.inputs)
    except Exception as error:  # a failing capture is reported, not raised
        case.missing[GRAPH] = cases.one_line(error)
    return case


CUDA_CASES: dict[str, Callable[[Workload], Iterator[Case]]] = {
    "gradient": cases.one(gradient),
    "linearize": cases.one(linearize),
    "hvp": cases.one(hvp),
    "theta": cases.one(theta),
    "dct": _srm("dct"),
    "hadamard": _srm("hadamard"),
    "walsh": _srm("walsh"),
    "cg": cases.one(cg),
    "cg iteration": cases.one(cg_iteration),
    "recover": cases.one(recovery),
    "step": cases.one(step),
}
"""The cases of `--device cuda`."""
