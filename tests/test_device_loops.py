"""Loops as a device runs them, on the CPU: no look at a number, images that ended stay as they are, graphs replayed."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import deepreg_fast as dr
from deepreg_fast import backend
from deepreg_fast.backend.gpu import graphs as gpu_graphs
from deepreg_fast.batched import graphs, loop
from deepreg_fast.batched.fused import tensors
from deepreg_fast.batched.linalg import add, expand, select, solve_spd
from deepreg_fast.errors import OutOfMemory
from deepreg_fast.regularizers.base import Regularizer
from deepreg_fast.solvers import (
    ACCELERATIONS,
    CGOptions,
    MinresOptions,
    acceleration,
    cg,
    extreme_eigenvalues,
    linear_system,
    minres,
    pgd,
)
from deepreg_fast.solvers.cg import _ConjugateGradients
from deepreg_fast.solvers.minres import _Minres
from deepreg_fast.solvers.pgd import _Run

from .helpers import DEFINITIONS, images, normal, random_red

FIELDS = ("x", "status", "iterations", "gradients", "residual", "tau")
Solver = Callable[..., Any]


def equal(a: object, b: object, fields: tuple[str, ...]) -> None:
    for name in fields:
        assert torch.equal(getattr(a, name), getattr(b, name)), name


class Quartic(Regularizer):
    """`sum (u^2 / 2 + u^4)`, `u = x - center`, its gradient written down: the round has nothing of autograd."""

    def energy(self, x: torch.Tensor) -> torch.Tensor:
        u = x - self.center
        return (0.5 * u**2 + u**4).flatten(1).sum(1)

    def value_and_grad(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rows, u = backend.active_mask(x), x - self.center
        return poison(rows, self.energy(x)), poison(rows, u + 4.0 * u**3)


def poison(rows: torch.Tensor | None, t: torch.Tensor) -> torch.Tensor:
    """NaN in the images that are not at work, where a kernel writes nothing."""
    return t if rows is None else torch.where(expand(rows, t), t, torch.nan)


class PoisonedVectors:
    """Kernels made of torch's definitions that work in place like those of a GPU, with NaN in what they leave out."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name not in DONATED:
            raise AttributeError(name)

        def kernel(*args: Any) -> Any:
            with dr.use_backend("reference"):
                found = DEFINITIONS[name](*args)
            donated = [t for k in DONATED[name] for t in tensors(args[k])]
            if name == "take":
                donated = [to for to, _ in args[1:]]
            results = list(tensors(found))
            for to, source in zip(donated, results, strict=False):
                to.copy_(source)
            if name in BY_CONTEXT:
                rows = backend.active_mask(next(t for t in tensors(args) if t.is_floating_point()))
            else:
                rows = args[0] if name == "take" else args[-1]
            rest = results[len(donated) :]
            last = [poison_sums(rows, rest.pop())] if name in SUMS else []
            rest = [poison(rows, t) for t in rest] + last
            return rebuilt(found, iter(donated + rest))

        return kernel


# Which arguments a kernel changes and returns, in the order of its results. It changes the state of `remember`, too.
DONATED: dict[str, tuple[int, ...]] = {
    "dot": (),
    "dots": (),
    "add": (),
    "secant": (),
    "compare": (),
    "cg_direction": (0,),
    "descend": (),
    "cg_move": (0, 1),
    "lanczos_first": (0,),
    "lanczos_second": (2, 3),
    "minres_move": (0,),
    "pgd_step": (),
    "take": (),
    "remember": (),
    "combine": (),
}


# The images are the active ones.
BY_CONTEXT = ("dot", "dots", "add", "secant", "compare", "remember", "combine")
# The last result is sums [k, B].
SUMS = ("dots", "compare", "cg_move", "lanczos_first", "lanczos_second", "minres_move", "pgd_step")


def rebuilt(shape: Any, results: Iterator[torch.Tensor]) -> Any:
    """These tensors in nested tuples like those of `shape`."""
    return tuple(rebuilt(s, results) for s in shape) if isinstance(shape, tuple) else next(results)


def poison_sums(rows: torch.Tensor | None, sums: torch.Tensor) -> torch.Tensor:
    return sums if rows is None else torch.where(rows, sums, torch.nan)


class Poisoned:
    """A backend that skips images, for CPU tensors in either precision."""

    name = "poisoned"
    batch_invariant = True

    def unavailable(self) -> str | None:
        return None

    def unsupported_reason(self, energy: torch.nn.Module, x: torch.Tensor) -> str | None:
        return backend._TABLE["cpu"].unsupported_reason(energy, x)

    def value_and_grad(self, energy: torch.nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        value, grad = backend._TABLE["cpu"].value_and_grad(energy, x)
        rows = backend.active_mask(x)
        return poison(rows, value), poison(rows, grad)

    def linearize(self, energy: torch.nn.Module, x: torch.Tensor) -> backend.Linearization:
        return backend._TABLE["cpu"].linearize(energy, x)

    def vectors(self, like: torch.Tensor) -> PoisonedVectors:
        return PoisonedVectors()

    def srm(self, A: torch.nn.Module, like: torch.Tensor) -> PoisonedSrm | None:
        kernels = backend.cpu.CpuBackend().srm(A, like)
        return None if kernels is None else PoisonedSrm(kernels)


class PoisonedSrm:
    def __init__(self, kernels: backend.SrmKernels) -> None:
        self.kernels = kernels

    def __getattr__(self, name: str) -> Callable[..., torch.Tensor]:
        return lambda *args: poison(backend.active_mask(args[0]), getattr(self.kernels, name)(*args))


@pytest.fixture(name="poisoned")
def _poisoned() -> Iterator[None]:
    kept = dict(backend._TABLE)
    backend.register(Poisoned())
    yield
    backend._TABLE.clear()
    backend._TABLE.update(kept)


@contextmanager
def lag(n: int) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch, loop.simulate_device():
        patch.setattr(loop, "QUERY_LAG", n)
        yield


# -- images that have ended stay in the batch --------------------------------------------------------------------------

needs_cpu = pytest.mark.skipif(dr.backends()["cpu"] is not None, reason="the C++ extension is not built")


def recovery(kind: str) -> Callable[[], dr.Solution]:
    """Six images that end at different rounds, one of them not finite."""
    reg, A = random_red(scale=0.06, double=False, channels=4), dr.SRM((1, 16, 16), 0.3)
    contrast = torch.tensor([0.01, 0.1, 0.3, 1.0, 2.0, 4.0])[:, None, None, None]
    y = A.A(0.5 + contrast * (images(6, 1, 16, 16, dtype=torch.float32) - 0.5))
    y[3, 1] = torch.nan
    options, tau0 = dr.PGDOptions(20, 1e-4, kind), torch.tensor([0.03, 0.3, 1.0, 1.0, 3.0, 30.0])
    return lambda: dr.recover(y, A, reg, torch.logspace(-3, 0.5, 6), options=options, tau0=tau0)


@needs_cpu
@pytest.mark.parametrize("kind", ACCELERATIONS)
@pytest.mark.parametrize("behind", [0, 1, 5])
def test_recovery_has_the_same_bits(kind: str, behind: int, monkeypatch: pytest.MonkeyPatch) -> None:
    run = recovery(kind)
    monkeypatch.setattr(acceleration, "_solve", solve_spd)
    shrinking = run()
    assert len(set(shrinking.gradients.tolist())) > 3 and len(set(shrinking.status.tolist())) > 1
    with lag(behind):
        equal(run(), shrinking, FIELDS)


@needs_cpu
@pytest.mark.parametrize("kind", ACCELERATIONS)
def test_recovery_beside_undefined_memory(kind: str, poisoned: None) -> None:
    run = recovery(kind)
    with lag(2):
        found = run()
        backend._TABLE.pop("poisoned")
        with pytest.MonkeyPatch.context() as patch:
            # The same sums as the poisoned backend's.
            patch.setattr(backend.cpu.CpuBackend, "vectors", lambda *_: None)
            equal(found, run(), FIELDS)
    assert bool(torch.isfinite(found.x).all())


@pytest.mark.parametrize("kind", ACCELERATIONS)
def test_recovery_with_an_operator_that_needs_cg(kind: str) -> None:
    class Scaled(dr.Identity):
        """Different weights at different pixels, so that its proximal map has no closed form."""

        gram_scale = None  # type: ignore[assignment]

        def _forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x * torch.linspace(0.2, 1.0, x.shape[-1], dtype=x.dtype)).flatten(1)

        def _adjoint(self, y: torch.Tensor) -> torch.Tensor:
            return self._forward(y.reshape(-1, *self.image_shape)).reshape(-1, *self.image_shape)

    A, x = Scaled((1, 6, 6)), images(4, 1, 6, 6)
    y, options = A.A(x), dr.PGDOptions(40, 1e-8, kind)
    mu = torch.logspace(-2, 1, 4).double()
    shrinking = pgd(y, A, Quartic(), mu, options, x)
    with loop.simulate_device():
        found = pgd(y, A, Quartic(), mu, options, x)
    assert torch.equal(found.status, shrinking.status) and found.status.eq(0).all()
    assert torch.equal(found.iterations, shrinking.iterations) and (found.x - shrinking.x).abs().max() <= 1e-12


@pytest.mark.parametrize("behind", [0, 1, 4])
@pytest.mark.parametrize("preconditioned", [False, True])
@pytest.mark.parametrize("solver", [cg, minres])
def test_systems_have_the_same_bits(solver: Solver, preconditioned: bool, behind: int, poisoned: None) -> None:
    """Elementwise products, so that a system's bits do not depend on its batch; NaN where an image is skipped."""
    sizes = torch.linspace(0.0, 3.0, 8, dtype=torch.float64)
    d = 10.0 ** (-sizes[:, None] * torch.linspace(0, 1, 30, dtype=torch.float64))
    d[5] = -d[5] if solver is cg else torch.where(torch.arange(30) % 2 == 0, d[5], -d[5])
    d[6, 20:] = 0.0
    b = normal(8, 30)
    b[2, 4] = torch.nan
    b[3] = 0.0

    def run(start: torch.Tensor | None, skip: bool) -> Any:
        def product(v: torch.Tensor) -> torch.Tensor:
            return poison(backend.active_mask(v) if skip else None, d * v)

        inverse = (lambda v: poison(backend.active_mask(v) if skip else None, 0.5 * v)) if preconditioned else None
        options = (CGOptions if solver is cg else MinresOptions)(60, 1e-9)
        return solver(product, b, options, x0=start, preconditioner=inverse)

    fields = ("x", "status", "iterations", "residual")
    for start in (None, 0.3 * b.nan_to_num(1.0)):
        with dr.use_backend("reference"):
            plain = run(start, False)
        assert len(set(plain.iterations.tolist())) > 4 and len(set(plain.status.tolist())) > 2
        with lag(behind):
            equal(run(start, True), plain, fields)
        assert bool(torch.isfinite(plain.x).all())


def test_images_that_are_not_at_work_are_solved_by_zero() -> None:
    b, rows = normal(3, 4), torch.tensor([True, False, True])
    b[1] = torch.nan
    with loop.simulate_device(), backend.active_images(rows):
        s = cg(lambda v: 2.0 * v, b)
    assert s.status.eq(0).all() and torch.equal(s.x[rows], 0.5 * b[rows]) and s.x[1].eq(0).all()


def test_products_that_return_their_argument(poisoned: None) -> None:
    """MINRES changes what a matvec returns in place: here its own vector."""
    b, t = normal(2, 9), torch.tensor([[1.0], [0.5]]).double()
    for solver in (cg, minres):
        with dr.use_backend("reference"):
            plain = solver(lambda v: v.clone(), b, x0=t * b)
        for same in (lambda v: v, lambda v: v.view(v.shape)):
            with loop.simulate_device():
                equal(solver(same, b, x0=t * b), plain, ("x", "status", "iterations", "residual"))


def test_add_copies_images_that_are_not_at_work(poisoned: None) -> None:
    x, rows = normal(3, 4), torch.tensor([True, False, True])
    with backend.active_images(rows):
        out, size = add(x, torch.ones(3).double(), x, rows)
    assert torch.equal(out, x * torch.tensor([[2.0], [1.0], [2.0]])) and bool(torch.isfinite(size).all())


def test_lanczos_has_the_same_bits() -> None:
    d, v0 = torch.arange(1.0, 13.0).reshape(3, 4).double(), normal(3, 4)
    v0[1, 1:] = 0.0
    wanted = extreme_eigenvalues(lambda v: d * v, v0, 4)
    for n in (0, 1, 2):
        with lag(n):
            found = extreme_eigenvalues(lambda v: poison(backend.active_mask(v), d * v), v0, 4)
        assert torch.equal(found[0], wanted[0]) and torch.equal(found[1], wanted[1])


# -- nobody looks ------------------------------------------------------------------------------------------------------


class NoLooking(TorchDispatchMode):
    """Raises where a device would have to be waited for: reading a number, or a shape that depends on one."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        looked = name in ("aten::_local_scalar_dense", "aten::item", "aten::is_nonzero", "aten::equal")
        looked = looked or "nonzero" in name or "masked_select" in name or "unique" in name or "linalg" in name
        if name.startswith("aten::index"):
            indices = args[1] if isinstance(args[1], (list, tuple)) else []
            looked = looked or any(isinstance(t, torch.Tensor) and t.dtype == torch.bool for t in indices)
        if looked:
            raise AssertionError(f"{name} waits for the device")
        return func(*args, **(kwargs or {}))


def test_the_watch_itself() -> None:
    t = torch.ones(3)
    for look in (lambda: bool(t.any()), lambda: t[t > 0], lambda: float(t.sum()), lambda: torch.nonzero(t)):
        with pytest.raises(AssertionError, match="waits"), NoLooking():
            look()


def a_run(kind: str, device: str = "cpu", options: dict[str, Any] | None = None) -> _Run:
    x, A = torch.rand(3, 1, 6, 6, device=device), dr.Identity((1, 6, 6))
    settings = dr.PGDOptions(50, 1e-9, kind, **(options or {}))
    return _Run(x.flatten(1), A, Quartic(), torch.ones(3, device=device), settings, 0.5 * x, None)


def rounds_of_pgd(kind: str, device: str) -> None:
    run = a_run(kind, device)
    run.begin()
    for _ in range(8):
        run.round()


def steps_of(solver: str, device: str) -> None:
    b = torch.rand(3, 20, device=device)
    inverse = torch.rand(3, 20, device=device) + 0.5
    for preconditioner in (None, lambda v: inverse * v):
        s = linear_system.System(lambda v: 2.0 * v, b, None, 1e-6)
        method: Any = (_ConjugateGradients if solver == "cg" else _Minres)(s, preconditioner)
        method.restart()
        for _ in range(3):
            method.step()


@pytest.mark.parametrize("work", [*ACCELERATIONS, "cg", "minres"])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_rounds_never_look(work: str, device: str) -> None:
    """Under a watch; and on a device that has no numbers to give."""
    run = steps_of if work in ("cg", "minres") else rounds_of_pgd
    simulate_device = loop.simulate_device() if device == "cpu" else nullcontext()
    with NoLooking(), simulate_device, torch.no_grad():
        run(work, device)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_closed_forms_never_look(device: str) -> None:
    with NoLooking(), torch.no_grad():
        A = dr.Identity((1, 4, 4))
        x, number = torch.ones(2, 1, 4, 4, device=device), torch.ones(2, device=device)
        for weight in (0.5, number):
            assert A.prox_l2(x, x.flatten(1), weight).shape == x.shape
            assert A.shifted_inverse(x, weight).shape == x.shape


# -- polling and replaying ---------------------------------------------------------------------------------------------


def test_poll_answers_late_and_in_order() -> None:
    flags = [torch.tensor([True, k < 3]) & torch.tensor(k < 5) for k in range(9)]
    assert [loop.AnyActive(3)(f) for f in flags] == [bool(f.any()) for f in flags]
    for n in (0, 1, 3):
        poll = loop.AnyActive(n)
        with loop.simulate_device():
            told = [poll(f) for f in flags]
        assert told == [True] * n + [k < 5 for k in range(9 - n)]


class Tape(TorchDispatchMode):
    """What a CUDA graph is, for CPU tensors: operations on fixed memory, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        for func, args, kwargs, out in self.calls:
            again = func(*args, **kwargs)
            for kept, new in zip(flat(out), flat(again), strict=True):
                if kept.data_ptr() != new.data_ptr():
                    kept.copy_(new)

    def reset(self) -> None:
        self.calls.clear()


def flat(out: Any) -> list[torch.Tensor]:
    return [out] if isinstance(out, torch.Tensor) else [t for t in out or () if isinstance(t, torch.Tensor)]


TAPES: list[Tape] = []


class Recorded(graphs.GraphedLoop):
    """With a tape in the place of the graph; recording it must leave the state's values as they were, as CUDA does."""

    fail = False

    def __init__(self, body: Callable[[], None], holders: Any, device: Any = None, reuse: Any = None) -> None:
        super().__init__(body, holders, torch.device("cpu"), self._tape)

    def _tape(self, body: Callable[[], None], device: torch.device) -> Tape:
        before = [(t, t.clone()) for _, _, t in self._state()]
        TAPES.append(Tape())
        with TAPES[-1]:
            body()
        for t, value in before:
            t.copy_(value)
        if self.fail:
            raise RuntimeError("operation not permitted when stream is capturing\nand more")
        return TAPES[-1]


class Failing(Recorded):
    fail = True


@contextmanager
def taped(replay: type[Recorded]) -> Iterator[None]:
    """Solves as on a device that captures, or fails to and says so once."""
    TAPES.clear()
    with pytest.MonkeyPatch.context() as patch, loop.simulate_device(), warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        patch.setattr(graphs, "WARM_UP", 3)
        patch.setattr(graphs, "_NO_GRAPH", set())
        patch.setattr(import_module("deepreg_fast.solvers.pgd"), "GraphedLoop", replay)
        patch.setattr(linear_system, "GraphedLoop", replay)
        yield
        assert graphs._NO_GRAPH == ({torch.device("cpu")} if replay.fail else set())
    assert len(TAPES) == 1 and (not TAPES[0].calls or replay.fail)
    assert [str(w.message) for w in told if "CUDA graph" in str(w.message)] == replay.fail * [
        "This solve goes on without a CUDA graph, which could not be made: operation not permitted when stream is "
        "capturing"
    ]


@pytest.mark.parametrize("replay", [Recorded, Failing])
@pytest.mark.parametrize("kind", ACCELERATIONS)
def test_replayed_recovery_has_the_same_bits(
    kind: str, replay: type[Recorded], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(acceleration, "_solve", solve_spd)
    A, x = dr.SRM((1, 6, 6), 0.5), images(4, 1, 6, 6)
    arguments = (A.A(x), A, Quartic(), torch.logspace(-2, 1, 4).double(), dr.PGDOptions(60, 1e-9, kind), 0.3 * x)
    with dr.use_backend("reference"):
        plain = pgd(*arguments)
        assert plain.gradients.max() > 12 and len(set(plain.gradients.tolist())) > 1
        with taped(replay):
            equal(pgd(*arguments), plain, FIELDS)


@pytest.mark.parametrize("replay", [Recorded, Failing])
@pytest.mark.parametrize("preconditioned", [False, True])
@pytest.mark.parametrize("solver", [cg, minres])
def test_replayed_systems_have_the_same_bits(solver: Solver, preconditioned: bool, replay: type[Recorded]) -> None:
    """float32 at the edge of its accuracy, so that a solve restarts and the graph serves several passes."""
    d = 10.0 ** -torch.outer(torch.linspace(0.5, 2.5, 5), torch.linspace(0, 1, 40))
    b, options = normal(5, 40).float(), (CGOptions if solver is cg else MinresOptions)(150, 2e-7)
    inverse = (lambda v: v / (d + 0.3)) if preconditioned else None
    passes_made: list[int] = []

    def count(self: Any, rows: torch.Tensor, true_residual: Any = linear_system.System.true_residual) -> None:
        passes_made.append(1)
        true_residual(self, rows)

    with dr.use_backend("reference"), pytest.MonkeyPatch.context() as patch:
        plain = solver(lambda v: d * v, b, options, preconditioner=inverse)
        patch.setattr(linear_system.System, "true_residual", count)
        with taped(replay):
            found = solver(lambda v: d * v, b, options, preconditioner=inverse)
    assert len(passes_made) > 1
    equal(found, plain, ("x", "status", "iterations", "residual"))


def test_replay_of_tensors_that_change_places(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names that trade their tensors, share one, or are given new ones between two calls."""

    class Trade:
        def __init__(self) -> None:
            self.a = self.b = torch.arange(3.0)
            self.c, self.name = torch.ones(3), "no tensor"
            self.d, self.e, self.f = torch.eye(3)

        def __call__(self) -> None:
            self.a, self.b = self.b, self.a + self.c
            self.c.mul_(0.5)
            self.d, self.e, self.f = self.e, self.f, self.d

    monkeypatch.setattr(graphs, "WARM_UP", 2)
    eager, tape = Trade(), Trade()
    with Recorded(tape, (tape,)) as advance:
        for k in range(7):
            advance()
            for _ in range(1 if k < 2 else graphs.ROUNDS):
                eager()
            if k == 4:
                eager.b, tape.b = eager.a, tape.a
            for name in "abcdef":
                assert torch.equal(getattr(eager, name), getattr(tape, name)), (k, name)


def test_a_graph_is_recorded_on_a_stream_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """The calls to torch, in order, and that a recording ends whatever happens in it."""
    told: list[str] = []

    class Told:
        def __init__(self, *args: Any) -> None:
            pass

        def __getattr__(self, name: str) -> Callable[..., Any]:
            return lambda *args, **named: told.append(" ".join([name, *map(str, named.values())]))

    @contextmanager
    def inside(what: Any) -> Iterator[None]:
        told.append("in")
        yield
        told.append("out")

    for name, fake in {"CUDAGraph": Told, "Stream": Told, "device": inside, "stream": inside}.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "current")
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda *given: told.append(f"end {given}"), raising=False)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: told.append("empty"))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=400))
    monkeypatch.setattr(gpu_graphs, "_FREED", {})
    device = torch.device("cuda", 0)
    graphs._record(lambda: told.append("body"), device)
    assert told == ["wait_stream", "in", "in", "capture_begin pool thread_local", "body", "capture_end", "out", "out"]
    told.clear()
    for size, wanted in ((30, ["reset"]), (21, ["reset", "empty"]), (30, ["reset"])):
        told.clear()
        gpu_graphs.free(gpu_graphs.Loop(Told(), {}, size=size), device)
        assert told == wanted
    told.clear()
    with pytest.raises(ZeroDivisionError):
        graphs._record(lambda: told.append(str(1 // 0)), device)
    assert told[-2:] == ["capture_end", "end (0, 'pool')"]


def test_which_rounds_can_be_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda", 0)

    def graph_of(run: _Run, capturable: bool = True) -> torch.device | None:
        run.state.x = SimpleNamespace(is_cuda=True, device=device)  # type: ignore[assignment]
        monkeypatch.setattr(backend, "select", lambda *_: SimpleNamespace(capturable=capturable))
        return run.device(None)

    def run(reg: Regularizer, A: dr.LinearOperator, rounds: int = 100) -> _Run:
        x = torch.rand(1, 1, 4, 4)
        return _Run(A.A(x), A, reg, torch.ones(1), dr.PGDOptions(rounds), x, None)

    red, one = dr.RED(channels=2), dr.Identity((1, 4, 4))
    assert graph_of(run(red, one)) == device
    assert graph_of(run(red, one), capturable=False) is None
    assert graph_of(run(Quartic(), one)) is None
    assert graph_of(run(red, one, 20)) is None
    assert run(red, one).device(None) is None
    assert not dr.SRM((1, 4, 4)).capturable(torch.rand(1, 1, 4, 4))


# -- on a device -------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("work", [*ACCELERATIONS, "cg", "minres"])
def test_rounds_never_wait_for_the_gpu(work: str) -> None:
    run = steps_of if work in ("cg", "minres") else rounds_of_pgd
    run(work, "cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(work, "cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_poll_on_the_gpu() -> None:
    poll = loop.AnyActive(2)
    assert [poll(torch.tensor([False, k < 3], device="cuda")) for k in range(6)] == [True] * 5 + [False]


@pytest.mark.gpu
@pytest.mark.parametrize("solver", [cg, minres])
def test_a_graph_on_the_gpu_has_the_bits_of_the_loop(solver: Solver) -> None:
    d = 10.0 ** -torch.outer(torch.linspace(0.5, 2.5, 5), torch.linspace(0, 1, 4000)).cuda()
    b, options = normal(5, 4000).float().cuda(), (CGOptions if solver is cg else MinresOptions)(150, 2e-7)
    eager = solver(lambda v: d * v, b, options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        replayed = solver(lambda v: d * v, b, options, capturable=True)
    assert eager.iterations.max() > 2 * graphs.WARM_UP
    equal(replayed, eager, ("x", "status", "iterations", "residual"))


@pytest.mark.gpu
def test_a_graph_that_cannot_be_made_on_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A product that looks at a number, though it was said not to; torch's allocator is none the worse for it."""
    monkeypatch.setattr(graphs, "_NO_GRAPH", set())
    d = torch.logspace(-3, 0, 4000).cuda()[None]

    def looks(v: torch.Tensor) -> torch.Tensor:
        float(v.sum())
        return d * v

    b = normal(1, 4000).float().cuda()
    with pytest.warns(UserWarning, match="without a CUDA graph"):
        found = cg(looks, b, CGOptions(100, 1e-4), capturable=True)
    equal(found, cg(lambda v: d * v, b, CGOptions(100, 1e-4)), ("x", "status", "iterations", "residual"))
    torch.cuda.empty_cache()


# -- running out of memory ---------------------------------------------------------------------------------------------


def test_nothing_is_lost_when_memory_runs_out() -> None:
    A, x, calls = dr.SRM((1, 6, 6), 0.5), images(2, 1, 6, 6), []

    class Greedy(Quartic):
        def value_and_grad(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            calls.append(1)
            if len(calls) == 9:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB, 1 GiB is free.\nMore")
            return super().value_and_grad(x)

    eight = dr.recover(A.A(x), A, Quartic(), 0.1, options=dr.PGDOptions(8, 1e-12))
    with pytest.raises(OutOfMemory, match="Tried to allocate 2 GiB, 1 GiB is free. Use a smaller batch") as error:
        dr.recover(A.A(x), A, Greedy(), 0.1, options=dr.PGDOptions(50, 1e-12))
    equal(error.value.partial, eight, ("x", "status", "iterations", "gradients", "tau"))


def test_an_adjoint_without_memory_keeps_the_recovery() -> None:
    A, x = dr.SRM((1, 6, 6), 0.5), images(2, 1, 6, 6)

    class Greedy(dr.RED):
        def linearize(self, x: torch.Tensor) -> backend.Linearization:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(OutOfMemory) as error:
        dr.hypergradient(x, A.A(x), A, Greedy(channels=2).double(), 0.1)
    assert isinstance(error.value.partial, dr.Solution) and error.value.partial.status.eq(0).all()

    def matvec(v: torch.Tensor, calls: list[int] = []) -> torch.Tensor:  # noqa: B006 - counts
        calls.append(1)
        if len(calls) == 4:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return v * torch.linspace(1, 9, 5)

    b = 8.0 * torch.ones(1, 5)
    with pytest.raises(OutOfMemory) as error:
        cg(matvec, b)
    three = cg(lambda v: v * torch.linspace(1, 9, 5), b, CGOptions(3))
    assert torch.equal(error.value.partial.x, three.x) and error.value.partial.status.eq(1).all()


# -- the small systems of Anderson -------------------------------------------------------------------------------------


@pytest.mark.parametrize("m", [1, 2, 5, 20])
def test_elimination_is_backward_stable(m: int) -> None:
    """Ridge-damped Gram matrices up to a condition of 1e9: the residual is that of a matrix m eps away (Higham 2002,
    theorem 14.5, has Gauss-Jordan's for positive definite matrices within a small multiple of that)."""
    eps = torch.finfo(torch.float64).eps
    for close in (0.0, 1e-3, 1e-6):
        df = normal(30, m, 50, seed=m)
        df = df[:, :1] + close * df if close else df
        gram = df @ df.mT
        damped = gram + 1e-8 * gram.diagonal(dim1=1, dim2=2).amax(1)[:, None, None] * torch.eye(m).double()
        rhs = (df @ normal(30, 50, 1))[..., 0]
        x = solve_spd(damped, rhs)
        residual = (damped @ x[..., None])[..., 0] - rhs
        bound = 8 * m * eps * torch.linalg.matrix_norm(damped) * x.norm(dim=1)
        assert (residual.norm(dim=1) <= bound).all()
        assert torch.equal(solve_spd(damped[3:4], rhs[3:4]), x[3:4])
    damped[0] = torch.nan
    assert torch.equal(solve_spd(damped, rhs)[1:], x[1:])


def test_select_takes_no_copy_on_the_cpu() -> None:
    t, none = torch.ones(2, 3), torch.zeros(2, 3)
    yes = torch.ones(2, dtype=torch.bool)
    assert select(yes, t, none) is t and torch.equal(select(~yes, t, none), none)
    with loop.simulate_device():
        assert select(yes, t, none) is not t
