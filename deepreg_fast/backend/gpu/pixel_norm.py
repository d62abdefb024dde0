"""The sweeps of the conv chain on a GPU, without a LayerNorm or with one over the channels of a pixel.

It launches the kernels of `kernels/conv_chain/pixel_norm.py` in order and holds the tensors between them
(docs/kernels.md). Tensors may be on any device: Triton's interpreter runs on the CPU. No function here synchronizes, so
everything can be captured in a CUDA graph. Hidden layers are 1..K, the last convolution is K + 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from ...functional.conv_chain import HEADS, ConvChainForm
from ..active import active_mask, mask_bytes
from .activations import Chunk, Planes, SavedActivations, absent_arguments, over_rows
from .chain_options import DEFAULT, ChainOptions, convs_of, norms_of
from .memory import memory_guard
from .packed import packed


class Sweeps:
    """A network with packed parameters, a batch of images x, and the sweeps over them."""

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
        # For the head red, one launch runs the last hidden layer forward and backward.
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
        """A copy of the sweeps that reads `put(t)` instead of each of its tensors t."""
        moved = copy(self)
        moved._u = put(self._u)
        moved._filters, moved._vectors = [put(t) for t in self._filters], [put(t) for t in self._vectors]
        moved._layers = {}
        return moved

    def allocate_saved(self) -> SavedActivations:
        """Uninitialized memory for the whole batch."""
        needed = self._bytes(self._count, 2 * (self._K - 1), not self._red)
        with memory_guard(needed, self._u.device, f"Linearizing at {self._count} images"):
            return SavedActivations(
                {layer: self._plane(self._count) for layer in range(2, self._K + 1)},
                {layer: self._plane(self._count) for layer in range(1, self._K)},
                self._u if self._red else torch.empty_like(self._u),
            )

    def _parts(self, own: int, kept: SavedActivations | None) -> Iterator[Chunk]:
        """The parts of the batch, with memory that they share, including `own` planes."""
        per_part, rows = self._most(), active_mask(self._u)
        with memory_guard(
            self._bytes(per_part, 2 + own, 19), self._u.device, f"A sweep over {per_part} images at a time"
        ):
            planes = [self._plane(per_part) for _ in range(2 + own)]
            taps = [self._u.new_empty(per_part, 9, self._height, self._width) for _ in range(2)]
            image = self._u.new_empty(per_part, self._height, self._width)
        for i in range(0, self._count, per_part):
            part = slice(i, min(i + per_part, self._count))
            u, n = self._u[part], part.stop - part.start
            views = [p[:n] for p in planes]
            saved = SavedActivations({}, {}, u if self._red else image[:n]) if kept is None else kept.of(part)
            active = None if rows is None else rows[part]
            yield Chunk(part, active, u, saved, views[:2], views[2:], taps[0][:n], taps[1][:n], image[:n])

    def _most(self) -> int:
        """Images per part. If there are several parts, it is a multiple of 4 (unless it is less than 4), so that every
        part of an image plane is aligned to 16 bytes and can be read in pieces of 16."""
        count = max(1, min(self._count, self._options.plane_bytes // max(1, self._bytes(1, 1, 0))))
        return count if count == self._count or count < 4 else count // 4 * 4

    def _bytes(self, images: int, planes: int, floats: int) -> int:
        return images * self._height * self._width * (self._storage.itemsize * self._CP * planes + 4 * floats)

    def _plane(self, images: int) -> Tensor:
        return self._u.new_empty(images, self._height, self._width, self._CP, dtype=self._storage)

    def _to_pack(self) -> tuple[list[Tensor], tuple[Any, ...]]:
        """The tensors and settings from which the filters and vectors are packed."""
        modules = (*convs_of(self._form), *norms_of(self._form))
        parameters = [cast(Tensor, p) for m in modules for p in (m.weight, m.bias)]
        return parameters, (float(self._form.net.gain), self._form.net.norm)

    def _pack(self, i: int) -> tuple[Tensor, Tensor]:
        """Filters and vectors of convolution i = 0..K."""
        conv, norms, hidden = convs_of(self._form)[i], norms_of(self._form), i < self._K
        norm = (norms[i].weight, norms[i].bias) if norms and hidden else (None, None)
        filters = self._u.new_empty((9, self._CP, self._CP) if 0 < i < self._K else (16, self._CP))
        vectors = self._u.new_empty(3, self._CP)
        parameters = [None if p is None else p.detach().contiguous() for p in (conv.weight, conv.bias, *norm)]
        self._kernels.pack[16,](
            *parameters, filters, vectors, float(self._form.net.gain), C=self._C, CP=self._CP, FIRST=i == 0,
            LAST=i == self._K, CENTERED=self._norm and hidden,
        )  # fmt: skip
        return filters, vectors

    def _launch(
        self, kernel: Any, rows: Tensor | None, count: int, given: dict[str, Any], fixed: dict[str, Any] | None = None
    ) -> None:
        """Launch one program for each tile of `count` images; omitted arguments are None.

        `fixed`: the arguments that all launches of a kind share (`_fixed`).
        """
        fixed = self._fixed(kernel) if fixed is None else fixed
        kernel[count * self._tiles,](**{**fixed, **given, "rows": mask_bytes(rows)})

    def _fixed(self, kernel: Any, maxnreg: int | None = None, **constants: Any) -> dict[str, Any]:
        """The arguments and options of a kernel that are the same for every launch."""
        size = {"height": self._height, "width": self._width, "alpha": self._alpha, "eps": self._eps}
        options = {"num_warps": self._warps, "num_stages": 1, "enable_fp_fusion": True, "maxnreg": maxnreg}
        names = absent_arguments(kernel)
        return {**names, **{n: v for n, v in size.items() if n in names}, **constants, **self._tile, **options}

    def _layer(self, kernel: Any, layer: int, ways: str, part: Chunk, given: dict[str, Any]) -> None:
        """Launch `primal` or `tangent` of hidden layer `layer`: forward ("f"), backward ("b") or both."""
        key = kernel, layer, ways, "sums" in given
        if (fixed := self._layers.get(key)) is None:
            fixed = self._layers[key] = self._fixed_layer(*key)
        self._launch(kernel, part.rows, len(part.u), {"u": part.u, "c": part.kept.c, **given}, fixed)

    def _fixed_layer(self, kernel: Any, layer: int, ways: str, sums: bool) -> dict[str, Any]:
        """`_fixed` of a hidden layer: its filters, its position in the network, and the register limit."""
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
        names = absent_arguments(kernel)
        return self._fixed(kernel, limit, **{n: p for n, p in parameters.items() if n in names}, **constants)

    def _backward_layers(self) -> Iterator[tuple[int, str]]:
        for layer in range(self._K, 0, -1):
            yield layer, "fb" if self._red and layer == self._K else "b"

    def gradient(self, kept: SavedActivations | None = None) -> tuple[Tensor, Tensor]:
        """`r` `[B]` and its gradient; the activations that the products need are written to `kept`."""
        value, grad = self._u.new_empty(self._count), torch.empty_like(self._u)
        partial = self._u.new_empty(self._count, self._tiles, dtype=torch.float64)
        # Layers whose pre-activations are saved for the backward sweep.
        saved = [layer for layer in self._way_out if layer > 1] if kept is None else []
        for part in self._parts(len(saved), kept):
            if kept is None:
                part = replace(part, kept=replace(part.kept, z=dict(zip(saved, part.own, strict=True))))
            self._gradient(part, partial[part.where], grad[part.where])
        if self._count:
            rows, block = active_mask(self._u), self._kernels.BLOCK
            self._kernels.total[self._count,](
                partial, mask_bytes(rows), value, self._tiles,
                BLOCK=block, BLOCKS=-(-self._tiles // block),
            )  # fmt: skip
        return value, grad.view(self._shape)

    def _gradient(self, part: Chunk, partial: Tensor, grad: Tensor) -> None:
        pair, z, g = part.pair, part.kept.z, part.kept.g
        bias = {"bias": self._vectors[-1]}
        for layer in self._way_out:
            to = {"h_taps": part.h_taps} if layer == self._K else {"a_out": pair[layer % 2]}
            arguments = {"before": pair[(layer - 1) % 2], "z": z.get(layer), **to}
            self._layer(self._kernels.primal, layer, "f", part, arguments)
        if not self._red:
            arguments = {"image_in": part.u, "h_taps": part.h_taps, "c": part.kept.c, "value": partial, **bias}
            self._launch(self._kernels.head, part.rows, len(part.u), arguments)
        for layer, ways in self._backward_layers():
            arguments = {"before": pair[(layer - 1) % 2], "after": pair[(layer + 1) % 2]}
            arguments |= {"z": z.get(layer), "g": g.get(layer)}
            arguments |= {"h_taps": part.h_taps, "value": partial} if ways == "fb" else {}
            arguments |= {"g_taps": part.g_taps} if layer == 1 else {"gu_out": pair[layer % 2]}
            self._layer(self._kernels.primal, layer, ways, part, arguments)
        self._join(part, part.u, part.kept.c, grad, bias)

    def _join(self, part: Chunk, image: Tensor, c: Tensor, out: Tensor, bias: dict[str, Tensor]) -> None:
        arguments = {"image_in": image, "c": c, "h_taps": part.h_taps, "g_taps": part.g_taps, "out": out, **bias}
        self._launch(self._kernels.join, part.rows, len(image), arguments)

    def product(self, kept: SavedActivations, v: Tensor) -> Tensor:
        """`hess r v`."""
        out, v = torch.empty_like(self._u), v.view(self._u.shape)
        saved = self._saved_layers()
        for part in self._parts(len(saved), kept):
            raw1 = dict(zip(saved, part.own, strict=True))
            v_part, pair = v[part.where], part.pair
            c1 = self._tangent_forward(part, v_part, raw1, [pair[layer % 2] for layer in range(self._K)], {})
            for layer, ways in self._backward_layers():
                arguments = {"before1": pair[(layer - 1) % 2], "after1": pair[(layer + 1) % 2]}
                arguments |= {"h_taps": part.h_taps} if ways == "fb" else {}
                arguments |= {"g_taps": part.g_taps} if layer == 1 else {"gu1_out": pair[layer % 2]}
                self._back(part, v_part, c1, raw1, layer, ways, arguments)
            self._join(part, v_part, c1, out[part.where], {})
        return out.view(self._shape)

    def _saved_layers(self) -> list[int]:
        """The layers whose u' is saved for the backward sweep."""
        return [layer for layer in self._way_out if layer > 1]

    def _tangent_forward(self, part: Chunk, v: Tensor, raw1: Planes, a1: list[Tensor], a: Planes) -> Tensor:
        """Forward tangent sweep: writes a' to `a1` (layers 0..K - 1, and K if `a1` has it) and a to `a`; returns c', or
        v for the head red."""
        for layer in self._way_out:
            arguments = {"v": v, "before1": a1[layer - 1], "z": part.kept.z.get(layer), "raw1_out": raw1.get(layer)}
            arguments |= {"a_out": a.get(layer), "a1_out": a1[layer] if layer < len(a1) else None}
            arguments |= {"h_taps": part.h_taps} if layer == self._K else {}
            self._layer(self._kernels.tangent, layer, "f", part, arguments)
        if self._red:
            return v
        arguments = {"image_in": v, "h_taps": part.h_taps, "c": part.image}
        self._launch(self._kernels.head, part.rows, len(v), arguments)
        return part.image

    def _back(  # noqa: PLR0913 - a layer of the backward sweep
        self, part: Chunk, v: Tensor, c1: Tensor, raw1: Planes, layer: int, ways: str, given: dict[str, Any]
    ) -> None:
        saved = {"z": part.kept.z.get(layer), "g": part.kept.g.get(layer), "raw1_in": raw1.get(layer)}
        self._layer(self._kernels.tangent, layer, ways, part, {"v": v, "c1": c1, **saved, **given})

    def parameters(self, kept: SavedActivations, v: Tensor) -> list[Tensor]:
        """`sum_b d/dtheta <grad r, v>`, float64: weight and bias of each convolution, then of each LayerNorm."""
        from ...kernels.conv_chain import weight_gradients  # pyright: ignore[reportMissingImports]

        K, CP, v = self._K, self._CP, v.view(self._u.shape)
        new = {"dtype": torch.float64, "device": v.device}
        filters = [torch.zeros((9, CP, CP) if 0 < i < K else (9, CP), **new) for i in range(K + 1)]
        sums = [torch.zeros(3, CP, **new) for _ in range(K)]
        last_bias = torch.zeros((), **new)
        saved = self._saved_layers()
        for part in self._parts(len(saved) + 2 * K + 1, kept):
            raw1 = dict(zip(saved, part.own, strict=False))
            gu, *rest = part.own[len(saved) :]
            a, a1 = dict(enumerate(rest[:K], 1)), [gu, *rest[K:]]
            v_part, rows = v[part.where], part.rows
            c1 = self._tangent_forward(part, v_part, raw1, a1, a)
            for layer, ways in self._backward_layers():
                gu1 = part.pair[layer % 2]
                tile_sums = gu.new_empty(len(gu), self._tiles, 3, CP, dtype=torch.float64)
                arguments = {
                    "before1": a1[layer - 1],
                    "after1": part.pair[(layer + 1) % 2],
                    "gu_out": gu,
                    "gu1_out": gu1,
                }
                arguments |= {"a_out": a[layer], "a1_out": a1[layer]} if ways == "fb" else {}
                self._back(part, v_part, c1, raw1, layer, ways, {**arguments, "sums": tile_sums})
                sums[layer - 1] += over_rows(tile_sums, rows).sum((0, 1))
                if layer > 1:
                    filters[layer - 1] += weight_gradients.filters(a[layer - 1], gu1, rows, (a1[layer - 1], gu))
                else:
                    filters[0] += weight_gradients.image_filters(part.u, gu1, rows, (v_part, gu))
            factor = -0.5 if self._red else 1.0
            filters[K] += factor * weight_gradients.image_filters(c1, a[K], rows, (part.kept.c, a1[K])).flip(0)
            last_bias += factor * over_rows(c1, rows).sum(dtype=torch.float64)
        return self._as_parameters(filters, sums, last_bias)

    def _as_parameters(self, filters: list[Tensor], sums: list[Tensor], last_bias: Tensor) -> list[Tensor]:
        """Convert gradients of the packed filters to the network's: padding, input gain and centering."""
        gain, C, K = self._form.net.gain, self._C, self._K
        inner = [f[:, :C, :C].permute(2, 1, 0) for f in filters[1:K]]
        first, last = filters[0][:, :C].T[:, None] * gain, filters[K][:, :C].T[None] / gain
        weights = [w.reshape(*w.shape[:2], 3, 3) for w in (first, *inner, last)]
        biases = [s[0, :C] for s in sums]
        if self._norm:
            weights[:K] = [w - w.mean(0, keepdim=True) for w in weights[:K]]
            biases = [b - b.mean() for b in biases]
        conv_grads = [p for pair in zip(weights, [*biases, last_bias[None] / gain], strict=True) for p in pair]
        return conv_grads + [s[i, :C] for s in sums for i in (1, 2) if self._norm]
