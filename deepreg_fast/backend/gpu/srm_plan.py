"""The layout of a structurally random matrix for the kernels of `csrc/cuda/srm.cu`: radices, tables, tiles, launches.

Everything here is computed on the host; `srm.py` copies it to the device. See docs/kernels.md for the formulas.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ...functional import hadamard
from .srm_factors import Factor, dct_factors, hadamard_factors

FORWARD, ADJOINT, NORMAL, CORRECT = range(4)
ALL, ROWS_IN, COLUMNS, ROWS_OUT = range(4)

# A larger matrix is neither small nor fast, so torch's product is used.
_LARGEST_MATRIX = 2048
# Several blocks of the Walsh-Hadamard transform up to this size share a thread block.
_WALSH_THREADS, _WALSH_TILE = 256, 4096
# Block sizes. All except the smallest give each of a multiprocessor's four schedulers the same number of warps.
_THREADS = (64, 128, 256, 384, 512)
# Sufficient threads per multiprocessor: each has many independent loads and sums in flight.
_BUSY = 384


def _most_threads(last: int) -> int:
    """Maximum threads per multiprocessor without register spilling; it decreases with the DCT's last radix."""
    return 512 if last <= 8 else 384 if last <= 12 else 256


# Two tiles of rows fit a multiprocessor's shared memory.
_ROW_TILE_BYTES = 100 * 1024
_COLUMN_TILE = 32
_PASSES = 16


@dataclass(frozen=True)
class Launch:
    """A launch: the part of the product, blocks per image, bytes of shared memory."""

    part: int
    blocks: int
    shared: int


@dataclass(frozen=True)
class Plan:
    """Kernel, compiler options, tables and launches of one SRM."""

    kernel: str
    options: tuple[str, ...]
    threads: int
    ints: np.ndarray
    floats: np.ndarray
    launches: dict[int, tuple[Launch, ...]]

    @property
    def scratch(self) -> bool:
        """Whether a product stores intermediates in global memory."""
        return self.launches[FORWARD][0].part != ALL


@dataclass
class _Tables:
    """The ints after the header, and the floats, with offsets from their starts."""

    header: int
    ints: list[int] = field(default_factory=list)
    floats: list[np.ndarray] = field(default_factory=list)
    count: int = 0

    def add_ints(self, values: np.ndarray) -> int:
        offset = self.header + len(self.ints)
        self.ints += [int(v) for v in values]
        return offset

    def add_floats(self, values: np.ndarray) -> int:
        """Append real values, or complex ones as pairs, aligned to 16 bytes."""
        parts = [np.real(values), np.imag(values)] if np.iscomplexobj(values) else [values]
        flat = np.stack(parts, -1).astype(np.float32).ravel()
        offset = self.count
        self.floats.append(np.concatenate([flat, np.zeros(-len(flat) % 4, np.float32)]))
        self.count += len(self.floats[-1])
        return offset


@dataclass(frozen=True)
class _Side:
    """The passes over lines of n values."""

    n: int
    factors: tuple[Factor, ...]
    last: int  # 0 if not a DCT

    def units(self, pairs: int) -> list[tuple[int, int, int]]:
        """For each pass: units of work for the threads, how many of them must stay together, and the cost of one."""
        out = []
        for f in self.factors:
            if f.tile:
                of_pair = self.n // f.radix * -(-f.radix // f.tile)
                out.append((of_pair * pairs, of_pair, f.radix * f.tile))
            else:
                out.append((self.n // f.radix * pairs, 1, f.radix))
        if self.last:
            out.append(((self.n // self.last // 2 + 1) * pairs, 1, 2 * self.last))
        return out


def _side(transform: str, n: int) -> _Side:
    if transform == "dct":
        return _Side(n, *dct_factors(n))
    return _Side(n, hadamard_factors(n), 0)


def _threads(sides: tuple[_Side, _Side], pairs: tuple[int, int], room: int) -> tuple[int, int] | None:
    """The block size that leaves the fewest threads idle (the smallest of equals), and blocks per multiprocessor.

    A multiprocessor has shared memory for `room` blocks. None if a pass needs more threads than the maximum.
    """
    max_threads = min(_most_threads(s.last) for s in sides)
    units = [u for side, count in zip(sides, pairs, strict=True) for u in side.units(count)]
    min_threads = max((of_pair for _, of_pair, _ in units), default=1)
    sizes = [t for t in _THREADS if min_threads <= t <= max_threads]
    sizes = [t for t in sizes if t * room >= min(max_threads, _BUSY)] or sizes[-1:]

    def cost(size: int) -> int:
        return sum(-(-count // (size // of_pair * of_pair)) * size * each for count, of_pair, each in units)

    best = min(sizes, key=cost, default=None)
    return None if best is None else (best, max(1, min(room, max_threads // best)))


def _lines(side: _Side, tables: _Tables) -> list[int]:
    """The struct `Lines` of srm.cuh."""
    n, radices = side.n, [f.radix for f in side.factors] + [side.last] * (side.last > 0)
    place, before, inner = np.zeros(n, np.int64), 1, n
    passes: list[int] = []
    for i, radix in enumerate(radices):
        inner //= radix
        place += np.arange(n) // before % radix * inner
        if i < len(side.factors):
            passes += _pass(side, side.factors[i], inner, tables)
        before *= radix
    passes += [0] * (6 * _PASSES - len(passes))
    k = np.arange(n)
    angles = np.exp(0.5j * np.pi * k / n) * np.where(k == 0, 1.0, math.sqrt(2.0)) / (2.0 * math.sqrt(n))
    head = [n, len(side.factors), side.last]
    if side.last:
        head += [tables.add_ints(place), tables.add_ints(np.argsort(place)), tables.add_floats(angles)]
    else:
        head += [0, 0, 0]
    return head + passes


def _pass(side: _Side, f: Factor, inner: int, tables: _Tables) -> list[int]:
    """The struct `Pass` of srm.cuh."""
    r, twiddles, matrix, transposed = f.radix, 0, 0, 0
    if side.last:
        i, j = np.arange(inner)[:, None], np.arange(1, r)[None, :]
        twiddles = tables.add_floats(np.exp(-2j * np.pi * (i * j) / (inner * r)))
    if f.tile:
        if side.last:
            k = np.arange(r)
            entries = [np.exp(-2j * np.pi * (k[:, None] * k % r) / r)]
        else:
            h = hadamard.hadamard(r)
            entries = [h.T, h]
        # [input][output]
        offsets = [tables.add_floats(np.pad(e, ((0, 0), (0, -r % f.tile)))) for e in entries]
        matrix, transposed = offsets[0], offsets[-1]
    return [r, f.tile, inner, twiddles, matrix, transposed]


def _even(n: int) -> int:
    return n + n % 2


def _bytes(rows: int, columns: int) -> int:
    return _even(rows) * (_even(columns) + 1) * 4


def _tiles(height: int, width: int, limit: int) -> tuple[int, int] | None:
    """Rows and columns of the tiles of a plane that exceeds shared memory; None if even two lines do not fit."""
    rows = max(2, min(limit, _ROW_TILE_BYTES) // _bytes(2, width) * 2)
    columns = max(2, min(_COLUMN_TILE, (limit // (4 * _even(height)) - 1) // 2 * 2))
    if columns > 8:
        columns = columns // 8 * 8  # sectors of 32 bytes
    if max(_bytes(rows, width), _bytes(height, columns)) > limit:
        return None
    return min(rows, height), min(columns, width)


def _walsh(A: Any, d: int) -> Plan:
    levels = A.block.bit_length() - 1
    ints = [*A.image_shape, A.measurements, 0, 0, levels, 0]
    launches = (Launch(ALL, -(-d // _WALSH_TILE), 4 * _WALSH_TILE),)
    floats = np.array([A.block**-0.5], np.float32)
    ints = np.array(ints, np.int32)
    return Plan("srm_walsh", ("-DSRM_KERNEL=2",), _WALSH_THREADS, ints, floats, dict.fromkeys(range(4), launches))


def plan(A: Any, limit: int) -> Plan | None:
    """The plan of the SRM `A` for `limit` bytes of shared memory in a block, or None if the kernels do not cover it."""
    d = math.prod(A.image_shape)
    if d >= 2**30:
        return None
    if A.transform != "walsh":
        return _planes(A, A.image_shape, limit)
    if A.block <= _WALSH_TILE:
        return _walsh(A, d)
    # Sylvester's matrix is a Kronecker product: a block is a plane.
    height = 1 << (A.block.bit_length() - 1) // 2
    return _planes(A, (d // A.block, height, A.block // height), limit)


def _planes(A: Any, shape: tuple[int, int, int], limit: int) -> Plan | None:
    channels, height, width = shape
    sides = _side(A.transform, width), _side(A.transform, height)
    factors = [f for side in sides for f in side.factors]
    fits = _bytes(height, width) <= limit
    tiles = (height, width) if fits else _tiles(height, width, limit)
    if tiles is None or any(f.tile and f.radix > _LARGEST_MATRIX for f in factors):
        return None
    down, right = tiles
    shared = {ROWS_IN: _bytes(down, width), COLUMNS: _bytes(height, right), ROWS_OUT: _bytes(down, width)}
    block = _threads(sides, (_even(down) // 2, _even(right) // 2), max(1, limit // max(shared.values())))
    if block is None:
        return None
    tables = _Tables(8 + 2 * (6 + 6 * _PASSES))
    tables.add_floats(np.array([(height * width) ** -0.5]))
    head = [channels, height, width, A.measurements, down, right, 0, 0]
    lines = [_lines(side, tables) for side in sides]
    ints = np.array([*head, *lines[0], *lines[1], *tables.ints], np.int32)
    if fits:
        launches = dict.fromkeys(range(4), (Launch(ALL, channels, _bytes(height, width)),))
    else:
        blocks = {COLUMNS: -(-width // right)}
        stages = tuple(Launch(p, channels * blocks.get(p, -(-height // down)), shared[p]) for p in shared)
        launches = {FORWARD: stages[:2], ADJOINT: stages[1:], NORMAL: stages, CORRECT: stages}
    kernel = "srm_dct" if A.transform == "dct" else "srm_hadamard"
    return Plan(kernel, _options(kernel, sides, block), block[0], ints, np.concatenate(tables.floats), launches)


def _options(kernel: str, sides: tuple[_Side, _Side], block: tuple[int, int]) -> tuple[str, ...]:
    """The macros that restrict compilation to these radices."""
    tiles = sorted({f.tile for s in sides for f in s.factors if f.tile})
    passes = sorted({f.radix for s in sides for f in s.factors if not f.tile})
    turns = sorted({s.last for s in sides if s.last})
    return (
        f"-DSRM_KERNEL={int(kernel == 'srm_hadamard')}",
        f"-DSRM_THREADS={block[0]}",
        f"-DSRM_BLOCKS={block[1]}",
        "-DSRM_DENSE=" + " ".join(f"DR_DENSE({t})" for t in tiles),
        "-DSRM_PASSES=" + " ".join(f"DR_PASS({r})" for r in passes),
        "-DSRM_TURNS=" + " ".join(f"DR_TURN({r})" for r in turns),
    )
