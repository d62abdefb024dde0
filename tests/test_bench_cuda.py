"""The benchmark of a CUDA device, as far as it can be run without one: its clock, cases, counts and sentences."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import deepreg_fast as dr
from deepreg_fast import bench
from deepreg_fast.bench import ceilings, counts, cuda_cases, peers, peers_cuda, timing
from deepreg_fast.bench import runner as running
from deepreg_fast.bench import target as targets
from deepreg_fast.bench.events import EventClock
from deepreg_fast.bench.target import CPU, Target
from deepreg_fast.cli import app
from deepreg_fast.errors import BackendUnavailable
from deepreg_fast.functional.dct import dct2

from .helpers import images, relative

needs_kernels = pytest.mark.skipif(dr.backends()["cpu"] is not None, reason="the C++ extension is not built")


class FakeCuda:
    """A device whose time is counted: a launch costs the host 5 us, and the device what it is told."""

    def __init__(self, hertz: float = 1e9) -> None:
        self.hertz, self.host, self.device = hertz, 0.0, 0.0

    def work(self, seconds: float) -> None:
        """Queue a kernel."""
        self.host += 5e-6
        self.device = max(self.device, self.host) + seconds

    def _sleep(self, cycles: int) -> None:
        self.work(cycles / self.hertz)

    def synchronize(self) -> None:
        self.host = max(self.host, self.device)

    def Event(self, enable_timing: bool) -> Any:
        """As `torch.cuda.Event`."""
        assert enable_timing
        cuda = self

        class Event:
            at = 0.0

            def record(self) -> None:
                self.at = max(cuda.device, cuda.host)

            def synchronize(self) -> None:
                cuda.synchronize()

            def elapsed_time(self, end: Any) -> float:
                return 1e3 * (end.at - self.at)

        return Event()


def test_the_clock_measures_the_device() -> None:
    cuda = FakeCuda(1.5e9)
    clock = EventClock(cuda=cuda)
    assert clock.rate == pytest.approx(1.5e9, rel=1e-6)
    assert clock.measure(lambda _: cuda.work(1e-3), 0, 20) == pytest.approx(1e-3, rel=0.01)
    # Launches of kernels shorter than a launch are what their caller waits for.
    assert clock.measure(lambda _: cuda.work(1e-7), 0, 100) == pytest.approx(5e-6, rel=0.05)
    assert clock.measure(lambda _: clock.wait(2e-3), 0, 1) == pytest.approx(2e-3, rel=0.01)
    assert clock.cold(lambda _: cuda.work(1e-3), 0) is None


def test_a_cold_call_is_measured_after_a_flush_of_other_data() -> None:
    cuda, seen = FakeCuda(), []

    class Buffer:
        def fill_(self, value: float) -> None:
            seen.append(value)
            cuda.work(7e-3)

    clock = EventClock(flush=Buffer(), cuda=cuda)  # type: ignore[arg-type]
    found = timing.cold({"ours": lambda _: cuda.work(1e-3), "peer": lambda _: cuda.work(3e-3)}, 3, clock)
    assert found["ours"] == pytest.approx(1e-3, rel=0.01) and found["peer"] == pytest.approx(3e-3, rel=0.01)
    assert sorted(seen) == [0.0, 0.0, 1.0, 1.0, 2.0, 2.0]
    assert timing.cold({"ours": lambda _: None}, 3, timing.HOST) == {}


def test_candidates_are_told_apart_on_the_device() -> None:
    cuda = FakeCuda()
    found = bench.interleave(
        {"ours": lambda _: cuda.work(1e-3), "peer": lambda _: cuda.work(2e-3)}, 7, clock=EventClock(cuda=cuda)
    )
    assert found.void is None
    assert found.ratio("peer").median == pytest.approx(2.0, rel=0.01)
    assert found.ratio(timing.PLANTED).median == pytest.approx(1.1, rel=0.02)


@pytest.mark.parametrize(("h", "w"), [(8, 8), (7, 9), (6, 5), (1, 4), (5, 1), (2, 2), (33, 20)])
def test_the_peer_of_the_dct_is_a_dct(h: int, w: int) -> None:
    x = images(2, 1, h, w)
    assert relative(peers_cuda.fft_dct2(x.float()).double(), dct2(x)) < 1e-6


def test_products_for_compilers_are_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda f: f)
    p = bench.Workload(2, 12)
    reg, x, v = p.regularizer(), p.images(1)[0], p.images(2)[0]
    expected = reg.double().linearize(x.double()).hvp(v.double())
    ways = peers_cuda.compiled_products(reg.float(), x)
    assert set(ways) == {"linearize", "vjp of grad", "jvp of grad"}
    for make in ways.values():
        assert relative(make()(v).double(), expected) < 1e-5


def test_the_fastest_way_that_works_is_taken() -> None:
    def broken() -> Any:
        raise RuntimeError("no compiler")

    took = {"slow": 2.0, "fast": 1.0}
    ways: dict[str, Any] = {n: (lambda n=n: lambda v: n) for n in took} | {"broken": broken}
    found, told = peers_cuda.fastest(ways, torch.zeros(1), lambda f: took[f(torch.zeros(1))])  # type: ignore[index]
    assert found is not None and found(torch.zeros(1)) == "fast"
    assert told.startswith("fast; of") and "broken failed (RuntimeError)" in told
    assert peers_cuda.fastest({"broken": broken}, torch.zeros(1), lambda f: 0.0)[0] is None


@needs_kernels
@pytest.mark.parametrize("name", [n for n in cuda_cases.CUDA_CASES if n not in ("cg", "recover", "step")])
def test_every_case_agrees_with_float64(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the host's tensors; what only a device can do is named as missing. The others are those of the CPU."""

    def no_compiler(*_: object) -> Any:
        raise RuntimeError("half a minute is too long for a test")

    monkeypatch.setattr(torch, "compile", no_compiler)
    for case in cuda_cases.CUDA_CASES[name](bench.Workload(2, 24)):
        assert running._judge(case, running._errors(case)) is None
        if name == "cg iteration":
            continue
        assert cuda_cases.GRAPH in case.missing and cuda_cases.GRAPH not in case.candidates
        assert case.flops > 0 and case.bytes >= case.least > 0
        if name in ("gradient", "hvp"):
            assert cuda_cases.TF32 in case.candidates


@needs_kernels
def test_float64_answers_in_parts_are_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch, "compile")
    whole, parts = (bench.Workload(3, 16, target=Target(memory=m)) for m in (0, 1))
    for name in ("gradient", "theta"):
        (a,), (b,) = (bench.CASES[name](p) for p in (whole, parts))
        assert all(relative(y, x) < 1e-12 for x, y in zip(a.exact, b.exact, strict=True))


def test_a_peer_that_cannot_run_is_named_as_missing() -> None:
    def broken(k: int) -> torch.Tensor:
        raise RuntimeError("no memory left\nat all")

    exact = [torch.ones(3, dtype=torch.float64)] * 3
    case = running.Case("c", {"ours": lambda k: torch.ones(3), "peer": broken}, exact, judge="ours")
    result = bench.measure(case, CPU, 3)
    assert result.wrong is None and case.missing == {"peer": "RuntimeError: no memory left"}
    assert {r.name for r in result.rows} == {"ours", timing.CONTROL, timing.PLANTED}
    case.candidates["ours"] = broken
    with pytest.raises(RuntimeError):
        bench.measure(case, CPU, 3)


def test_inputs_exceed_the_cache() -> None:
    small, large = (bench.Workload(b, 64, target=Target(cache=50 << 20)) for b in (256, 4096))
    assert small.inputs * 4 * small.pixels >= 2 * (50 << 20) and large.inputs == 3
    assert bench.Workload(1, 8, target=Target(cache=50 << 20)).inputs == 32
    assert bench.Workload().inputs == 3


def test_the_roofline_is_the_higher_of_two_floors() -> None:
    c = ceilings.Ceilings(50e3, 300e3, 700e3, 3000.0)
    # 50 GFLOP at 50 TFLOP/s and 3 GB at 3 TB/s take a millisecond each.
    assert c.roofline(50e9, 0.0, 2.0) == pytest.approx(0.5) and c.roofline(0.0, 3e9, 4.0) == pytest.approx(0.25)
    assert c.roofline(0.0, 0.0, 1.0) is None and c.share(0.0, 0.0, 1.0) == ""
    assert c.share(50e9, 1e9, 2.0) == "50% of the roofline (arithmetic)"
    assert c.share(1e9, 3e9, 2.0) == "50% of the roofline (bytes)"
    split = ceilings.Ceilings(50e3, 300e3, 700e3, 3000.0, precision="tf32x3")
    assert split.rate == 100e3 and "TFLOP/s" in str(split)


def test_ceilings_are_measured() -> None:
    found = ceilings.measure(torch.device("cpu"), timing.HOST, side=64, megabytes=1, rounds=2, precision="tf32")
    assert min(found.fp32, found.tf32, found.bf16, found.copy) > 0 and found.rate == found.tf32
    assert math.isfinite(found.copy)


def test_switches_come_back() -> None:
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    with pytest.raises(ZeroDivisionError), ceilings.tf32(not before[0]):
        assert torch.backends.cudnn.allow_tf32 == torch.backends.cuda.matmul.allow_tf32 != before[0]
        raise ZeroDivisionError
    assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == before


def test_counts_are_those_of_the_formulas() -> None:
    p = bench.Workload(2, 8, 4, 3)
    assert counts.sweep_flops(p) == 4 * 128 * 9 * (8 + 16)
    assert counts.image_bytes(p, 2) == 8 * 128 and counts.planes_bytes(p, 3) == 12 * 128 * 16
    assert counts.walsh_flops(p, 64) == 6 * 128 and counts.separable_flops(p) == 2 * 128 * 16
    # K = 2: the gradient writes and reads a1 and gu2; a product also reads z2 and g1.
    image, plane = 4 * 128, 4 * 128 * 16
    assert [counts.gradient(p).moved, counts.linearize(p).moved] == [41 * image + 4 * plane, 41 * image + 6 * plane]
    assert [counts.hvp(p).moved, counts.theta(p).moved] == [44 * image + 6 * plane, 10 * image + 20 * plane]
    shallow = bench.Workload(2, 8, 4, 2)
    assert counts.gradient(shallow).moved == 41 * image and counts.hvp(shallow).moved == 44 * image
    A = dr.SRM((1, 8, 8), 0.25)
    prox, normal = (counts.srm(p, A, name, 2) for name in ("prox", "normal"))
    assert prox.least == 4 * (2 * 128 + 2 * 16) and normal.least == 4 * 2 * 128
    assert prox.flops == 2 * 128 * 16


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_no_device_is_one_sentence() -> None:
    error = CliRunner().invoke(app, ["bench", "--device", "cuda"]).exception
    assert isinstance(error, BackendUnavailable) and "\n" not in str(error)
    for words in ("sees no CUDA device", "--device cpu"):
        assert words in str(error)


def test_a_device_that_is_none_is_one_sentence() -> None:
    error = CliRunner().invoke(app, ["bench", "--device", "tpu"]).exception
    assert isinstance(error, dr.errors.InputError) and "'tpu'" in str(error) and "\n" not in str(error)


@needs_kernels
def test_the_command_on_a_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the host in the device's place."""

    class Cold(timing.HostClock):
        def cold(self, f: timing.Timed, k: int) -> float | None:
            return self.measure(f, k, 1)

    class Device(Target):
        def peak(self, f: timing.Timed) -> int | None:
            return 1_500_000

        def bounds(self) -> ceilings.Ceilings:
            return ceilings.measure(torch.device("cpu"), timing.HOST, side=64, megabytes=1, rounds=1)

    monkeypatch.setitem(targets.TARGETS, "cuda", lambda: Device(clock=Cold()))
    monkeypatch.setattr(bench, "cases_of", lambda target: cuda_cases.CUDA_CASES)
    monkeypatch.setattr(running, "cases_of", lambda target: cuda_cases.CUDA_CASES)
    out = tmp_path / "out"
    arguments = ["bench", "--device", "cuda", "--cases", "linearize", "--rounds", "3", "--batch", "2", "--size", "24"]
    answer = CliRunner().invoke(app, [*arguments, "--out", str(out)])
    assert answer.exit_code == 0, answer.output
    assert "cold" in answer.output and "bfloat16" in answer.output
    (case,) = json.loads((out / "results.json").read_text())["cases"].values()
    assert case["roofline"] > 0 and case["candidates"]["ours"]["peak_bytes"] == 1_500_000
    assert case["candidates"]["ours"]["cold_milliseconds"] > 0 and case["least_bytes"] <= case["bytes"]
    assert CPU.peak(lambda k: k) is None


@pytest.mark.gpu
def test_a_device_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch, "compile")
    monkeypatch.setattr(peers, "why_no_jax", lambda device: "takes too long for a test")
    found = targets.TARGETS["cuda"]()
    results = bench.run(bench.Workload(8, 64, target=found), ["gradient", "linearize", "dct"], rounds=5)
    assert {r.case.name for r in results} == {"gradient", "linearize", *(f"dct {n}" for n in NAMES)}
    for r in results:
        assert r.wrong is None and {row.name for row in r.rows} >= {"ours", "torch, reference", cuda_cases.GRAPH}
        assert all(row.peak is not None and row.cold for row in r.rows if row.name == "ours")


NAMES = ("forward", "adjoint", "prox", "normal")


def _planes(depth: int, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How many hidden planes the launches read and write, none of which is run here."""
    pytest.importorskip("triton")
    from deepreg_fast.backend.gpu import pixel_norm as gpu_sweeps
    from deepreg_fast.kernels.conv_chain import weight_gradients

    moved = [0]

    def launch(
        self: Any, kernel: Any, rows: Any, count: int, given: dict[str, Any], constants: dict[str, Any] | None = None
    ) -> None:
        if constants is None:
            return  # the kernels at the ends, which touch images only
        first, last = constants["FIRST"], constants["LAST"]
        forth, back = constants["FORWARD"], constants["BACKWARD"]
        tangents = "v" in given
        read = {"before1" if tangents else "before"} if forth and not first else set()
        read |= {"after1" if tangents else "after"} if back and not last else set()
        read |= {"g"} if tangents and back and not last else set()
        read |= {"raw1_in"} if tangents and not forth and not first else set()
        read |= {"z"} if not first and (tangents or not forth) else set()
        written = {"a_out", "gu_out", "a1_out", "raw1_out", "gu1_out"}
        written |= set() if tangents else ({"z"} if forth else set()) | ({"g"} if back else set())
        assert all(given.get(n) is not None for n in read)
        moved[0] += len(read) + sum(given.get(n) is not None for n in written)

    def sums(planes: int, shape: tuple[int, ...]) -> Any:
        def called(*_: Any) -> torch.Tensor:
            moved[0] += planes
            return torch.zeros(shape, dtype=torch.float64)

        return called

    monkeypatch.setattr(gpu_sweeps.Sweeps, "_launch", launch)
    monkeypatch.setattr(gpu_sweeps.Sweeps, "_pack", lambda self, i: (torch.zeros(1), torch.zeros(1)))
    monkeypatch.setattr(weight_gradients, "filters", sums(4, (9, 16, 16)))
    monkeypatch.setattr(weight_gradients, "image_filters", sums(2, (9, 16)))
    reg, x = bench.Workload(2, 8, 16, depth).regularizer(), torch.zeros(2, 1, 8, 8)
    sweeps = gpu_sweeps.Sweeps(reg.kernel_form(), x)
    found = {}
    for name, f in {
        "gradient": lambda kept: sweeps.gradient(None),
        "linearize": sweeps.gradient,
        "hvp": lambda kept: sweeps.product(kept, x),
        "theta": lambda kept: sweeps.parameters(kept, x),
    }.items():
        moved[0] = 0
        monkeypatch.setattr(sweeps, "_kernels", _NoTotal(sweeps._kernels))
        f(sweeps.allocate_saved())
        found[name] = moved[0]
    return found


class _NoTotal:
    """The kernels, of which the sum over tiles does nothing."""

    def __init__(self, kernels: Any) -> None:
        self._kernels = kernels
        self.total = {(2,): lambda *_, **__: None}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._kernels, name)


@pytest.mark.parametrize("depth", [2, 3, 4, 5])
def test_counted_planes_are_those_of_the_launches(depth: int, monkeypatch: pytest.MonkeyPatch) -> None:
    p = bench.Workload(2, 8, 16, depth)
    images = {"gradient": 41, "linearize": 41, "hvp": 44, "theta": 10}
    found = _planes(depth, monkeypatch)
    for name in images:
        moved = counts.image_bytes(p, images[name]) + counts.planes_bytes(p, found[name])
        assert getattr(counts, name)(p).moved == moved, name
