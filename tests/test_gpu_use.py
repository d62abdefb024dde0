"""How the kernels behave among other work on a CUDA device: layouts, streams, threads, memory, waiting, sentences."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch

import deepreg_fast as dr
from deepreg_fast.backend import active_images
from deepreg_fast.backend.gpu import backend as gpu

from .helpers import images, normal, random_red, relative

on_a_device = pytest.mark.gpu


def network(**options: object) -> dr.RED:
    """Float32, 16 channels, LayerNorm over channels, on the device."""
    settings = {"channels": 16, "norm": "pixel", "scale": 0.05, "alpha": 0.5, "double": False, **options}
    return random_red(**settings).cuda()  # type: ignore[arg-type]


def batch(*shape: int, seed: int = 0) -> torch.Tensor:
    """Float32 images on the device."""
    return images(*shape, seed=seed, dtype=torch.float32).cuda()


def work(reg: dr.RED, A: dr.SRM, x: torch.Tensor) -> Callable[[], list[torch.Tensor]]:
    """Every kernel on the same images, ready to be called again and again."""
    v, gamma = torch.sin(7.0 * x), torch.linspace(0.5, 2.0, len(x), device=x.device)
    lin, y = reg.linearize(x), A.A(x)

    def run() -> list[torch.Tensor]:
        value, grad = reg.value_and_grad(x)
        products = [A.A(x), A.A_adjoint(y), A.normal(v), A.prox_l2(x, y, gamma)]
        return [value, grad, lin.hvp(v), *lin.param_vjp(v).values(), *products]

    return run


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    """Whether every bit is the same."""
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@on_a_device
@pytest.mark.parametrize("size", [45, 180])
def test_a_hundred_calls_give_the_same_bits(size: int) -> None:
    run = work(network(), dr.SRM((1, size, size), 0.3).cuda(), batch(6, 1, size, size))
    first = [t.clone() for t in run()]
    assert all(same(run(), first) for _ in range(100))


@on_a_device
def test_no_bit_of_an_image_depends_on_its_neighbours() -> None:
    reg, A, x = network(), dr.SRM((1, 37, 50), 0.3).cuda(), batch(7, 1, 37, 50)
    whole, y = reg.linearize(x), A.A(x)
    v = torch.sin(7.0 * x)
    for i in (0, 3, 6):
        one = slice(i, i + 1)
        alone = reg.linearize(x[one])
        assert torch.equal(alone.grad, whole.grad[one]) and torch.equal(alone.value, whole.value[one])
        assert torch.equal(alone.hvp(v[one]), whole.hvp(v)[one])
        assert torch.equal(A.A(x[one]), y[one]) and torch.equal(A.normal(x[one]), A.normal(x)[one])


@on_a_device
def test_images_that_have_ended_change_nothing() -> None:
    reg, A, x = network(), dr.SRM((1, 30, 30), 0.3).cuda(), batch(5, 1, 30, 30)
    rows = torch.tensor([True, False, True, True, False], device="cuda")
    lin, v = reg.linearize(x), torch.sin(7.0 * x)
    alone = [reg.value_and_grad(x)[1][rows], lin.hvp(v)[rows], A.normal(v)[rows]]
    spoilt = torch.where(rows.view(-1, 1, 1, 1), v, torch.nan)
    with active_images(rows):
        among = [reg.value_and_grad(x)[1][rows], lin.hvp(spoilt)[rows], A.normal(spoilt)[rows]]
        some = lin.param_vjp(spoilt)
    assert same(among, alone)
    fewer = reg.linearize(x[rows]).param_vjp(v[rows])
    assert all(relative(some[k].double(), fewer[k].double()) < 1e-5 for k in some)


@on_a_device
def test_layouts_give_the_same_bits() -> None:
    reg, A, x = network(), dr.SRM((2, 24, 20), 0.3).cuda(), batch(4, 1, 24, 20)
    strided = batch(4, 1, 48, 20)[:, :, ::2].copy_(x)
    turned = x.transpose(2, 3).contiguous().transpose(2, 3)
    last = x.to(memory_format=torch.channels_last)
    expected = reg.value_and_grad(x)[1]
    for other in (strided, turned, last):
        assert torch.equal(other, x) and torch.equal(reg.value_and_grad(other)[1], expected)
        assert torch.equal(reg.linearize(x).hvp(other), reg.linearize(x).hvp(x))
    two = batch(3, 2, 24, 20)
    for other in (two.to(memory_format=torch.channels_last), two.transpose(2, 3).contiguous().transpose(2, 3)):
        assert torch.equal(A.A(other), A.A(two)) and torch.equal(A.normal(other), A.normal(two))
    y = A.A(two)
    assert torch.equal(A.A_adjoint(y.t().contiguous().t()), A.A_adjoint(y))


@on_a_device
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_one_sentence(dtype: torch.dtype) -> None:
    reg, A, x = network(), dr.SRM((1, 24, 20), 0.3).cuda(), batch(2, 1, 24, 20).to(dtype)
    for f in (reg.value_and_grad, reg.linearize, A.A):
        with pytest.raises(dr.errors.InputError, match="float32 or float64"):
            f(x)


@on_a_device
def test_float64_is_served_by_the_reference() -> None:
    reg, x = network().double(), batch(2, 1, 24, 20).double()
    with dr.use_backend("reference"):
        expected = reg.value_and_grad(x)[1]
    assert torch.equal(reg.value_and_grad(x)[1], expected)
    A = dr.SRM((1, 24, 20), 0.3).cuda()
    assert dr.recover(A.A(x), A, reg, 0.1, options=dr.PGDOptions(20)).backend == "reference"
    with dr.use_backend("gpu"), pytest.raises(dr.errors.BackendUnavailable, match="float32"):
        reg.value_and_grad(x)


@on_a_device
def test_no_images_at_all() -> None:
    reg, A = network(), dr.SRM((1, 24, 20), 0.3).cuda()
    none = torch.zeros(0, 1, 24, 20, device="cuda")
    value, grad = reg.value_and_grad(none)
    assert value.shape == (0,) and grad.shape == none.shape and grad.is_cuda
    assert reg.linearize(none).hvp(none).shape == none.shape
    assert all(not t.any() for t in reg.linearize(none).param_vjp(none).values())
    assert A.A(none).shape == (0, A.measurements) and A.normal(none).shape == none.shape
    assert dr.recover(A.A(none), A, reg, 0.1).x.shape == none.shape


@on_a_device
def test_two_devices_are_one_sentence() -> None:
    reg, A, x = network(), dr.SRM((1, 24, 20), 0.3).cuda(), batch(2, 1, 24, 20)
    for f in (reg.value_and_grad, reg.linearize, A.A, A.normal):
        with pytest.raises(dr.errors.InputError, match="device"):
            f(x.cpu())
    lin = reg.linearize(x)
    for product in (lin.hvp, lin.param_vjp):
        with pytest.raises(dr.errors.InputError, match="cpu"):
            product(x.cpu())


@on_a_device
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device on this machine")
def test_a_device_that_is_not_the_current_one() -> None:
    reg, A, x = network(), dr.SRM((1, 45, 33), 0.3).cuda(), batch(3, 1, 45, 33)
    expected = [t.cpu() for t in work(reg, A, x)()]
    there = work(reg.to("cuda:1"), A.to("cuda:1"), x.to("cuda:1"))()
    assert torch.cuda.current_device() == 0 and all(t.device.index == 1 for t in there)
    assert same([t.cpu() for t in there], expected)


@on_a_device
def test_kernels_run_on_the_stream_that_is_current() -> None:
    reg, A, x = network(), dr.SRM((1, 180, 180), 0.3).cuda(), batch(8, 1, 180, 180)
    expected = [t.clone() for t in work(reg, A, x)()]
    torch.cuda.synchronize()
    stream, late = torch.cuda.Stream(), torch.full_like(x, torch.nan)
    with torch.cuda.stream(stream):
        # What runs on another stream would read the images before they are there.
        torch.cuda._sleep(50_000_000)
        late.copy_(x)
        found = work(reg, A, late)()
    stream.synchronize()
    assert same(found, expected)


@on_a_device
def test_two_threads_on_two_streams() -> None:
    jobs = []
    for norm, side, transform in (("pixel", 64, "dct"), ("none", 48, "walsh")):
        A = dr.SRM((1, side, side), 0.3, transform=transform).cuda()
        jobs.append(work(network(norm=norm), A, batch(5, 1, side, side)))
    expected = [[t.clone() for t in run()] for run in jobs]
    torch.cuda.synchronize()
    wrong: list[int] = []
    start = threading.Barrier(2)

    def loop(i: int) -> None:
        stream = torch.cuda.Stream()
        start.wait()
        with torch.cuda.stream(stream):
            for _ in range(20):
                found = jobs[i]()
                stream.synchronize()
                wrong.extend([i] * (not same(found, expected[i])))

    threads = [threading.Thread(target=loop, args=(i,)) for i in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert wrong == []


@on_a_device
def test_two_threads_recover_at_once() -> None:
    A = [dr.SRM((1, 32, 32), 0.4, seed=i).cuda() for i in range(2)]
    regs, xs = [network(seed=i) for i in range(2)], [batch(4, 1, 32, 32, seed=i) for i in range(2)]
    options = dr.PGDOptions(200, 1e-4, "anderson")

    def solve(i: int) -> torch.Tensor:
        return dr.recover(A[i].A(xs[i]), A[i], regs[i], 0.1, options=options).x

    expected = [solve(i) for i in range(2)]
    found: dict[int, torch.Tensor] = {}

    def there(i: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            found[i] = solve(i)
            torch.cuda.current_stream().synchronize()

    torch.cuda.synchronize()
    threads = [threading.Thread(target=there, args=(i,)) for i in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert same([found[0], found[1]], expected)


@on_a_device
def test_kernels_can_be_captured_in_a_graph() -> None:
    x = batch(6, 1, 50, 41)
    run = work(network(), dr.SRM((1, 50, 41), 0.3).cuda(), x)
    expected = [t.clone() for t in run()]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run()
    for t in found:
        t.fill_(torch.nan)
    graph.replay()
    torch.cuda.synchronize()
    assert same(found, expected)


@contextmanager
def no_waiting() -> Iterator[None]:
    """Inside, what makes the host wait for the device raises."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@on_a_device
def test_no_kernel_waits_for_the_device() -> None:
    run = work(network(), dr.SRM((1, 45, 33), 0.3).cuda(), batch(4, 1, 45, 33))
    first = [t.clone() for t in run()]
    with no_waiting():
        again = run()
    assert same(again, first)
    with no_waiting(), pytest.raises(RuntimeError):
        again[0].sum().item()


class Watched:
    """Counts the rounds of a loop; nobody may wait from the fourth to the eighth, before a graph is made."""

    def __init__(self) -> None:
        self.calls = 0

    def count(self) -> None:
        """One round more."""
        self.calls += 1
        torch.cuda.set_sync_debug_mode("error" if 4 <= self.calls <= 8 else "default")


@on_a_device
@pytest.mark.parametrize("acceleration", ["none", "anderson"])
def test_no_round_of_a_recovery_waits(acceleration: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reg, A, x = network(), dr.SRM((1, 32, 32), 0.4).cuda(), batch(4, 1, 32, 32)
    options = dr.PGDOptions(60, 0.0, acceleration)
    y, watch, plain = A.A(x), Watched(), dr.RED.value_and_grad
    dr.recover(y, A, reg, 0.1, options=options)

    def watched(self: dr.RED, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        watch.count()
        return plain(self, x)

    monkeypatch.setattr(dr.RED, "value_and_grad", watched)
    try:
        dr.recover(y, A, reg, 0.1, options=options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert watch.calls > 8


@on_a_device
@pytest.mark.parametrize("solve", [dr.cg, dr.minres])
def test_no_step_of_a_linear_solver_waits(solve: Callable[..., object]) -> None:
    A, b, watch = dr.SRM((1, 32, 32), 0.4).cuda(), normal(4, 1, 32, 32).float().cuda(), Watched()
    scale = torch.linspace(1.0, 50.0, 32, device="cuda")
    options = (dr.CGOptions if solve is dr.cg else dr.MinresOptions)(40, 0.0)

    def product(v: torch.Tensor) -> torch.Tensor:
        watch.count()
        return A.normal(v) + scale * v

    try:
        solve(product, b, options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert watch.calls > 8


@on_a_device
def test_running_out_of_memory_keeps_what_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    reg, A, x = network(), dr.SRM((1, 32, 32), 0.4).cuda(), batch(4, 1, 32, 32)
    y, plain, calls = A.A(x), dr.RED.value_and_grad, [0]

    def greedy(self: dr.RED, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        calls[0] += 1
        if calls[0] == 6:
            torch.empty(1 << 44, dtype=torch.uint8, device="cuda")
        return plain(self, x)

    with monkeypatch.context() as patch:
        patch.setattr(dr.RED, "value_and_grad", greedy)
        with pytest.raises(dr.errors.OutOfMemory) as caught:
            dr.recover(y, A, reg, 0.1, options=dr.PGDOptions(100, 1e-7))
    partial = caught.value.partial  # type: ignore[attr-defined]
    assert torch.isfinite(partial.x).all() and int(partial.iterations.min()) >= 1
    start = dr.recover(y, A, reg, 0.1, options=dr.PGDOptions(1, 0.0))
    assert not torch.equal(partial.x, start.x)
    assert dr.recover(y, A, reg, 0.1, options=dr.PGDOptions(200, 1e-4)).status.eq(0).all()


@on_a_device
def test_too_large_a_batch_is_one_sentence() -> None:
    free, _ = torch.cuda.mem_get_info()
    reg = network()
    x = torch.rand(1, 1, 64, 64, device="cuda").expand(free // (4 * 16 * 64 * 64), -1, -1, -1)
    with pytest.raises(dr.errors.OutOfMemory, match="MiB") as caught:
        reg.linearize(x)
    assert "\n" not in str(caught.value)
    torch.cuda.empty_cache()
    assert torch.isfinite(reg.value_and_grad(x[:2])[1]).all()


@on_a_device
def test_a_source_that_does_not_compile_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    from deepreg_fast import cuda
    from deepreg_fast.backend.gpu import nvrtc

    monkeypatch.setattr(cuda, "source", lambda name: 'extern "C" __global__ void f() {\n  int x = no_such_name;\n}\n')
    with pytest.raises(dr.errors.BackendUnavailable) as caught:
        nvrtc.CudaModule("broken.cu", (), torch.device("cuda"))
    for words in ("int x = no_such_name;", "broken.cu", "line 2", "undefined"):
        assert words in str(caught.value)


@pytest.mark.parametrize("missing", ["triton", "cupy"])
def test_a_missing_package_is_named(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "find_spec", lambda name: None if name == missing else object())
    reason = gpu.GpuBackend().unavailable()
    assert reason is not None and missing in reason and "pip install 'deepreg-fast[gpu]'" in reason
    with pytest.raises(dr.errors.BackendUnavailable, match=missing), dr.use_backend("gpu"):
        pass


def test_no_device_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(dr.errors.BackendUnavailable, match="sees no CUDA device") as caught, dr.use_backend("gpu"):
        pass
    assert "\n" not in str(caught.value)
