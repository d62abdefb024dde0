"""Whether the bits of an image depend on the size of its batch; run by test_same_bits.py.

    python same_bits.py CAPABILITY ISA

CAPABILITY and ISA are what ATEN_CPU_CAPABILITY and DEEPREG_FAST_ISA are set to: it fails where others are in force.
Prints the functions whose bits depend on the batch, and fails where there are any.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import deepreg_fast as dr
from deepreg_fast.backend.cpu.extension import extension, instruction_set
from deepreg_fast.batched import linalg
from deepreg_fast.evaluation.metrics import psnr
from deepreg_fast.regularizers.lipschitz import beta_hat, curvature
from deepreg_fast.solvers import CGOptions, LinearSolution, MinresOptions, cg, extreme_eigenvalues, minres
from deepreg_fast.solvers.acceleration import make
from deepreg_fast.solvers.cg import cg_alpha, cg_beta, cg_has_converged
from deepreg_fast.solvers.criteria import PerImageState, acceptance_test, convergence_test
from deepreg_fast.solvers.steps import compare

Function = Callable[..., object]
Case = tuple[str, Function, tuple[torch.Tensor, ...]]

# Of 17 images: the end of a vector alone, and vectors of any width with an end.
SIZES = (1, 3, 9)
# Enough for torch to share a single sum among threads.
LONG = 33001
GENERATOR = torch.Generator().manual_seed(0)


def normal(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Standard normal numbers."""
    return torch.randn(shape, generator=GENERATOR, dtype=torch.float64).to(dtype)


def flags(count: int) -> torch.Tensor:
    """Fair coins."""
    return normal(count) > 0


def flat(answer: object) -> Iterator[torch.Tensor]:
    """The tensors of an answer."""
    if isinstance(answer, torch.Tensor):
        yield answer
    elif isinstance(answer, (tuple, list)):
        for part in answer:
            yield from flat(part)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal numbers; NaN equals NaN."""
    return a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())


def depends(f: Function, arguments: tuple[torch.Tensor, ...], sizes: tuple[int, ...] = SIZES) -> list[int]:
    """The sizes of batches in which `f` gives an image other bits than among all."""
    count = len(arguments[0])
    every = list(flat(f(*arguments)))
    found = []
    for size in sizes:
        for start in range(0, count - size + 1, size):
            part = [t[start : start + size].clone() for t in arguments]
            # The last dimension of an answer [k, B] is the batch, the first of any other.
            for ours, theirs in zip(flat(f(*part)), every, strict=True):
                axis = 0 if len(theirs) == count else 1
                if not same(ours, theirs.narrow(axis, start, size)):
                    found.append(size)
    return sorted(set(found))


def numbers() -> Iterator[Case]:
    """Decisions, from numbers [B]."""
    count = 136
    a, b = normal(4 * count), normal(4 * count)
    edges = torch.tensor([0.0, torch.inf, torch.nan, 1e-310, 1e300, -0.0, 1.0])
    a[: len(edges)], b[7 : 7 + len(edges)] = edges, edges
    yield "hypot", linalg.hypot, (a, b)
    yield "exp2_int", lambda t: linalg.exp2_int(t.long()), (100 * normal(count),)
    squares = normal(count, 6).square()
    options = dr.PGDOptions(acceleration="anderson")
    state = (
        normal(count).square() + 0.1,
        normal(count).square(),
        normal(count).square(),
        flags(count),
        torch.arange(count),
        torch.arange(count),
        torch.ones(count, dtype=torch.int64),
        flags(count),
    )

    def residual(sums: torch.Tensor, scale: torch.Tensor, *state: torch.Tensor) -> object:
        return tuple(convergence_test(PerImageState(*state), sums.T[:3], scale, options, 2.0**-23))

    def candidate(sums: torch.Tensor, value: torch.Tensor, limit: torch.Tensor, *state: torch.Tensor) -> object:
        found, *rest = acceptance_test(PerImageState(*state), sums.T[:5], value, limit, options, 2.0**-23)
        return (*found, *rest)

    yield "convergence_test", residual, (squares, squares[:, 5].sqrt(), *state)
    yield "acceptance_test", candidate, (squares, normal(count), 2 * squares[:, 5].sqrt(), *state)
    d = normal(count, 4, 4)
    yield "eliminate", linalg.solve_spd, (d @ d.mT + torch.eye(4), normal(count, 4))

    def cg_step(sums: torch.Tensor, rz: torch.Tensor, old: torch.Tensor, fresh: torch.Tensor) -> object:
        three, moved = sums.T[:3].contiguous(), sums.T[3:5].contiguous()
        status, on = torch.full_like(fresh, -1, dtype=torch.int64), torch.ones_like(fresh)
        length, *rest = cg_alpha(three, moved, rz, old.abs(), status, on, 2.0**-23, 1e38)
        limited = cg_alpha(three, moved, rz, old.abs(), status, on, 2.0**-23, 1.5)
        ends = cg_has_converged(moved, three, length, fresh.long(), old, on, 2.0**-23)
        return (*cg_beta(rz, old, fresh, status, on), length, *rest, *limited, *ends)

    yield "cg's decisions", cg_step, (squares, normal(count), normal(count), flags(count))


def systems() -> Iterator[Case]:
    """Linear solves with products that mix no images and have the same bits for any of them."""
    for dtype in (torch.float32, torch.float64):
        rest = normal(17, 9, 9)
        a, b = (rest + rest.mT).to(dtype), normal(17, 9, dtype=dtype)

        def matvec(a: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
            def product(v: torch.Tensor) -> torch.Tensor:
                out = torch.zeros_like(v)
                for k in range(v.shape[1]):
                    out = out + a[:, :, k] * v[:, k, None]
                return out

            return product

        def solved(solver: Callable[..., LinearSolution], options: object) -> Function:
            def f(matrix: torch.Tensor, rhs: torch.Tensor) -> object:
                s = solver(matvec(matrix), rhs, options)
                return s.x, s.status, s.iterations, s.residual

            return f

        definite = a + 12 * torch.eye(9, dtype=dtype)
        yield f"cg {dtype}", solved(cg, CGOptions(7)), (definite, b)
        yield f"minres {dtype}", solved(minres, MinresOptions(7)), (a, b)
        yield f"lanczos {dtype}", lambda a, b: extreme_eigenvalues(matvec(a), b, 6), (a, b)


def long_vectors() -> Iterator[Case]:
    """Vectors that several threads share."""
    for dtype in (torch.float32, torch.float64):
        a, b = normal(2, LONG, dtype=dtype), normal(2, LONG, dtype=dtype)
        yield f"dot {dtype}", linalg.dot, (a, b)
        yield f"add {dtype}", linalg.add, (a, normal(2), b, torch.tensor([True, False]))
        yield f"compare {dtype}", lambda a, b: compare(torch.arange(len(a)), a, b, b, a), (a, b)
        yield f"psnr {dtype}", psnr, (a.reshape(2, 1, 1, -1), b.reshape(2, 1, 1, -1))
        for name, memory in (("fista", 1), ("anderson", 1), ("anderson", 3))[dtype == torch.float64 :]:

            def proposals(*steps: torch.Tensor, name: str = name, memory: int = memory) -> object:
                accelerator = make(name, steps[0], memory)
                every = torch.arange(len(steps[0]))
                return [accelerator.propose(x, 0.3 * x.flip(1), every) for x in steps]

            steps = [normal(2, LONG, dtype=dtype) for _ in range(4)]
            yield f"{name}, memory {memory}, {dtype}", proposals, (*steps,)


def kernels() -> Iterator[Case]:
    """What the package computes itself, in float32: operators, regularizers, the penalties of training, recoveries."""
    x, v = (normal(17, 1, 9, 13, dtype=torch.float32) for _ in range(2))
    for transform in ("dct", "walsh", "hadamard"):
        A = dr.SRM((1, 9, 13) if transform == "dct" else (1, 8, 16), 0.5, transform=transform)
        image = normal(17, *A.image_shape, dtype=torch.float32)
        yield f"{transform} A", A.A, (image,)
        yield f"{transform} prox", lambda x, A=A: A.prox_l2(x, A.A(x.flip(3)), 0.3), (image,)
    for reg in (dr.RED(channels=4, depth=3, kernel_size=3), dr.Ridge(filters=4, kernel_size=3)):
        with torch.no_grad():
            for p in reg.parameters():
                p.add_(0.1 * normal(*p.shape, dtype=torch.float32))

        def derivatives(x: torch.Tensor, v: torch.Tensor, reg: dr.Regularizer = reg) -> object:
            lin = reg.linearize(x)
            return lin.value, lin.grad, lin.hvp(v)

        def penalties(x: torch.Tensor, v: torch.Tensor, reg: dr.Regularizer = reg) -> object:
            radius = torch.full((len(x),), 0.1)
            return [
                answer
                for penalty in (beta_hat, curvature)
                for point in [penalty(reg, x, v)]
                for answer in (point.beta, point.power_step(radius), point.gradient_step(radius))
            ]

        A = dr.SRM((1, 9, 13), 0.5)

        def recovered(y: torch.Tensor, reg: dr.Regularizer = reg, A: dr.SRM = A) -> object:
            s = dr.recover(y, A, reg, 0.1, options=dr.PGDOptions(6, 1e-4, "anderson"))
            return s.x, s.status, s.residual, s.gradients

        name = type(reg).__name__
        yield f"{name} derivatives", derivatives, (x, v)
        yield f"{name} penalties", penalties, (x, v)
        yield f"{name} recovery", recovered, (A.A(x),)


def main(capability: str, isa: str) -> None:
    """Print what depends on the batch."""
    used = torch.backends.cpu.get_cpu_capability().lower(), instruction_set() if extension()[0] else ""
    if used != (capability, isa):
        sys.exit(f"{used} is in force, not {(capability, isa)}.")
    found = []
    for case in (numbers, systems, long_vectors, kernels):
        torch.set_num_threads(2 if case is long_vectors else 1)
        sizes = (1, 2) if case is long_vectors else SIZES
        found += [f"{name}: {bad}" for name, f, given in case() if (bad := depends(f, given, sizes))]
    if found:
        sys.exit("\n".join(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
