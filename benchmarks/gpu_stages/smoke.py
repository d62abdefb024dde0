"""Smoke test: every kernel family separately, with outputs pre-filled with NaN, against float64."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import torch

from gpu_stages.common import EPS, Kernels, Stage, chain_products, compare, poison, relative, target, verdict

Family = Callable[[Stage, str], None]
SIZES = ((3, 180, 180), (2, 33, 47))
"""Images, rows and columns: the sizes of the benchmarks, and odd ones."""


def smoke(stage: Stage) -> None:
    """Run all families, or only those that failed in a previous call if its results are given."""
    selected = _failed_before()
    families = {**_chains(), **_tvs(), **_solver_kernels(), **_operators(), **_solves()}
    for name, f in families.items():
        if selected is None or name in selected:
            stage.item(name, lambda f=f, name=name: f(stage, name), seconds=12.0)


def _failed_before() -> set[str] | None:
    path = os.environ.get("DEEPREG_FAST_GPU_BEFORE")
    if not path:
        return None
    record = json.loads(Path(path).read_text(encoding="utf-8"))["stages"].get("smoke", {})
    wrong = {n for n, v in record.get("verdicts", {}).items() if v != "ok"}
    return wrong | {n for n, state in record.get("items", {}).items() if state != "done"}


def _chains() -> dict[str, Family]:
    def family(channels: int = 16, depth: int = 3, active: bool = False, **options: Any) -> Family:
        norm, head = options.pop("norm", "pixel"), options.pop("head", "red")

        def run(stage: Stage, name: str) -> None:
            sizes = SIZES if channels == 16 and not options else SIZES[1:]
            for images, rows, columns in sizes if stage.mode != "dry" else ((2, 12, 17),):
                # Unique names, so that no line hides another.
                label = name if (rows, columns) == (sizes[-1][1:]) or stage.mode == "dry" else f"{name} {rows}"
                _chain(stage, label, (channels, depth, norm, head), (images, rows, columns), active, options)

        return run

    families = {f"chain {n} {h}": family(norm=n, head=h) for n in ("pixel", "none", "image") for h in _HEADS}
    families |= {
        "chain inactive images": family(active=True),
        "chain image inactive images": family(active=True, norm="image"),
        "chain 5 channels, 2 layers": family(5, 2),
        "chain 32 channels, 4 layers": family(32, 4, norm="none"),
        "chain 64 channels": family(64),
        "chain image 64 channels": family(64, norm="image"),
        "chain ieee": family(precision="ieee"),
        **{f"chain {n} fused": family(norm=n, fused=True) for n in ("pixel", "none")},
    }
    return families


_HEADS = ("red", "residual", "norm")


def _chain(
    stage: Stage,
    name: str,
    network: tuple[int, int, str, str],
    size: tuple[int, int, int],
    active: bool,
    options: dict[str, Any],
) -> None:
    """Value, gradient, linearization and both products of one network."""
    from deepreg_fast.backend import active_images
    from deepreg_fast.bench.workload import under

    channels, depth, norm, head = network
    images, rows, columns = size
    reg = _network(channels, depth, norm, head).to(stage.device)
    g = torch.Generator().manual_seed(1)
    x, v = (torch.randn(images, 1, rows, columns, generator=g).to(stage.device) for _ in range(2))
    kernels, pixels = Kernels(stage, **options), x.numel()
    mask = torch.ones(images, dtype=torch.bool, device=stage.device)
    if active:
        mask[0] = False

    def ours() -> dict[str, torch.Tensor]:
        poison(stage, pixels, channels)
        value, grad = kernels.value_and_grad(reg, x)
        return {"value": value, "gradient": grad, **chain_products(kernels.linearize(reg, x), v)}

    def torchs(net: Any, x: torch.Tensor, v: torch.Tensor) -> dict[str, torch.Tensor]:
        def f() -> dict[str, torch.Tensor]:
            value, grad = net.value_and_grad(x)
            return {"value": value, "gradient": grad, **chain_products(net.linearize(x), v)}

        return under("reference", f)

    with active_images(mask if active else None):
        answers = ours()
    # Applied to the active images only, the definition gives the same results, including the parameter product.
    active_inputs = [t[mask] for t in (x, v)]
    answers = {k: t[mask] if len(t) == images and k != "theta" else t for k, t in answers.items()}
    reg64, exact = copy.deepcopy(reg).double(), [t.double() for t in active_inputs]
    compare(stage, name, answers, lambda: torchs(reg, *active_inputs), lambda: torchs(reg64, *exact))


def _network(channels: int, depth: int, norm: str, head: str) -> Any:
    import deepreg_fast as dr

    reg = dr.RED(channels, depth, norm, head=head, seed=0)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in reg.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=g))
    return reg


# Smoothed total variation.


def _tvs() -> dict[str, Family]:
    return {
        "tv": lambda stage, name: _tv(stage, name, 1),
        "tv 3 channels": lambda stage, name: _tv(stage, name, 3),
        "tv inactive images": lambda stage, name: _tv(stage, name, 3, active=True),
    }


def _tv(stage: Stage, name: str, channels: int, active: bool = False) -> None:
    """Value, gradient, linearization and Hessian-vector product of both sizes."""
    import deepreg_fast as dr
    from deepreg_fast.backend import active_images
    from deepreg_fast.bench.workload import under

    kernels, reg = Kernels(stage), dr.TV(1e-2)

    def answers(regularizer: Any, x: torch.Tensor, v: torch.Tensor) -> dict[str, torch.Tensor]:
        value, grad = regularizer.value_and_grad(x)
        lin = regularizer.linearize(x)
        return {"value": value, "gradient": grad, "linearize": lin.grad, "hvp": lin.hvp(v)}

    for images, rows, columns in SIZES if stage.mode != "dry" else ((2, 9, 17),):
        label = name if (rows, columns) == SIZES[-1][1:] or stage.mode == "dry" else f"{name} {rows}"
        g = torch.Generator().manual_seed(6)
        x = torch.rand(images, channels, rows, columns, generator=g).to(stage.device)
        v = torch.randn(x.shape, generator=g).to(stage.device)
        mask = torch.ones(images, dtype=torch.bool, device=stage.device)
        mask[0] = not active
        poison(stage, x.numel())
        with active_images(mask if active else None):
            ours = answers(kernels.of_tv(reg), x, v)
        ours, few = {k: t[mask] for k, t in ours.items()}, (x[mask], v[mask])
        # Called within this round.
        single = lambda few=few: under("reference", lambda: answers(reg, *few))  # noqa: E731
        wide = lambda few=few: under("reference", lambda: answers(reg, *(t.double() for t in few)))  # noqa: E731
        compare(stage, label, ours, single, wide)


# The solvers' fused updates.


def _solver_kernels() -> dict[str, Family]:
    return {
        "vectors": lambda stage, name: _vectors(stage, name, _few_vectors),
        "steps of CG and PGD": lambda stage, name: _vectors(stage, name, _steps),
        "steps of MINRES": lambda stage, name: _vectors(stage, name, _minres_steps),
        "anderson": lambda stage, name: _vectors(stage, name, _anderson),
        "decisions": _decisions,
    }


Inputs = Callable[..., torch.Tensor]


def _vectors(stage: Stage, name: str, f: Callable[[Inputs, Inputs], dict[str, Any]]) -> None:
    """Compare `f` of random images and numbers, computed by the kernels, with torch and float64."""
    from deepreg_fast.bench.workload import under

    images, rows, columns = (3, 9, 11) if stage.mode == "dry" else SIZES[0]

    def run(dtype: torch.dtype) -> dict[str, Any]:
        g = torch.Generator().manual_seed(2)

        def image() -> torch.Tensor:
            return torch.randn(images, 1, rows, columns, generator=g).to(stage.device, dtype)

        def number() -> torch.Tensor:
            return (0.5 + torch.rand(images, generator=g, dtype=torch.float64)).to(stage.device)

        return f(image, number)

    poison(stage, images * rows * columns)
    ours = under(_kernel_backend(stage), lambda: run(torch.float32))
    torchs, exact = (lambda d=d: under("reference", lambda: run(d)) for d in (torch.float32, torch.float64))
    compare(stage, name, ours, torchs, exact)


def _kernel_backend(stage: Stage) -> str:
    return target(stage).ours


def _few_vectors(image: Inputs, number: Inputs) -> dict[str, Any]:
    from deepreg_fast.batched import linalg

    a, b, c, d = (image() for _ in range(4))
    every = torch.ones(len(a), dtype=torch.bool, device=a.device)
    out, square = linalg.add(a, number(), b, every)
    idx = torch.arange(len(a), device=a.device)
    return {"dot": linalg.dot(a, a), "add": out, "square": square, "secant": linalg.secant(idx, a, b, c, d)}


def _steps(image: Inputs, number: Inputs) -> dict[str, Any]:
    from deepreg_fast.batched.linalg import dots as products
    from deepreg_fast.solvers.cg import cg_direction, cg_move
    from deepreg_fast.solvers.steps import compare, descend, pgd_step

    a, b, c, d = (image() for _ in range(4))
    on = torch.ones(len(a), dtype=torch.bool, device=a.device)
    dots = products((a, a), (a, b.abs() * a.sign()), (b, b))
    direction = cg_direction(a.clone(), b, number(), on)
    x, r, moved = cg_move(a.clone(), b.clone(), c, d, number(), on)
    tau = number()
    descended = descend(a, tau, b, on)
    step, candidate, sums = pgd_step(a, b, c, on)
    compared = compare(torch.arange(len(a), device=a.device), a, b, c, d)[[0, 1, 3, 4]]
    return {
        "dots": dots, "direction": direction, "x": x, "r": r, "moved": moved, "descend": descended, "step": step,
        "candidate": candidate, "sums": sums, "compare": compared,
    }  # fmt: skip


def _minres_steps(image: Inputs, number: Inputs) -> dict[str, Any]:
    from deepreg_fast.solvers.minres import lanczos_first, lanczos_second, minres_move

    a, b, c, d, e, f = (image() for _ in range(6))
    on = torch.ones(len(a), dtype=torch.bool, device=a.device)
    u, first = lanczos_first(a.clone(), number(), b, c, on)
    r1, r2, second = lanczos_second(a.clone(), number(), b.clone(), c.clone(), on)
    state = (a.clone(), b.clone(), c.clone(), d.clone())
    moved, sums = minres_move(state, e, f, tuple(number() for _ in range(6)), on)
    return {
        "u": u, "first": first[:2], "r1": r1, "r2": r2, "second": second, "x": moved[0], "r": moved[1], "w": moved[2],
        "sums": sums,
    }  # fmt: skip


def _anderson(image: Inputs, number: Inputs) -> dict[str, Any]:
    from deepreg_fast.solvers.acceleration import Anderson

    x, f = image(), image()
    accelerator = Anderson(x, 3)
    idx = torch.arange(len(x), device=x.device)
    out: dict[str, Any] = {}
    for k in range(5):
        proposed = accelerator.propose(x, f, idx)
        out[f"step {k}"] = proposed
        # The points do not depend on the precision.
        x, f = x + 0.5 * f, 0.5 * f + 0.3 * image()
    return out


def _decisions(stage: Stage, name: str) -> None:
    """The per-image decisions of CG, PGD and Anderson acceleration must have the same bits as torch's."""
    from importlib import import_module

    from deepreg_fast.backend.gpu.decisions import GpuDecisions
    from deepreg_fast.batched.fused import tensors
    from deepreg_fast.solvers.acceleration import anderson_update
    from deepreg_fast.solvers.criteria import PerImageState, acceptance_test, convergence_test
    from deepreg_fast.solvers.linear_system import RUNNING
    from deepreg_fast.solvers.options import PGDOptions

    cg: Any = import_module("deepreg_fast.solvers.cg")
    kernels, images, g = GpuDecisions(), 77, torch.Generator().manual_seed(3)

    def numbers(*shape: int) -> torch.Tensor:
        draw = torch.randn(*shape, images, generator=g, dtype=torch.float64)
        return (draw.abs() * 10.0 ** torch.randint(-3, 4, draw.shape, generator=g)).to(stage.device)

    def flags() -> torch.Tensor:
        return (torch.rand(images, generator=g) < 0.8).to(stage.device)

    def counts(most: int) -> torch.Tensor:
        return torch.randint(most, (images,), generator=g).to(stage.device)

    status = torch.full((images,), RUNNING, device=stage.device)
    n = PerImageState(numbers(), numbers(), numbers(), flags(), counts(4), counts(9), counts(1) + 2, flags())
    options, sums, scale, limit = PGDOptions(3, 1e-4, "anderson"), numbers(5), numbers(), numbers()
    three, active = sums[:3].contiguous(), flags()
    calls: list[tuple[Any, tuple[Any, ...]]] = [
        (convergence_test, (n, three, scale, options, EPS)),
        (acceptance_test, (n, sums, numbers().float(), limit, options, EPS)),
        (anderson_update, (numbers(), numbers(), counts(4), 5, 20.0)),
        (cg.cg_beta, (numbers(), numbers(), flags(), status, active)),
        (cg.cg_alpha, (three, numbers(2), numbers(), numbers(), status, active, EPS, 1e38)),
        (cg.cg_has_converged, (numbers(2), three, numbers(), counts(4), numbers(), active, EPS)),
    ]
    pairs = []
    for decision, arguments in calls:
        ours, torchs = getattr(kernels, decision.__name__)(*arguments), decision.definition(*arguments)
        # The accelerator of an inactive image may be reset or not.
        count = -1 if decision is acceptance_test else None
        pairs += zip(list(tensors(ours))[:count], list(tensors(torchs))[:count], strict=True)
    different = [i for i, (a, b) in enumerate(pairs) if not torch.equal(a, b)]
    verdict(stage, name, not different, f"{len(pairs) - len(different)} of {len(pairs)} results with torch's bits")


# Operators.


def _operators() -> dict[str, Family]:
    def family(transform: str, shape: tuple[int, int, int], dry: tuple[int, int, int]) -> Family:
        return lambda stage, name: _operator(stage, name, transform, dry if stage.mode == "dry" else shape)

    return {
        "SRM dct": family("dct", (1, 180, 180), (1, 12, 10)),
        "SRM dct odd": family("dct", (1, 181, 179), (1, 9, 11)),
        "SRM hadamard": family("hadamard", (1, 180, 180), (1, 12, 12)),
        "SRM walsh": family("walsh", (1, 180, 180), (1, 12, 12)),
        "SRM walsh 256": family("walsh", (1, 256, 256), (1, 16, 16)),
    }


def _operator(stage: Stage, name: str, transform: str, shape: tuple[int, int, int]) -> None:
    import deepreg_fast as dr
    from deepreg_fast.bench.workload import under

    A = dr.SRM(shape, 0.2, transform=transform, randomizer="both").to(stage.device)
    g = torch.Generator().manual_seed(4)
    x = torch.randn(3, *shape, generator=g).to(stage.device)
    y = torch.randn(3, A.measurements, generator=g).to(stage.device)
    gamma = torch.tensor([0.5, 2.0, 30.0], dtype=torch.float32, device=stage.device)

    def products(op: Any, x: torch.Tensor, y: torch.Tensor, gamma: torch.Tensor) -> dict[str, torch.Tensor]:
        return {
            "A": op.A(x), "adjoint": op.A_adjoint(y), "normal": op.normal(x), "prox": op.prox_l2(x, y, gamma),
            "shifted": op.shifted_inverse(x, gamma),
        }  # fmt: skip

    poison(stage, x.numel())
    ours = under(_kernel_backend(stage), lambda: products(A, x, y, gamma))
    A64, exact = copy.deepcopy(A).double(), [t.double() for t in (x, y, gamma)]
    single = lambda: under("reference", lambda: products(A, x, y, gamma))  # noqa: E731
    compare(stage, name, ours, single, lambda: under("reference", lambda: products(A64, *exact)))


# Complete solves, long enough to use their CUDA graphs.


def _solves() -> dict[str, Family]:
    families: dict[str, Family] = {
        f"solve {n}": lambda stage, name, n=n: _solve(stage, name, n)
        for n in ("cg", "minres", "pgd none", "pgd fista", "pgd anderson")
    }
    families["hypergradient"] = lambda stage, name: _hypergradient(stage, name)
    families["custom operators"] = lambda stage, name: _custom_operators(stage, name)
    return families


def _problem(stage: Stage) -> tuple[Any, Any, torch.Tensor]:
    """A network whose Hessian is positive, an operator, images."""
    import deepreg_fast as dr

    images, rows, columns = (2, 9, 10) if stage.mode == "dry" else SIZES[0]
    reg = _network(16, 3, "pixel", "red").to(stage.device)
    with torch.no_grad():
        for p in cast(torch.nn.Conv2d, reg.net.convs[-1]).parameters():
            p.mul_(0.2)
    A = dr.SRM((1, rows, columns), 0.4).to(stage.device)
    g = torch.Generator().manual_seed(5)
    return reg, A, torch.rand(images, 1, rows, columns, generator=g).to(stage.device)


def _solve(stage: Stage, name: str, method: str) -> None:
    """Compare the solution with that of the same solve in float64, within the tolerance."""
    import deepreg_fast as dr
    from deepreg_fast.bench.workload import under
    from deepreg_fast.inverse.adjoint import adjoint_named, solve_adjoint

    reg, A, x = _problem(stage)
    max_iterations = 3 if stage.mode == "stand-in" else 400

    def run(reg: Any, A: Any, x: torch.Tensor, tolerance: float) -> Any:
        if method in ("cg", "minres"):
            options = adjoint_named(method, max_iterations, tolerance)
            return solve_adjoint(reg.linearize(x), A, x.new_full((len(x),), 0.1), torch.sin(9 * x), options)
        acceleration = method.split()[1]
        return dr.recover(A.A(x), A, reg, 0.1, options=dr.PGDOptions(max_iterations, tolerance, acceleration))

    ours = under(_kernel_backend(stage), lambda: run(reg, A, x, 1e-4))
    if stage.mode == "stand-in":
        verdict(stage, name, True, "")
        return
    reg, A, x = copy.deepcopy(reg).double(), copy.deepcopy(A).double(), x.double()
    exact = under("reference", lambda: run(reg, A, x, 1e-8))
    error, converged = relative(ours.x, exact.x), int((ours.status == 0).sum())
    iterations = float(ours.iterations.double().mean())
    text = f"{converged} of {len(x)} converged in {iterations:.0f} iterations, error {error:.1e}"
    verdict(stage, name, error <= 1e-2 and converged == len(x), text)


def _hypergradient(stage: Stage, name: str) -> None:
    import deepreg_fast as dr
    from deepreg_fast.bench.workload import under

    reg, A, x = _problem(stage)
    max_iterations = 3 if stage.mode == "stand-in" else 400

    def run(reg: Any, A: Any, x: torch.Tensor, tolerance: float) -> torch.Tensor:
        options = dr.PGDOptions(max_iterations, tolerance, "anderson")
        adjoint = dr.ImplicitAdjoint(dr.CGOptions(max_iterations, tolerance))
        gradients = dr.hypergradient(x, A.A(x), A, reg, 0.1, options=options, adjoint=adjoint).theta.values()
        return torch.cat([t.flatten().double() for t in gradients])

    ours = under(_kernel_backend(stage), lambda: run(reg, A, x, 1e-4))
    if stage.mode == "stand-in":
        verdict(stage, name, True, "")
        return
    reg, A, x = copy.deepcopy(reg).double(), copy.deepcopy(A).double(), x.double()
    exact = under("reference", lambda: run(reg, A, x, 1e-8))
    cosine = float(torch.nn.functional.cosine_similarity(ours, exact, dim=0))
    verdict(stage, name, cosine > 0.999, f"cosine with float64 {cosine:.6f}, error {relative(ours, exact):.1e}")


def _custom_operators(stage: Stage, name: str) -> None:
    """`dr.ops` under autograd."""
    import deepreg_fast as dr
    from deepreg_fast.bench.workload import under

    reg, A, x = _problem(stage)

    def run(reg: Any, A: Any, x: torch.Tensor) -> dict[str, torch.Tensor]:
        x = x.detach().requires_grad_()
        energy = dr.ops.energy(reg, x).sum() + 0.5 * A.A(x).square().sum()
        (grad,) = torch.autograd.grad(energy, x, create_graph=True)
        (product,) = torch.autograd.grad(grad, x, torch.sin(9 * x.detach()))
        return {"gradient": grad.detach(), "product": product}

    ours = under(_kernel_backend(stage), lambda: run(reg, A, x))
    modules64 = copy.deepcopy(reg).double(), copy.deepcopy(A).double()
    single = lambda: under("reference", lambda: run(reg, A, x))  # noqa: E731
    compare(stage, name, ours, single, lambda: under("reference", lambda: run(*modules64, x.double())))


def families() -> Iterator[str]:
    """The names of all families, in order."""
    yield from {**_chains(), **_tvs(), **_solver_kernels(), **_operators(), **_solves()}
