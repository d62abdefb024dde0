"""The SRM's CUDA kernels without a GPU: their bodies run on the host against float64, NVRTC compiles them."""

from __future__ import annotations

import copy
import re
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import deepreg_fast as dr
from deepreg_fast import backend
from deepreg_fast.backend.gpu import nvrtc, srm
from deepreg_fast.backend.gpu.srm_factors import dct_factors, hadamard_factors
from deepreg_fast.backend.gpu.srm_plan import FORWARD, plan
from deepreg_fast.functional import hadamard

from .helpers import normal, relative
from .host_cuda import COMPILER, HostLauncher, library
from .test_operators import srms

LIMIT = 232448  # of an H100's block
EPS = 2.0**-23

host = pytest.mark.skipif(COMPILER is None, reason="no g++ on this machine")


def kernels(A: dr.SRM, limit: int = LIMIT, order: int = 0) -> srm.GpuSrm:
    made = srm.build(A, limit, lambda _: HostLauncher("srm.cu", order))
    assert made is not None
    return made


def data(A: dr.SRM, count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x, y = normal(count, *A.image_shape, seed=seed).float(), normal(count, A.measurements, seed=seed + 1).float()
    return x, y, torch.rand(count, generator=torch.Generator().manual_seed(seed))


def products(k: backend.SrmKernels, x: torch.Tensor, y: torch.Tensor, w: torch.Tensor | float) -> list[torch.Tensor]:
    return [k.forward(x), k.adjoint(y), k.normal(x), k.correct(x, y, w)]


@pytest.fixture(scope="module", autouse=True)
def _compiled() -> None:
    """Before any test, so that a source that does not compile is told once."""
    if COMPILER is not None:
        library("srm.cu")


class Definition:
    """Torch's own products."""

    def __init__(self, A: dr.SRM) -> None:
        self.A = A

    def _run(self, name: str, *arguments: object) -> torch.Tensor:
        with dr.use_backend("reference"):
            return getattr(self.A, name)(*arguments)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._run("_forward", x)

    def adjoint(self, y: torch.Tensor) -> torch.Tensor:
        return self._run("_adjoint", y)

    def normal(self, x: torch.Tensor) -> torch.Tensor:
        return self._run("_normal", x)

    def correct(self, x: torch.Tensor, y: torch.Tensor, weight: float | torch.Tensor) -> torch.Tensor:
        w = weight.view(-1, 1, 1, 1) if isinstance(weight, torch.Tensor) else weight
        return self._run("_correct", x, y, w)


def compare(A: dr.SRM, k: srm.GpuSrm, count: int = 2, seed: int = 0, device: str = "cpu") -> None:
    x, y, w = data(A, count, seed)
    exact = products(Definition(copy.deepcopy(A).double()), x.double(), y.double(), w.double())
    x, y, w = x.to(device), y.to(device), w.to(device)
    theirs, ours = products(Definition(copy.deepcopy(A).to(device)), x, y, w), products(k, x, y, w)
    # Of random x, m coefficients have this size; what rounds is as large as x even where those few happen to be small.
    share = (A.measurements / np.prod(A.image_shape)) ** 0.5 * float(x.norm())
    sizes = (share, float(y.norm()), share, float(x.norm()))
    for i, wanted in enumerate(exact):
        # Each of the stages rounds what it stores and what it reads by EPS / 2, whatever torch's luck.
        floor = (2 if i < 2 else 4) * EPS * max(sizes[i], float(wanted.norm()))
        error, torchs = (float((t[i].double().cpu() - wanted).norm()) for t in (ours, theirs))
        assert error <= max(2.0 * torchs, floor), (i, error, torchs, floor)


def enough(A: dr.SRM) -> int:
    """Images for a hundred measurements and more: the error of a few numbers is luck."""
    return max(2, -(-100 // A.measurements))


@host
@settings(max_examples=60)
@given(srms(), st.integers(0, 1000), st.integers(0, 2))
def test_against_float64(A: dr.SRM, seed: int, order: int) -> None:
    compare(A, kernels(A, order=order), enough(A), seed)


@host
@settings(max_examples=25)
@given(st.integers(1, 200), st.integers(1, 60), st.booleans(), st.integers(0, 2**32))
def test_dct_of_any_size(height: int, width: int, turned: bool, seed: int) -> None:
    shape = (1, width, height) if turned else (1, height, width)
    A = dr.SRM(shape, 0.3, seed=seed)
    compare(A, kernels(A), enough(A))


@host
@pytest.mark.parametrize("transform", ["dct", "hadamard", "walsh"])
@pytest.mark.parametrize("randomizer", ["sign", "both"])
def test_the_headline_size(transform: str, randomizer: str) -> None:
    A = dr.SRM((1, 180, 180), 0.2, transform=transform, randomizer=randomizer)
    k = kernels(A)
    compare(A, k)
    launcher = k._launcher
    assert isinstance(launcher, HostLauncher)
    assert launcher.launches == 4, "each product must be one launch"


@host
@pytest.mark.parametrize("n", [2, 12, 20, 24, 28, 40, 52, 64, 80, 96, 128])
def test_hadamard_of_every_construction(n: int) -> None:
    A = dr.SRM((1, n, 4), 0.5, transform="hadamard", keep_dc=True)
    compare(A, kernels(A))
    compare(A := dr.SRM((1, 2, n), 1.0, transform="hadamard"), kernels(A))


@host
@pytest.mark.parametrize("block", [1, 2, 4, 8, 16, 32, 64, 256, 512, 2048, 4096, 8192, 16384])
def test_walsh_blocks(block: int) -> None:
    A = dr.SRM((1, 128, 128), 0.3, transform="walsh", block=block, randomizer="both")
    compare(A, kernels(A))


@host
@settings(max_examples=25)
@given(srms(), st.integers(0, 2), st.integers(1, 6))
def test_large_images_go_through_global_memory(A: dr.SRM, order: int, more: int) -> None:
    channels, height, width = A.image_shape
    even = [n + n % 2 for n in (height, width)]
    limit = 4 * max(2 * (even[1] + 1), 3 * even[0]) * more  # two lines and up
    how = plan(A, limit)
    assert how is not None
    compare(A, kernels(A, limit, order), enough(A))
    if how.scratch:
        assert max(launch.shared for launches in how.launches.values() for launch in launches) <= limit
    if A.transform == "hadamard":  # no pair of lines mixes: tiles change no bit
        x, y, w = data(A, 2)
        for whole, tiled in zip(products(kernels(A), x, y, w), products(kernels(A, limit), x, y, w), strict=True):
            assert torch.equal(whole, tiled)


@host
@pytest.mark.parametrize("transform", ["dct", "hadamard", "walsh"])
@pytest.mark.parametrize("limit", [LIMIT, 40_000])
def test_the_headline_size_in_tiles(transform: str, limit: int) -> None:
    A = dr.SRM((1, 180, 180) if transform != "walsh" else (1, 128, 256), 0.2, transform=transform)
    how = plan(A, limit)
    assert how is not None
    assert len(how.launches[FORWARD]) == (1 if limit == LIMIT else 2)
    compare(A, kernels(A, limit))


CASES = [
    (dr.SRM((2, 20, 36), 0.3, transform="dct", randomizer="both"), LIMIT),
    (dr.SRM((1, 37, 15), 0.3, transform="dct"), LIMIT),
    (dr.SRM((1, 48, 30), 0.3, transform="dct"), 3000),
    (dr.SRM((2, 20, 36), 0.3, transform="hadamard"), LIMIT),
    (dr.SRM((1, 32, 40), 0.3, transform="hadamard", randomizer="permutation"), 3000),
    (dr.SRM((1, 64, 48), 0.3, transform="walsh", randomizer="both"), LIMIT),
    (dr.SRM((1, 128, 64), 0.3, transform="walsh"), 9000),
]


@host
@pytest.mark.parametrize(("A", "limit"), CASES)
def test_neither_threads_nor_neighbours_change_the_bits(A: dr.SRM, limit: int) -> None:
    x, y, w = data(A, 3)
    one = products(kernels(A, limit), x, y, w)
    for order in (1, 2):
        for wanted, came in zip(one, products(kernels(A, limit, order), x, y, w), strict=True):
            assert torch.equal(came, wanted), "two threads race"
    poisoned, nan_y = x.clone(), y.clone()
    poisoned[1, 0, 2, 2], nan_y[1, 0] = torch.nan, torch.nan
    for i, (wanted, came) in enumerate(zip(one, products(kernels(A, limit), poisoned, nan_y, w), strict=True)):
        assert torch.equal(came[[0, 2]], wanted[[0, 2]])
        assert bool(torch.isnan(came[1]).any()), i
    for b in range(3):
        alone = products(kernels(A, limit), x[b : b + 1], y[b : b + 1], w[b : b + 1])
        assert all(torch.equal(a[0], wanted[b]) for a, wanted in zip(alone, one, strict=True))
    assert kernels(A).forward(x[:0]).shape == (0, A.measurements)


class Marked(HostLauncher):
    """Fills what a kernel writes to with 7 before its first launch."""

    out: torch.Tensor

    def launch(self, kernel: str, blocks: int, threads: int, shared: int, arguments: Sequence[np.generic]) -> None:
        if self.launches == 0:
            self.out.fill_(7.0)
        super().launch(kernel, blocks, threads, shared, arguments)


@host
@pytest.mark.parametrize(("A", "limit"), CASES)
def test_images_that_have_ended_are_left_alone(A: dr.SRM, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y, w = data(A, 3)
    whole = products(kernels(A, limit), x, y, w)
    rows = torch.tensor([True, False, True])
    launcher = Marked("srm.cu")
    k = srm.build(A, limit, lambda _: launcher)
    assert k is not None
    made = torch.Tensor.new_empty

    def new_empty(self: torch.Tensor, *size: object) -> torch.Tensor:
        launcher.out, launcher.launches = made(self, *size), 0  # type: ignore[call-overload]
        return launcher.out.fill_(7.0)

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    with backend.active_images(rows):
        for wanted, came in zip(whole, products(k, x, y, w), strict=True):
            assert torch.equal(came[rows], wanted[rows])
            assert bool((came[1] == 7.0).all())


@host
@pytest.mark.parametrize(("A", "limit"), CASES)
def test_adjoint_and_orthonormal_rows(A: dr.SRM, limit: int) -> None:
    x, y, _ = data(A, 2)
    k = kernels(A, limit)
    left = (k.forward(x).double() * y.double()).sum()
    right = (x.double() * k.adjoint(y).double()).sum()
    # Each side is off by at most the error of its product, which compare() bounds, times the other vector's length.
    assert abs(left - right) <= 8 * EPS * x.double().norm() * y.double().norm()
    exact = Definition(A)
    theirs = relative(exact.forward(exact.adjoint(y)).double(), y.double())
    assert relative(k.forward(k.adjoint(y)).double(), y.double()) <= max(2.0 * theirs, 4 * EPS)


@host
def test_arguments_of_any_layout() -> None:
    A = dr.SRM((1, 12, 20))
    x, y, _ = data(A, 3)
    k = kernels(A)
    wanted = k.forward(x)
    assert torch.equal(k.forward(x.transpose(2, 3).contiguous().transpose(2, 3)), wanted)
    assert torch.equal(k.forward(torch.cat([x.flatten().new_zeros(1), x.flatten()])[1:].view_as(x)), wanted)
    numbers = k.correct(x, y, torch.full((3,), 0.25))
    assert torch.equal(k.correct(x, y, 0.25), numbers)
    assert torch.equal(k.correct(x, y, torch.tensor(0.25, dtype=torch.float64).expand(3)), numbers)


@host
def test_another_state_makes_other_tables() -> None:
    A, B = dr.SRM((1, 12, 10), seed=7), dr.SRM((1, 12, 10), seed=8)
    x, y, _ = data(A, 2)
    first = srm.kept(B, lambda: kernels(B))
    assert first is not None and srm.kept(B, lambda: kernels(B)) is first
    assert not torch.equal(first.forward(x), kernels(A).forward(x))
    B.load_state_dict(A.state_dict())
    second = srm.kept(B, lambda: kernels(B))
    assert second is not None and torch.equal(second.forward(x), kernels(A).forward(x))
    assert srm.find(A, x) is None, "no GPU tensor"


def test_what_the_kernels_do_not_reach() -> None:
    assert plan(dr.SRM((1, 2, 3001), measurements=1), LIMIT) is None, "a matrix of 3001 x 3001"
    assert plan(dr.SRM((1, 2, 40_000), measurements=1), LIMIT) is None, "two lines are 320 KB"
    assert plan(dr.SRM((1, 4, 4000), measurements=1), LIMIT) is not None


@given(st.integers(1, 5000))
def test_factors_multiply_to_the_length(n: int) -> None:
    passes, last = dct_factors(n)
    assert int(np.prod([f.radix for f in passes])) * last == n
    if hadamard.exists(n := 4 * (n % 100) or 4):
        assert int(np.prod([f.radix for f in hadamard_factors(n)])) == n


# The radices of the DCT of 180, 64, 97 and the other two transforms: each kind of pass.
COMPILED = [
    ("sm_90", dr.SRM((1, 180, 180), 0.2)),
    *(
        (architecture, A)
        for architecture in ("sm_80", "sm_90", "sm_100")
        for A in (
            dr.SRM((1, 24, 97), 0.2),
            dr.SRM((1, 180, 180), 0.2, transform="hadamard"),
            dr.SRM((1, 128, 128), 0.2, transform="hadamard"),
            dr.SRM((1, 180, 180), 0.2, transform="walsh"),
        )
    ),
]


@pytest.mark.parametrize(("architecture", "A"), COMPILED)
def test_nvrtc_compiles_without_warnings_or_spills(architecture: str, A: dr.SRM, tmp_path: Path) -> None:
    pytest.importorskip("cupy", reason="CuPy, which binds NVRTC, is not installed")
    how = plan(A, LIMIT)
    assert how is not None
    cubin, log = nvrtc.compile_sources(nvrtc.sources("srm.cu"), how.options, architecture)
    # NVRTC 13.0 cannot make errors of warnings.
    assert "warning" not in log, log
    usage = resources(cubin, tmp_path)
    assert set(usage) == {how.kernel}
    registers, stack = usage[how.kernel]
    assert stack == 0, "registers spill"
    # A scheduler has 16384 registers for its quarter of the warps.
    assert -(-registers // 8) * 8 * -(-how.threads // 128) * 32 <= 16384


def resources(cubin: bytes, folder: Path) -> dict[str, tuple[int, int]]:
    """Registers and bytes of stack of each kernel."""
    triton = pytest.importorskip("triton", reason="cuobjdump comes with Triton")
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    (folder / "a.cubin").write_bytes(cubin)
    command = [str(tool), "--dump-resource-usage", str(folder / "a.cubin")]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.findall(r"Function (\w+):\s+REG:(\d+) STACK:(\d+)", told)
    assert found, told
    return {name: (int(registers), int(stack)) for name, registers, stack in found}


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on this machine")
def test_nvcc_compiles_with_warnings_as_errors(tmp_path: Path) -> None:
    how = plan(dr.SRM((1, 24, 32), 0.2), LIMIT)
    assert how is not None
    for name, text in nvrtc.sources("srm.cu").items():
        (tmp_path / name).write_text(text)
    command = ["nvcc", "-std=c++17", "-arch=sm_90", "-cubin", "-Werror", "all-warnings", *how.options, "srm.cu"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def on_gpu(A: dr.SRM, limit: int | None = None) -> srm.GpuSrm:
    device = torch.device("cuda", torch.cuda.current_device())
    limit = nvrtc.shared_limit(device) if limit is None else limit
    k = srm.build(A, limit, lambda options: nvrtc.module("srm.cu", options, device))
    assert k is not None
    return k


@pytest.mark.gpu
@pytest.mark.parametrize(("A", "limit"), [*CASES, *((A, None) for _, A in COMPILED if A.image_shape[2] >= 97)])
def test_on_the_gpu(A: dr.SRM, limit: int | None) -> None:
    A = copy.deepcopy(A).cuda()
    k = on_gpu(A, limit)
    compare(copy.deepcopy(A).cpu(), k, 3, device="cuda")
    x, y, w = (t.cuda() for t in data(A, 3))
    ours = products(k, x, y, w)
    for b in range(3):
        alone = products(k, x[b : b + 1], y[b : b + 1], w[b : b + 1])
        assert all(torch.equal(a[0], wanted[b]) for a, wanted in zip(alone, ours, strict=True))
    rows = torch.tensor([True, False, True], device="cuda")
    with backend.active_images(rows):
        some = products(k, x, y, w)
    assert all(torch.equal(a[rows], wanted[rows]) for a, wanted in zip(some, ours, strict=True))


@pytest.mark.gpu
def test_streams_threads_and_graphs() -> None:
    A = dr.SRM((1, 180, 180), 0.2).cuda()
    x, y, w = (t.cuda() for t in data(A, 8))
    k = srm.find(A, x)
    assert k is not None and srm.find(A, x) is k and srm.find(A, x.double()) is None
    wanted = products(k, x, y, w)
    torch.cuda.synchronize()

    def elsewhere(_: int) -> list[torch.Tensor]:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            out = [products(k, x, y, w) for _ in range(5)][-1]
        stream.synchronize()
        return out

    with ThreadPoolExecutor(2) as pool:
        for out in pool.map(elsewhere, range(4)):
            assert all(torch.equal(a, b) for a, b in zip(out, wanted, strict=True))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = products(k, x, y, w)
    for t in captured:
        t.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(captured, wanted, strict=True))
