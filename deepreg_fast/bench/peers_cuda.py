"""Peers for benchmarks on a GPU: cuFFT, fast_hadamard_transform, compiled products, replayed graphs."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any, cast

import torch

from ..regularizers import RED
from .peers import BestTorch, Images
from .timing import Timed


@lru_cache(maxsize=16)
def _fft_tables(h: int, w: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    def places(n: int) -> torch.Tensor:
        new = {"dtype": torch.int64, "device": "cpu"}
        return torch.cat([torch.arange(0, n, 2, **new), torch.arange(1, n, 2, **new).flip(0)])

    def turn(n: int, count: int) -> torch.Tensor:
        k = torch.arange(count, dtype=torch.float64, device="cpu")
        scale = torch.full((count,), math.sqrt(2.0 / n), dtype=torch.float64, device="cpu")
        scale[0] = math.sqrt(1.0 / n)
        return torch.polar(scale, -math.pi * k / (2 * n))

    rows, columns = turn(h, h)[:, None], turn(w, w // 2 + 1)[None, :]
    # The mirrored columns 1, ..., (w - 1) / 2 have the same scale, because only column 0 differs.
    both, against = 0.5 * rows * columns, 0.5 * rows.conj() * columns
    flipped = (-torch.arange(h, dtype=torch.int64, device="cpu")) % h
    tables = (
        places(h)[:, None],
        places(w)[None, :],
        flipped,
        both.to(torch.complex64),
        against.to(torch.complex64),
    )
    return tuple(t.to(device) for t in tables)


def fft_dct2(x: Images) -> Images:
    """The orthonormal 2-D DCT-II by one real FFT of the reordered image (Makhoul 1980); cuFFT computes it on a GPU.

    With `V = rfft2(v)`, `P = W1 W2 V[k1, k2]`, `Q = W1* W2 V[-k1, k2]`: `y[k1, k2] = Re(P + Q)/2` and
    `y[k1, N - k2] = -Im(P + Q)/2`.
    """
    h, w = x.shape[-2:]
    rows, columns, flipped, both, against = _fft_tables(h, w, x.device)
    spectrum = torch.fft.rfft2(x[..., rows, columns])
    z = both * spectrum + against * spectrum[..., flipped, :]
    return torch.cat([z.real, -z.imag[..., 1 : (w + 1) // 2].flip(-1)], -1)


def fast_walsh(x: Images, block: int) -> Images:
    """The blockwise Walsh-Hadamard transform by fast_hadamard_transform (github.com/Dao-AILab)."""
    f = cast(Any, importlib.import_module("fast_hadamard_transform")).hadamard_transform
    return f(x.reshape(-1, block), block**-0.5).reshape(x.shape)


def why_no_fast_walsh(block: int) -> str | None:
    """None if fast_hadamard_transform is installed and supports that block size, otherwise the reason."""
    if importlib.util.find_spec("fast_hadamard_transform") is None:
        return "pip install fast-hadamard-transform, which builds CUDA sources"
    return None if block <= 32768 else f"its blocks end at 32768, and {block} is required"


def compiled_products(reg: RED, x: Images) -> dict[str, Callable[[], Callable[[Images], Images]]]:
    """Ways to compile Hessian-vector products at x with torch.compile. Nothing is compiled before the first call."""
    # Constant parameters, so that no graph is stored for them.
    frozen = BestTorch(copy.deepcopy(reg).requires_grad_(False))
    grad = torch.func.grad(lambda x: frozen.energy(x).sum())

    def linearized() -> Callable[[Images], Images]:
        # The part that depends on x is computed here once; the compiled function is linear in v.
        return torch.compile(cast(Any, torch.func.linearize(grad, x))[1])

    def pulled_back() -> Callable[[Images], Images]:
        product = torch.compile(lambda x, v: cast(Any, torch.func.vjp(grad, x))[1](v)[0])
        return lambda v: product(x, v)

    def pushed() -> Callable[[Images], Images]:
        product = torch.compile(lambda x, v: cast(Any, torch.func.jvp(grad, (x,), (v,)))[1])
        return lambda v: product(x, v)

    return {"linearize": linearized, "vjp of grad": pulled_back, "jvp of grad": pushed}


def fastest(
    ways: dict[str, Callable[[], Callable[[Images], Images]]],
    v: Images,
    seconds: Callable[[Callable[[Images], Images]], float],
) -> tuple[Callable[[Images], Images] | None, str]:
    """The way with the fastest product of v, as measured by `seconds`, with a note on all; None if none works."""
    timed: dict[str, tuple[float, Callable[[Images], Images]]] = {}
    notes = []
    for name, make in ways.items():
        try:
            product = make()
            product(v)
            timed[name] = (seconds(product), product)
            notes.append(f"{name} {1e3 * timed[name][0]:.3g} ms")
        except Exception as error:  # a failing compiler is reported, not raised
            notes.append(f"{name} failed ({type(error).__name__})")
    if not timed:
        return None, ", ".join(notes)
    best = min(timed, key=lambda n: timed[n][0])
    return timed[best][1], f"{best}; of {', '.join(notes)}"


def replayed(f: Timed, inputs: int) -> Timed:
    """`f(0)`, ..., `f(inputs - 1)` as CUDA graphs, each replayed with one launch. CUDA devices only."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            f(0)
    torch.cuda.current_stream().wait_stream(side)
    graphs: list[tuple[torch.cuda.CUDAGraph, object]] = []
    for k in range(inputs):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=graphs[0][0].pool() if graphs else None):
            out = f(k)
        graphs.append((graph, out))

    def replay(k: int) -> object:
        graph, out = graphs[k % inputs]
        graph.replay()
        return out

    return replay
