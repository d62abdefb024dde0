"""The sweeps of the conv chain on a GPU, without a LayerNorm or with one over the channels of a pixel: the launches of
`kernels/conv_chain/pixel_norm.py` in their order, and what is kept between them (docs/kernels.md).

Tensors may be on any device: Triton's interpreter takes those of the CPU. Nothing here asks the device anything, so
that all of it can be captured in a CUDA graph. Hidden layers are 1..K, the last convolution is K + 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor, nn

from ... import checks
from ...functional.conv_chain import HEADS, ChannelNorm, ConvChainForm
from ..active import active_mask
from .memory import memory_guard
from .packed import packed

Planes = dict[int, Tensor]
"""`[B, H, W, CP]` by the layer's number."""


@dataclass(frozen=True)
class ChainOptions:
    """How the sweeps run.

    `precision` of the convolutions: `"tf32x3"`, as exact as float32 on tensor cores; `"ieee"`, float32 without them;
    `"tf32"`, three digits: tight solves stagnate, and a LayerNorm's filters are no longer centred.
    `storage` of the planes between kernels: `"float32"`, or `"bfloat16"`, half the bytes and three digits: solves
    stagnate where they do with tf32 (docs/kernels.md).
    `plane_bytes`: the batch is worked on in parts, so that a plane of all channels takes at most this (one image at
    least); small ones stay in the L2 cache. No bit of an image depends on it. `tile`: height, width and warps of a
    program; None takes those of the kernels. `maxnreg`: the most registers of a thread of `primal` and of `tangent`,
    each a number or None, which leaves it to the compiler; without a pair those of the kernels, and with a `tile` the
    compiler's.
    """

    precision: str = "tf32x3"
    plane_bytes: int = 512 << 20
    tile: tuple[int, int, int] | None = None
    storage: str = "float32"
    maxnreg: tuple[int | None, int | None] | None = None

    def __post_init__(self) -> None:
        checks.choice(self.precision, "precision", ("tf32x3", "ieee", "tf32"))
        checks.choice(self.storage, "storage", ("float32", "bfloat16"))
        checks.integer(self.plane_bytes, "plane_bytes", 1)
        for limit in self.maxnreg or ():
            if limit is not None:
                checks.integer(limit, "maxnreg", 16)


DEFAULT = ChainOptions()


def convs_of(form: ConvChainForm) -> list[nn.Conv2d]:
    """The convolutions."""
    return cast("list[nn.Conv2d]", list(form.net.convs))


def norms_of(form: ConvChainForm) -> list[ChannelNorm]:
    """The LayerNorms, if there are any."""
    return cast("list[ChannelNorm]", list(form.net.norms)) if form.net.norm != "none" else []


@dataclass(frozen=True)
class SavedActivations:
    """What the products need of the gradient's sweep: `z[l]`, l = 2..K, `g[l]`, l = 1..K - 1, and the image c
    `[B, H, W]`, which is u for the head red (there the kernels take its half)."""

    z: Planes
    g: Planes
    c: Tensor

    def each(self, f: Callable[[Tensor], Tensor]) -> SavedActivations:
        """With `f` of each tensor in its place."""
        z, g = ({layer: f(t) for layer, t in planes.items()} for planes in (self.z, self.g))
        return SavedActivations(z, g, f(self.c))

    def of(self, part: slice) -> SavedActivations:
        """The same for a part of the batch."""
        return self.each(lambda t: t[part])


@dataclass(frozen=True)
class _Chunk:
    """Some images of a batch, and memory for what lives during their sweep.

    `pair`: the planes of neighbouring layers, that of layer l being `pair[l % 2]`; `own`: planes of one layer each.
    """

    where: slice
    rows: Tensor | None
    u: Tensor
    kept: SavedActivations
    pair: list[Tensor]
    own: list[Tensor]
    h_taps: Tensor
    g_taps: Tensor
    image: Tensor


class Sweeps:
    """A network with its parameters packed, a batch of images x, and the sweeps over it."""

    def __init__(self, form: ConvChainForm, x: Tensor, options: ChainOptions = DEFAULT) -> None:
        from ...kernels.conv_chain import pixel_norm as conv_chain  # pyright: ignore[reportMissingImports]
        from ...kernels.conv_chain import tiles  # pyright: ignore[reportMissingImports]

        self._kernels, self._form, self._options = conv_chain, form, options
        self._storage: torch.dtype = getattr(torch, options.storage)
        self._shape = x.shape
        self._count, _, self._height, self._width = x.shape
        self._K = len(form.net.convs) - 1
        self._C = convs_of(form)[0].out_channels
        self._CP = tiles.padded(self._C)
        self._red = form.head == "red"
        # With the head red the last hidden layer goes both ways at once.
        self._way_out = range(1, self._K + (not self._red))
        self._norm = form.net.norm == "pixel"
        self._alpha = float(form.alpha)
        self._eps = float(norms_of(form)[0].eps) if self._norm else 0.0
        self._u = (x.detach() - form.center).contiguous().view(self._count, self._height, self._width)
        th, tw, self._warps = options.tile or conv_chain.TILES[self._CP]
        self._tile = {"TH": th, "TW": tw, "HEAD": HEADS.index(form.head)}
        self._tiles = -(-self._height // th) * -(-self._width // tw)
        pairs = packed(form.net, *self._to_pack(), self._u.device, lambda: [self._pack(i) for i in range(self._K + 1)])
        self._filters, self._vectors = [p[0] for p in pairs], [p[1] for p in pairs]
        self._layers: dict[tuple[Any, int, str, bool], dict[str, Any]] = {}

    def moved(self, put: Callable[[Tensor], Tensor]) -> Sweeps:
        """The same sweeps, which read `put(t)` in the place of each of their tensors t."""
        there = copy(self)
        there._u = put(self._u)
        there._filters, there._vectors = [put(t) for t in self._filters], [put(t) for t in self._vectors]
        there._layers = {}
        return there

    # What is kept, and what is used meanwhile.

    def allocate_saved(self) -> SavedActivations:
        """Uninitialized, for the whole batch."""
        needed = self._bytes(self._count, 2 * (self._K - 1), not self._red)
        with memory_guard(needed, self._u.device, f"Linearizing at {self._count} images"):
            return SavedActivations(
                {layer: self._plane(self._count) for layer in range(2, self._K + 1)},
                {layer: self._plane(self._count) for layer in range(1, self._K)},
                self._u if self._red else torch.empty_like(self._u),
            )

    def _parts(self, own: int, kept: SavedActivations | None) -> Iterator[_Chunk]:
        """The parts of the batch, with memory that they share, `own` planes of it."""
        most, rows = self._most(), active_mask(self._u)
        with memory_guard(self._bytes(most, 2 + own, 19), self._u.device, f"A sweep over {most} images at a time"):
            planes = [self._plane(most) for _ in range(2 + own)]
            taps = [self._u.new_empty(most, 9, self._height, self._width) for _ in range(2)]
            image = self._u.new_empty(most, self._height, self._width)
        for i in range(0, self._count, most):
            part = slice(i, min(i + most, self._count))
            u, n = self._u[part], part.stop - part.start
            few = [p[:n] for p in planes]
            here = SavedActivations({}, {}, u if self._red else image[:n]) if kept is None else kept.of(part)
            work = None if rows is None else rows[part]
            yield _Chunk(part, work, u, here, few[:2], few[2:], taps[0][:n], taps[1][:n], image[:n])

    def _most(self) -> int:
        """Images of a part: if there are several, a multiple of 4, so that every part of an image plane begins at a
        multiple of 16 bytes, where it can be read in pieces of 16."""
        most = max(1, min(self._count, self._options.plane_bytes // max(1, self._bytes(1, 1, 0))))
        return most if most == self._count or most < 4 else most // 4 * 4

    def _bytes(self, images: int, planes: int, floats: int) -> int:
        return images * self._height * self._width * (self._storage.itemsize * self._CP * planes + 4 * floats)

    def _plane(self, images: int) -> Tensor:
        return self._u.new_empty(images, self._height, self._width, self._CP, dtype=self._storage)

    # Launches.

    def _to_pack(self) -> tuple[list[Tensor], tuple[Any, ...]]:
        """What the packed filters and vectors are made of: tensors, and all else."""
        modules = (*convs_of(self._form), *norms_of(self._form))
        parameters = [cast(Tensor, p) for m in modules for p in (m.weight, m.bias)]
        return parameters, (float(self._form.net.gain), self._form.net.norm)

    def _pack(self, i: int) -> tuple[Tensor, Tensor]:
        """Filters and vectors of convolution i = 0..K."""
        conv, norms, hidden = convs_of(self._form)[i], norms_of(self._form), i < self._K
        after = (norms[i].weight, norms[i].bias) if norms and hidden else (None, None)
        filters = self._u.new_empty((9, self._CP, self._CP) if 0 < i < self._K else (16, self._CP))
        vectors = self._u.new_empty(3, self._CP)
        given = [None if p is None else p.detach().contiguous() for p in (conv.weight, conv.bias, *after)]
        self._kernels.pack[16,](
            *given, filters, vectors, float(self._form.net.gain), C=self._C, CP=self._CP, FIRST=i == 0,
            LAST=i == self._K, CENTRED=self._norm and hidden,
        )  # fmt: skip
        return filters, vectors

    def _launch(
        self, kernel: Any, rows: Tensor | None, count: int, given: dict[str, Any], fixed: dict[str, Any] | None = None
    ) -> None:
        """One program for each tile of `count` images; arguments that are not given are None.

        `fixed`: what this object's launches of a kind share (`_fixed`).
        """
        fixed = self._fixed(kernel) if fixed is None else fixed
        # Bytes are read alike on every device.
        rows = None if rows is None else rows.contiguous().view(torch.uint8)
        kernel[count * self._tiles,](**{**fixed, **given, "rows": rows})

    def _fixed(self, kernel: Any, maxnreg: int | None = None, **constants: Any) -> dict[str, Any]:
        """The arguments and options of a kernel that do not change from launch to launch."""
        size = {"height": self._height, "width": self._width, "alpha": self._alpha, "eps": self._eps}
        options = {"num_warps": self._warps, "num_stages": 1, "enable_fp_fusion": True, "maxnreg": maxnreg}
        names = _absent(kernel)
        return {**names, **{n: v for n, v in size.items() if n in names}, **constants, **self._tile, **options}

    def _layer(self, kernel: Any, layer: int, ways: str, part: _Chunk, given: dict[str, Any]) -> None:
        """`primal` or `tangent` of hidden layer `layer`, forward ("f"), back ("b") or both."""
        key = kernel, layer, ways, "sums" in given
        if (fixed := self._layers.get(key)) is None:
            fixed = self._layers[key] = self._fixed_layer(*key)
        self._launch(kernel, part.rows, len(part.u), {"u": part.u, "c": part.kept.c, **given}, fixed)

    def _fixed_layer(self, kernel: Any, layer: int, ways: str, sums: bool) -> dict[str, Any]:
        """`_fixed` of a hidden layer: its filters, its place in the network, and the limit on registers."""
        if self._options.maxnreg is not None:
            limit = self._options.maxnreg[kernel is self._kernels.tangent]
        elif self._options.tile is None:
            limit = self._kernels.maxnreg(self._CP, sums)
        else:
            limit = None
        parameters = {
            "w": self._filters[layer - 1], "w_after": self._filters[layer], "vectors": self._vectors[layer - 1],
            "last": self._vectors[-1],
        }  # fmt: skip
        constants = {
            "C": self._C, "CP": self._CP, "FIRST": layer == 1, "LAST": layer == self._K, "FORWARD": "f" in ways,
            "BACKWARD": "b" in ways, "NORM": self._norm, "PRECISION": self._options.precision,
        }  # fmt: skip
        names = _absent(kernel)
        return self._fixed(kernel, limit, **{n: p for n, p in parameters.items() if n in names}, **constants)

    def _backward_layers(self) -> Iterator[tuple[int, str]]:
        for layer in range(self._K, 0, -1):
            yield layer, "fb" if self._red and layer == self._K else "b"

    # The gradient.

    def gradient(self, kept: SavedActivations | None = None) -> tuple[Tensor, Tensor]:
        """`r` `[B]` and its gradient; what the products need goes into `kept`."""
        value, grad = self._u.new_empty(self._count), torch.empty_like(self._u)
        partial = self._u.new_empty(self._count, self._tiles, dtype=torch.float64)
        # What a layer leaves for its way back.
        waiting = [layer for layer in self._way_out if layer > 1] if kept is None else []
        for part in self._parts(len(waiting), kept):
            if kept is None:
                part = replace(part, kept=replace(part.kept, z=dict(zip(waiting, part.own, strict=True))))
            self._gradient(part, partial[part.where], grad[part.where])
        if self._count:
            rows, block = active_mask(self._u), self._kernels.BLOCK
            self._kernels.total[self._count,](
                partial, None if rows is None else rows.contiguous().view(torch.uint8), value, self._tiles,
                BLOCK=block, BLOCKS=-(-self._tiles // block),
            )  # fmt: skip
        return value, grad.view(self._shape)

    def _gradient(self, part: _Chunk, partial: Tensor, grad: Tensor) -> None:
        pair, z, g = part.pair, part.kept.z, part.kept.g
        bias = {"bias": self._vectors[-1]}
        for layer in self._way_out:
            to = {"h_taps": part.h_taps} if layer == self._K else {"a_out": pair[layer % 2]}
            given = {"before": pair[(layer - 1) % 2], "z": z.get(layer), **to}
            self._layer(self._kernels.primal, layer, "f", part, given)
        if not self._red:
            given = {"image_in": part.u, "h_taps": part.h_taps, "c": part.kept.c, "value": partial, **bias}
            self._launch(self._kernels.head, part.rows, len(part.u), given)
        for layer, ways in self._backward_layers():
            given = {"before": pair[(layer - 1) % 2], "after": pair[(layer + 1) % 2]}
            given |= {"z": z.get(layer), "g": g.get(layer)}
            given |= {"h_taps": part.h_taps, "value": partial} if ways == "fb" else {}
            given |= {"g_taps": part.g_taps} if layer == 1 else {"gu_out": pair[layer % 2]}
            self._layer(self._kernels.primal, layer, ways, part, given)
        self._join(part, part.u, part.kept.c, grad, bias)

    def _join(self, part: _Chunk, image: Tensor, c: Tensor, out: Tensor, bias: dict[str, Tensor]) -> None:
        given = {"image_in": image, "c": c, "h_taps": part.h_taps, "g_taps": part.g_taps, "out": out, **bias}
        self._launch(self._kernels.join, part.rows, len(image), given)

    # The products.

    def product(self, kept: SavedActivations, v: Tensor) -> Tensor:
        """`hess r v`."""
        out, v = torch.empty_like(self._u), v.view(self._u.shape)
        waiting = self._saved_layers()
        for part in self._parts(len(waiting), kept):
            raw1 = dict(zip(waiting, part.own, strict=True))
            v_here, pair = v[part.where], part.pair
            c1 = self._tangent_forward(part, v_here, raw1, [pair[layer % 2] for layer in range(self._K)], {})
            for layer, ways in self._backward_layers():
                given = {"before1": pair[(layer - 1) % 2], "after1": pair[(layer + 1) % 2]}
                given |= {"h_taps": part.h_taps} if ways == "fb" else {}
                given |= {"g_taps": part.g_taps} if layer == 1 else {"gu1_out": pair[layer % 2]}
                self._back(part, v_here, c1, raw1, layer, ways, given)
            self._join(part, v_here, c1, out[part.where], {})
        return out.view(self._shape)

    def _saved_layers(self) -> list[int]:
        """The layers whose u' waits for the way back."""
        return [layer for layer in self._way_out if layer > 1]

    def _tangent_forward(self, part: _Chunk, v: Tensor, raw1: Planes, a1: list[Tensor], a: Planes) -> Tensor:
        """Forward tangents a' into `a1` (of layers 0..K - 1, and of K if it is there), a into `a`; returns c', or v for
        the head red."""
        for layer in self._way_out:
            given = {"v": v, "before1": a1[layer - 1], "z": part.kept.z.get(layer), "raw1_out": raw1.get(layer)}
            given |= {"a_out": a.get(layer), "a1_out": a1[layer] if layer < len(a1) else None}
            given |= {"h_taps": part.h_taps} if layer == self._K else {}
            self._layer(self._kernels.tangent, layer, "f", part, given)
        if self._red:
            return v
        given = {"image_in": v, "h_taps": part.h_taps, "c": part.image}
        self._launch(self._kernels.head, part.rows, len(v), given)
        return part.image

    def _back(  # noqa: PLR0913 - a layer on the way back
        self, part: _Chunk, v: Tensor, c1: Tensor, raw1: Planes, layer: int, ways: str, given: dict[str, Any]
    ) -> None:
        kept = {"z": part.kept.z.get(layer), "g": part.kept.g.get(layer), "raw1_in": raw1.get(layer)}
        self._layer(self._kernels.tangent, layer, ways, part, {"v": v, "c1": c1, **kept, **given})

    def parameters(self, kept: SavedActivations, v: Tensor) -> list[Tensor]:
        """`sum_b d/dtheta <grad r, v>`, float64: weight and bias of each convolution, then of each LayerNorm."""
        from ...kernels.conv_chain import weight_gradients  # pyright: ignore[reportMissingImports]

        K, CP, v = self._K, self._CP, v.view(self._u.shape)
        new = {"dtype": torch.float64, "device": v.device}
        filters = [torch.zeros((9, CP, CP) if 0 < i < K else (9, CP), **new) for i in range(K + 1)]
        sums = [torch.zeros(3, CP, **new) for _ in range(K)]
        last_bias = torch.zeros((), **new)
        waiting = self._saved_layers()
        for part in self._parts(len(waiting) + 2 * K + 1, kept):
            raw1 = dict(zip(waiting, part.own, strict=False))
            gu, *rest = part.own[len(waiting) :]
            a, a1 = dict(enumerate(rest[:K], 1)), [gu, *rest[K:]]
            v_here, rows = v[part.where], part.rows
            c1 = self._tangent_forward(part, v_here, raw1, a1, a)
            for layer, ways in self._backward_layers():
                gu1 = part.pair[layer % 2]
                tile_sums = gu.new_empty(len(gu), self._tiles, 3, CP, dtype=torch.float64)
                given = {"before1": a1[layer - 1], "after1": part.pair[(layer + 1) % 2], "gu_out": gu, "gu1_out": gu1}
                given |= {"a_out": a[layer], "a1_out": a1[layer]} if ways == "fb" else {}
                self._back(part, v_here, c1, raw1, layer, ways, {**given, "sums": tile_sums})
                sums[layer - 1] += _over_rows(tile_sums, rows).sum((0, 1))
                if layer > 1:
                    filters[layer - 1] += weight_gradients.filters(a[layer - 1], gu1, rows, (a1[layer - 1], gu))
                else:
                    filters[0] += weight_gradients.image_filters(part.u, gu1, rows, (v_here, gu))
            half = -0.5 if self._red else 1.0
            filters[K] += half * weight_gradients.image_filters(c1, a[K], rows, (part.kept.c, a1[K])).flip(0)
            last_bias += half * _over_rows(c1, rows).sum(dtype=torch.float64)
        return self._as_parameters(filters, sums, last_bias)

    def _as_parameters(self, filters: list[Tensor], sums: list[Tensor], last_bias: Tensor) -> list[Tensor]:
        """From the packed filters' gradients to the network's: padding, input gain and centring."""
        gain, C, K = self._form.net.gain, self._C, self._K
        inner = [f[:, :C, :C].permute(2, 1, 0) for f in filters[1:K]]
        first, last = filters[0][:, :C].T[:, None] * gain, filters[K][:, :C].T[None] / gain
        weights = [w.reshape(*w.shape[:2], 3, 3) for w in (first, *inner, last)]
        biases = [s[0, :C] for s in sums]
        if self._norm:
            weights[:K] = [w - w.mean(0, keepdim=True) for w in weights[:K]]
            biases = [b - b.mean() for b in biases]
        found = [p for pair in zip(weights, [*biases, last_bias[None] / gain], strict=True) for p in pair]
        return found + [s[i, :C] for s in sums for i in (1, 2) if self._norm]


@lru_cache(maxsize=64)
def _absent(kernel: Any) -> dict[str, None]:
    """The arguments of a kernel that are no constants, none of them given."""
    return dict.fromkeys(n for n in kernel.arg_names if not n.isupper())


def aligned(t: Tensor) -> Tensor:
    """A tensor that begins at a multiple of 16 bytes: for others Triton has kernels with other loads."""
    return t.clone() if t.data_ptr() % 16 else t


def _over_rows(t: Tensor, rows: Tensor | None) -> Tensor:
    """Zeros for the images that are not at work, whatever lies there."""
    return t if rows is None else torch.where(rows.view(-1, *[1] * (t.dim() - 1)), t, 0.0)
