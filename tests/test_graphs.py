"""Graphs that outlive a solve: a later one replays them, or makes its own, and has the bits of one without graphs."""

from __future__ import annotations

import gc
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode_stack

import deepreg_fast as dr
from deepreg_fast import backend
from deepreg_fast.backend.gpu import graphs as gpu_graphs
from deepreg_fast.backend.gpu import packed
from deepreg_fast.backend.gpu.graphs import KEPT, Loop, Signature, places_of
from deepreg_fast.batched import graphs
from deepreg_fast.batched import loop as progress
from deepreg_fast.inverse import adjoint as adjoint_module
from deepreg_fast.inverse.adjoint import adjoint_named, solve_adjoint
from deepreg_fast.operators.base import LinearOperator
from deepreg_fast.regularizers.base import Regularizer
from deepreg_fast.solvers import acceleration, linear_system, pgd

from .helpers import images, normal, random_red
from .test_device_loops import Tape, equal, poison

SOLUTION = ("x", "status", "iterations", "gradients", "residual", "tau")
LINEAR = ("x", "status", "iterations", "residual")
CPU = torch.device("cpu")


class Quadratic(nn.Module):
    """The place of two parameters."""

    def __init__(self, first: float, second: float) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.tensor([first]).double())
        self.second = nn.Parameter(torch.tensor([second]).double())


class Bowl(Regularizer):
    """`sum a u^2 / 2 + b u^4`, `u = x - center`."""

    def __init__(self, first: float = 1.0, second: float = 0.7) -> None:
        super().__init__()
        self.net = Quadratic(first, second)

    def _numbers(self) -> tuple[torch.Tensor, torch.Tensor]:
        parameters = list(self.net.parameters())

        def pack() -> packed.Packed:
            return [(2.0 * parameters[0].detach(), 2.0 * parameters[1].detach())]

        a, b = packed.packed(self.net, parameters, (), CPU, pack)[0]
        return 0.5 * a, 0.5 * b

    def energy(self, x: torch.Tensor) -> torch.Tensor:
        u = x - self.center
        return (0.5 * self.net.first * u**2 + self.net.second * u**4).flatten(1).sum(1)


class Bend:
    """The Hessian of a `Bowl`, from what was kept at x; it reads images and packed parameters."""

    capturable = True

    def __init__(self, reg: Bowl, x: torch.Tensor) -> None:
        self.reg, self.x, self.u = reg, x, x - reg.center
        self.value, self.grad = Analytic().value_and_grad(reg, x)
        self.a, self.b = reg._numbers()

    def signature(self) -> Signature:
        return Analytic().signature(self.reg, self.x)

    def moved(self, put: Callable[[torch.Tensor], torch.Tensor]) -> Bend:
        there = Bend.__new__(Bend)
        there.__dict__.update(vars(self), u=put(self.u), a=put(self.a), b=put(self.b))
        return there

    def hvp(self, v: torch.Tensor) -> torch.Tensor:
        CALLS.append("hvp")
        return poison(backend.active_mask(v), (self.a + 12.0 * self.b * self.u**2).to(v.dtype) * v)

    def param_vjp(self, v: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"net.first": (self.u * v).sum()[None], "net.second": 4.0 * (self.u**3 * v).sum()[None]}


class Analytic:
    """A backend that can be captured, for CPU tensors."""

    name = "analytic"
    batch_invariant = capturable = True

    def unavailable(self) -> str | None:
        return None

    def unsupported_reason(self, energy: nn.Module, x: torch.Tensor) -> str | None:
        return None if isinstance(energy, Bowl) else "it is for bowls."

    def value_and_grad(self, energy: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        CALLS.append("gradient")
        (a, b), rows, u = energy._numbers(), backend.active_mask(x), x - energy.center
        value = (0.5 * a * u**2 + b * u**4).flatten(1).sum(1)
        return poison(rows, value.to(x.dtype)), poison(rows, (a * u + 4.0 * b * u**3).to(x.dtype))

    def linearize(self, energy: Any, x: torch.Tensor) -> Bend:
        return Bend(energy, x)

    def signature(self, energy: Any, x: torch.Tensor) -> Signature:
        memory = tuple(p.detach() for p in energy.parameters())
        return Signature(("bowl", energy.center, places_of(memory)), energy, memory)


class Scale(LinearOperator):
    """`A x = s x`."""

    def __init__(self, image_shape: tuple[int, int, int], s: float) -> None:
        super().__init__(image_shape, int(torch.Size(image_shape).numel()))
        self.s, self.gram_scale = s, s * s

    def _forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.s * x.flatten(1)

    def _adjoint(self, y: torch.Tensor) -> torch.Tensor:
        return self.s * y.reshape(-1, *self.image_shape)

    def capturable(self, like: torch.Tensor) -> bool:
        return True

    def signature(self, like: torch.Tensor) -> Signature:
        return Signature(("scale", self.image_shape), self)


def tensors_in(*values: Any) -> list[torch.Tensor]:
    """Tensors, and those in lists and tuples."""
    return [t for v in values for t in (v if isinstance(v, (list, tuple)) else [v]) if isinstance(t, torch.Tensor)]


def place(t: torch.Tensor) -> int:
    return t.untyped_storage().data_ptr()


def keeps(loop: Loop) -> set[int]:
    """The places of the memory that a loop keeps."""
    found = list(loop.state.values()) + loop.inputs
    for thing in loop.held:
        found += [thing] if isinstance(thing, torch.Tensor) else tensors_in(*vars(thing).values())
    return {place(t) for t in found}


CALLS: list[str] = []
TAPES: list[Undoing] = []
RECORDING = threading.Lock()


def record(body: Callable[[], None], device: torch.device) -> Undoing:
    """A tape in the place of a CUDA graph. What ran while it was made is undone, for a recording runs nothing."""
    with RECORDING, Undoing() as tape:
        body()
    tape.undo()
    TAPES.append(tape)
    return tape


class Undoing(Tape):
    """Keeps what was there before an operation changed it, and notes the memory that it reads and does not make."""

    def __init__(self) -> None:
        super().__init__()
        self.before: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.replays, self.freed = 0, False
        self.made: set[int] = set()
        self.read: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write and isinstance(value, torch.Tensor):
                self.before.append((value, value.clone()))
        self.reads(*map(place, tensors_in(*args, *(kwargs or {}).values())))
        out = super().__torch_dispatch__(func, types, args, kwargs)
        self.made |= {*map(place, tensors_in(out))} - self.read
        return out

    def reads(self, *places: int) -> None:
        self.read |= set(places) - self.made - {0}

    def undo(self) -> None:
        for t, value in reversed(self.before):
            t.copy_(value)
        self.before.clear()

    def replay(self) -> None:
        assert not self.freed
        self.replays += 1
        super().replay()

    def reset(self) -> None:
        self.freed = True
        super().reset()


@contextmanager
def captured() -> Iterator[None]:
    """Solves as on a device that captures, by the backend above, from an empty cache."""
    kept = dict(backend._TABLE)
    with pytest.MonkeyPatch.context() as patch, progress.simulate_device(), warnings.catch_warnings():
        warnings.filterwarnings("error", "This solve goes on without a CUDA graph")
        backend.register(Analytic())  # type: ignore[arg-type]
        patch.setattr(acceleration, "_solve", acceleration.solve_spd)
        # A tape has torch's operations, and no kernels of ours.
        patch.setattr(backend.cpu.CpuBackend, "vectors", lambda *_: None)
        patch.setattr(graphs, "_record", record)
        patch.setattr(graphs, "_NO_GRAPH", set())
        for module in (import_module("deepreg_fast.solvers.pgd"), linear_system, adjoint_module):
            patch.setattr(module, "records", lambda t: True)
        KEPT.clear()
        CALLS.clear()
        TAPES.clear()
        yield
        KEPT.clear()
    backend._TABLE.clear()
    backend._TABLE.update(kept)


@pytest.fixture(name="device", autouse=True)
def _device() -> Iterator[None]:
    with captured():
        yield


def shape(size: int) -> tuple[int, int, int]:
    return (1, size, size)


class Problem:
    """A recovery and an adjoint solve, each of eight rounds at most; what is not said is always the same."""

    def __init__(self, seed: int = 0, batch: int = 3, size: int = 4, dtype: torch.dtype = torch.float64) -> None:
        self.reg, self.A = Bowl(), Scale(shape(size), 0.8)
        self.x = 0.5 + 2.0 * normal(batch, *shape(size), seed=seed).to(dtype)
        self.y, self.mu = self.x.flatten(1) + 0.1 * seed, torch.linspace(0.1, 1.0, batch).to(dtype)
        self.rounds, self.kind, self.method, self.curvature = 8, "anderson", "cg", 1.0

    def recovery(self) -> Any:
        options = dr.PGDOptions(self.rounds, 1e-12, self.kind, memory=2)
        return pgd(self.y, self.A, self.reg, self.mu, options, 0.3 * self.x)

    def adjoint(self) -> Any:
        lin = self.reg.linearize(self.x)
        options = adjoint_named(self.method, self.rounds, 1e-14)
        return solve_adjoint(lin, self.A, self.mu, torch.sin(9 * self.x), options, None, self.curvature)


SOLVES = {"recovery": SOLUTION, "adjoint": LINEAR}


def check(p: Problem, solve: str) -> Any:
    """A solve has the bits of one without graphs."""
    found = getattr(p, solve)()
    with graphs.without_graphs():
        equal(found, getattr(p, solve)(), SOLVES[solve])
    return found


def eager(p: Problem, solve: str) -> int:
    """How many products or gradients Python made in a solve, which must have the right bits."""
    CALLS.clear()
    getattr(p, solve)()
    count = len(CALLS)
    check(p, solve)
    return count


# Of the eight rounds of a solve; besides them there are a first gradient, and a last true residual.
OUTSIDE = {"recovery": 1, "adjoint": 2}
RECORDED = graphs.ROUNDS


@pytest.mark.parametrize("solve", SOLVES)
@pytest.mark.parametrize("method", ["cg", "minres"])
def test_the_second_solve_is_recorded_and_the_third_is_replayed_at_once(solve: str, method: str) -> None:
    """Of as few rounds as the adjoint solve of a training step, fewer than a first warm-up."""
    p = Problem()
    p.method = method
    with graphs.without_graphs():
        rounds = eager(p, solve) - OUTSIDE[solve]
    assert 4 < rounds <= p.rounds + progress.QUERY_LAG < graphs.WARM_UP
    CALLS.clear()
    getattr(p, solve)()
    assert not TAPES and len(KEPT) == 0
    CALLS.clear()
    getattr(p, solve)()
    assert len(TAPES) == 1 and TAPES[0].replays > 1 and len(CALLS) == graphs.AGAIN + RECORDED + OUTSIDE[solve]
    assert TAPES[0].read <= keeps(KEPT._entries[0].loop)
    replays, CALLS[:] = TAPES[0].replays, []
    getattr(p, solve)()
    assert len(TAPES) == 1 and TAPES[0].replays > replays and len(CALLS) == OUTSIDE[solve]
    for _ in range(2):
        check(p, solve)
    assert len(TAPES) == 1


def warm(p: Problem, solve: str) -> Any:
    """Solve until there is a graph."""
    for _ in range(2):
        check(p, solve)
    assert len(KEPT) == 1
    TAPES.clear()
    return getattr(p, solve)()


def replaces(p: Problem, solve: str) -> bool:
    """Whether the next solve finds no graph of an earlier one, which changes none of its bits."""
    CALLS.clear()
    getattr(p, solve)()
    missed = len(CALLS) > OUTSIDE[solve]
    for _ in range(2):
        check(p, solve)
    return missed


@pytest.mark.parametrize("solve", SOLVES)
def test_inputs_are_copied_in_and_answers_out(solve: str) -> None:
    p = Problem()
    first = warm(p, solve)
    kept = {name: getattr(first, name).clone() for name in SOLVES[solve]}
    other = Problem(seed=1)
    other.reg, other.A, other.mu = p.reg, p.A, 2.0 * p.mu
    assert not replaces(other, solve)
    for name, value in kept.items():
        assert torch.equal(getattr(first, name), value), name


@pytest.mark.parametrize("solve", SOLVES)
def test_parameters_changed_in_place_are_seen(solve: str) -> None:
    p = Problem()
    before = warm(p, solve)
    adam = torch.optim.Adam(p.reg.parameters(), lr=0.1)
    for parameter in p.reg.parameters():
        parameter.grad = torch.ones_like(parameter)
    adam.step()
    assert not replaces(p, solve)
    assert not torch.equal(getattr(p, solve)().x, before.x)


def alterations(p: Problem) -> dict[str, Callable[[], None]]:
    """What a graph must not survive."""
    first = p.reg.net.first

    def parameter() -> None:
        p.reg.net.first = nn.Parameter(2.0 * first.detach())

    def images(**changed: Any) -> Callable[[], None]:
        def change() -> None:
            other = Problem(**changed)
            p.x, p.y, p.mu = other.x, other.y, other.mu
            p.A = p.A if "size" not in changed else other.A

        return change

    return {
        "replaced parameter": parameter,
        "data of a parameter": lambda: setattr(first, "data", 2.0 * first.data),
        "setting": lambda: setattr(p.reg, "center", 0.4),
        "regularizer": lambda: setattr(p, "reg", Bowl()),
        "operator": lambda: setattr(p, "A", Scale(p.A.image_shape, 0.5)),
        "batch": images(batch=2),
        "size": images(size=5),
        "dtype": images(dtype=torch.float32),
        "limit": lambda: setattr(p, "rounds", 7),
    }


@pytest.mark.parametrize("solve", SOLVES)
@pytest.mark.parametrize("change", alterations(Problem()))
def test_what_makes_another_graph(solve: str, change: str) -> None:
    p = Problem()
    warm(p, solve)
    # They live on, so that only the key can tell.
    owners = (p.reg, p.A)
    alterations(p)[change]()
    if change == "dtype":
        p.reg._check = lambda x: None  # type: ignore[method-assign]
    assert replaces(p, solve) and len(owners) == 2


def test_what_else_makes_another_graph() -> None:
    p = Problem()
    for name, value in (("method", "minres"), ("curvature", 1.5)):
        warm(p, "adjoint")
        setattr(p, name, value)
        assert replaces(p, "adjoint"), name
        KEPT.clear()
    warm(p, "recovery")
    p.kind = "fista"
    assert replaces(p, "recovery")
    KEPT.clear()
    warm(p, "recovery")
    with torch.inference_mode():
        assert replaces(p, "recovery")
    backend.register(Analytic())  # type: ignore[arg-type]
    assert replaces(p, "recovery")


def test_work_that_is_the_users_is_not_kept() -> None:
    """A subclass of an operator, a gradient put on a regularizer, a product that is said to be capturable."""

    class Mine(dr.Identity):
        pass

    assert Mine(shape(4)).signature(torch.ones(1)) is None and dr.Identity(shape(4)).signature(torch.ones(1))
    A = dr.SRM(shape(4))
    assert A.signature(torch.ones(1)) is not None
    A.normal = lambda x: x  # type: ignore[method-assign]
    assert A.signature(torch.ones(1)) is None
    p = Problem()
    p.reg.value_and_grad = lambda x: Analytic().value_and_grad(p.reg, x)  # type: ignore[method-assign]
    d = torch.linspace(1.0, 30.0, 16).double()
    for _ in range(3):
        p.recovery()
        dr.cg(lambda v: d * v, normal(2, 16), dr.CGOptions(30, 1e-12), capturable=True)
    assert len(KEPT) == 0 and len(TAPES) == 3 and all(t.freed for t in TAPES)


def test_a_training_step_replays_its_adjoint_solve() -> None:
    """Recovery, adjoint solve, parameter product and Adam: no step after the second makes a product in Python but for
    the true residual, and all have the gradients of steps without graphs."""
    p, plain = Problem(), Problem()
    adams = [torch.optim.Adam(q.reg.parameters(), lr=0.05) for q in (p, plain)]

    def step(q: Problem, adam: torch.optim.Adam, seed: int) -> None:
        q.x = Problem(seed).x
        options = dr.PGDOptions(8, 1e-12, "anderson", memory=2)
        adjoint = adjoint_named("cg", 8, 1e-14)
        found = dr.hypergradient(q.x, q.y, q.A, q.reg, 0.3, options=options, adjoint=adjoint)
        for name, parameter in q.reg.named_parameters():
            parameter.grad = found.theta[name]
        adam.step()

    for seed in range(5):
        CALLS.clear()
        step(p, adams[0], seed)
        if seed > 1:
            assert sorted(CALLS) == ["gradient", "gradient", "hvp"]
        with graphs.without_graphs():
            step(plain, adams[1], seed)
        for ours, theirs in zip(p.reg.parameters(), plain.reg.parameters(), strict=True):
            assert torch.equal(ours, theirs), seed
    assert len(TAPES) == 2 and len(KEPT) == 2


def test_two_threads_never_share_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    problems = [Problem(seed) for seed in range(2)]
    problems[1].reg, problems[1].A = problems[0].reg, problems[0].A
    warm(problems[0], "adjoint")
    meeting, found = threading.Barrier(2), {}
    replay, met = Undoing.replay, threading.local()

    def waits(self: Undoing) -> None:
        # Each holds its graph while the other begins.
        if not getattr(met, "already", False):
            met.already = True
            meeting.wait(30)
        replay(self)

    monkeypatch.setattr(Undoing, "replay", waits)

    def work(i: int) -> None:
        with progress.simulate_device(), torch.no_grad():
            for _ in range(3):
                found[i] = problems[i].adjoint()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    monkeypatch.undo()
    assert len(found) == 2 and len(KEPT) == 2
    with graphs.without_graphs():
        for i, p in enumerate(problems):
            equal(found[i], p.adjoint(), LINEAR)


@pytest.mark.parametrize("solve", SOLVES)
def test_an_exception_in_the_middle_leaves_the_cache_usable(solve: str, monkeypatch: pytest.MonkeyPatch) -> None:
    p = Problem()
    warm(p, solve)
    replay = Undoing.replay

    def breaks(self: Undoing) -> None:
        replay(self)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Undoing, "replay", breaks)
        getattr(p, solve)()
    assert len(KEPT) == 0
    for _ in range(3):
        check(p, solve)
    assert len(KEPT) == 1


def test_a_graph_dies_with_its_regularizer_and_with_its_operator() -> None:
    for owner in ("reg", "A"):
        p = Problem()
        warm(p, "recovery")
        warm_graph = KEPT._entries[0].loop.graph
        parameter = weakref.ref(p.reg.net.first)
        setattr(p, owner, None)
        gc.collect()
        assert len(KEPT) == 0 and warm_graph.freed  # type: ignore[attr-defined]
        assert owner == "A" or parameter() is None


def test_graphs_are_bounded_and_the_least_recently_used_go_first(monkeypatch: pytest.MonkeyPatch) -> None:
    owner = Bowl()
    loops = [Loop(Undoing(), {(0, "x"): torch.zeros(100)}, [torch.zeros(25)], size=500) for _ in range(5)]
    assert loops[0].bytes() == 1000
    cache = gpu_graphs.Cache()
    monkeypatch.setattr(gpu_graphs, "MOST", 3)
    for i, loop in enumerate(loops[:3]):
        cache.put(i, CPU, (owner,), loop)
    assert cache.take(0) == (loops[0], False) and cache.take(0) == (None, True)
    cache.put(0, CPU, (owner,), loops[0])
    cache.put(3, CPU, (owner,), loops[3])
    assert len(cache) == 3 and [loop.graph.freed for loop in loops] == [False, True, False, False, False]  # type: ignore[attr-defined]
    monkeypatch.setattr(gpu_graphs, "_room", lambda device: 2500)
    cache.put(4, CPU, (owner,), loops[4])
    assert len(cache) == 2 and [loop.graph.freed for loop in loops] == [True, True, True, False, False]  # type: ignore[attr-defined]
    monkeypatch.setattr(gpu_graphs, "_room", lambda device: 999)
    cache.put(4, CPU, (owner,), loops[4])
    assert len(cache) == 0
    for i in range(2 * gpu_graphs.SEEN):
        cache.take(i)
    assert len(cache._seen) == gpu_graphs.SEEN


def test_graphs_are_released_when_asked_and_when_memory_is_short() -> None:
    p = Problem()
    warm(p, "recovery")
    assert dr.release_graphs("cpu") == 1 and dr.release_graphs() == 0
    warm(p, "recovery")
    calls = []

    @gpu_graphs.retry_after_freeing_graphs
    def greedy() -> int:
        calls.append(len(KEPT))
        if len(calls) == 1 or len(calls) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return 7

    assert greedy() == 7 and calls == [1, 0]
    with pytest.raises(torch.OutOfMemoryError):
        greedy()
    assert len(calls) == 3


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["recovery", "adjoint", "adjoint"]),
        st.sampled_from(["same", "same", "adam", "replace", "other", "interrupt", "release", "gone"]),
        st.sampled_from([(2, 4), (3, 4)]),
        st.sampled_from(["cg", "minres"]),
        st.integers(0, 3),
    ),
    min_size=3,
    max_size=10,
)


@settings(max_examples=15, deadline=None)
@given(STEPS)
def test_any_sequence_of_solves_has_the_bits_of_solves_without_graphs(steps: list[tuple[Any, ...]]) -> None:
    KEPT.clear()
    reg, A, earlier = Bowl(), Scale(shape(4), 0.8), []
    for solve, change, (batch, size), method, seed in steps:
        p = Problem(seed, batch, size)
        if change == "gone":
            reg = Bowl(1.0 + seed)
        p.reg, p.A, p.method = reg, A, method
        if change == "adam":
            with torch.no_grad():
                reg.net.first.mul_(1.1)
        elif change == "replace":
            reg.net.second = nn.Parameter(0.9 * reg.net.second.detach())
        elif change == "other":
            p.reg = Bowl(1.0 + 0.1 * seed)
        elif change == "release":
            dr.release_graphs()
        elif change == "interrupt":
            interrupted(p, solve)
        found = check(p, solve)
        earlier.append((solve, found, {n: getattr(found, n).clone() for n in SOLVES[solve]}))
        for name, answer, values in earlier:
            for field in SOLVES[name]:
                assert torch.equal(getattr(answer, field), values[field])
    assert len(KEPT) <= gpu_graphs.MOST


def interrupted(p: Problem, solve: str) -> None:
    """A solve that ends by an exception in its second replay, if it comes so far."""
    replay, count = Undoing.replay, []

    def breaks(self: Undoing) -> None:
        count.append(1)
        if len(count) == 2:
            raise ZeroDivisionError
        replay(self)

    with pytest.MonkeyPatch.context() as patch, suppress(ZeroDivisionError):
        patch.setattr(Undoing, "replay", breaks)
        getattr(p, solve)()


# -- the GPU backend's own launches ------------------------------------------------------------------------------------


@pytest.fixture(name="gpu")
def _gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The GPU backend in Triton's interpreter and by g++, whose launches go on the tape."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    from . import host_cuda
    from .test_gpu_whole import Interpreted

    if torch.cuda.is_available() or host_cuda.COMPILER is None:
        pytest.skip("tests/test_gpu.py runs the real one, or there is no g++")

    def taped(launch: Callable[..., Any], places: Callable[..., list[int]]) -> Callable[..., Any]:
        def call(*args: Any, **named: Any) -> None:
            tape = next((m for m in reversed(_get_current_dispatch_mode_stack()) if isinstance(m, Undoing)), None)
            with _disable_current_modes():
                if tape is not None:
                    tape.before += [(t, t.clone()) for t in tensors_in(*args, *named.values())]
                    tape.reads(*places(*args, **named))
                    tape.calls.append((launch, args, named, None))
                launch(*args, **named)

        return call

    executor, launcher = interpreter.GridExecutor, host_cuda.HostLauncher
    ours = lambda *args, **named: [*map(place, tensors_in(*args, *named.values()))]  # noqa: E731
    # Of its arguments the pointers are unsigned.
    theirs = lambda *args: [int(a) for a in args[-1] if isinstance(a, np.uint64)]  # noqa: E731
    monkeypatch.setattr(executor, "__call__", taped(executor.__call__, ours))
    monkeypatch.setattr(launcher, "launch", taped(launcher.launch, theirs))
    table = dict(backend._TABLE)
    backend.register(Interpreted())
    with dr.use_backend("interpreted"):
        yield
    backend._TABLE.clear()
    backend._TABLE.update(table)


@pytest.mark.parametrize(("norm", "head"), [*product(("none", "image"), ("red", "residual")), ("", "tv")])
def test_a_moved_linearization_reads_nothing_else(gpu: None, norm: str, head: str) -> None:
    red = None if head == "tv" else random_red(scale=0.05, double=False, channels=4, norm=norm, head=head)
    reg = red or dr.TV(0.1)
    x, v = (images(2, 1, 4, 4, dtype=torch.float32, seed=seed) for seed in range(2))
    lin: Any = reg.linearize(x)
    wanted, read = lin.hvp(v), []
    there = lin.moved(lambda t: read.append(t) or t.clone())
    for t in read:
        t.fill_(torch.nan)
    assert torch.equal(there.hvp(v), wanted)
    assert len({id(t) for t in read}) == len(read)


@pytest.mark.parametrize("kind", ["red", "tv"])
def test_solves_on_the_gpu_backend_have_the_bits_of_solves_without_graphs(
    gpu: None, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """While parameters change in place; and a graph reads nothing that it does not keep."""
    monkeypatch.setattr(graphs, "WARM_UP", 1)
    monkeypatch.setattr(graphs, "ROUNDS", 2)
    red = random_red(scale=0.05, double=False, channels=4, norm="pixel", alpha=0.5, depth=2)
    reg = red if kind == "red" else dr.TV(0.5)
    A, mu = dr.SRM((1, 4, 4), 0.4), torch.ones(1)

    def solves(x: torch.Tensor) -> tuple[Any, Any]:
        recovery = pgd(A.A(x), A, reg, mu, dr.PGDOptions(3, 1e-12, "anderson", memory=2), 0.5 * x)
        lin = reg.linearize(x)
        return recovery, solve_adjoint(lin, A, mu, x - recovery.x, adjoint_named("cg", 3, 1e-12))

    for seed in range(2):
        with torch.no_grad():
            for parameter in reg.parameters():
                parameter.mul_(0.9)
        x = images(1, 1, 4, 4, dtype=torch.float32, seed=seed)
        found = solves(x)
        with graphs.without_graphs():
            wanted = solves(x)
        for ours, theirs, fields in zip(found, wanted, (SOLUTION, LINEAR), strict=True):
            equal(ours, theirs, fields)
    assert len(TAPES) == 2 and min(tape.replays for tape in TAPES) > 2
    for entry, tape in zip(KEPT._entries, TAPES, strict=True):
        assert entry.loop.graph is tape and tape.read <= keeps(entry.loop)
