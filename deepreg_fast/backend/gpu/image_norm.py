"""The network's sweeps on a GPU with a LayerNorm over a whole image (docs/kernels.md).

It launches the kernels of `kernels/conv_chain/image_norm.py` and `image_norm_tangent.py` in order and holds the tensors
between them.

As in `pixel_norm.py`, tensors may be on any device, no function synchronizes, and hidden layers are 1..K.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from ...functional.conv_chain import ConvChainForm
from ..active import active_mask
from .activations import Planes, SavedActivations, aligned, over_rows
from .chain_options import DEFAULT, ChainOptions, convs_of, norms_of
from .memory import memory_guard
from .pixel_norm import Sweeps

_HEADS = {"red": (1.0, -0.5, 0.0), "residual": (1.0, -1.0, 1.0), "norm": (0.0, 0.0, 1.0)}
"""`phi_uu, phi_uh, phi_hh` of docs/math.md, M9."""


@dataclass(frozen=True)
class ImageNormActivations(SavedActivations):
    """Per hidden layer: the convolution's output (z), the cotangent of SiLU's output (g), and four numbers per image
    (`fixed` `[B, 4]`, kernels/conv_chain/image_norm.py). And the cotangent of h (c)."""

    fixed: Planes

    def each(self, f: Callable[[Tensor], Tensor]) -> ImageNormActivations:
        """A copy with each tensor t replaced by `f(t)`."""
        z, g, fixed = ({layer: f(t) for layer, t in planes.items()} for planes in (self.z, self.g, self.fixed))
        return ImageNormActivations(z, g, f(self.c), fixed)

    def of(self, part: slice) -> ImageNormActivations:
        """The activations of a part of the batch."""
        return self.each(lambda t: t[part])


@dataclass(frozen=True)
class _Tangent:
    """Intermediates of the tangent sweep along v: the cotangent of h, the term that does not pass through h, and a1 and
    gu1 of each hidden layer. For parameter products also a, gu and the sums of `below1`."""

    c1: Tensor
    direct: Tensor
    a1: Planes
    gu1: Planes
    a: Planes
    gu: Planes
    sums: Planes


class WholeSweeps(Sweeps):
    """As `Sweeps`, for `norm == "image"`."""

    def __init__(self, form: ConvChainForm, x: Tensor, options: ChainOptions = DEFAULT) -> None:
        from ...kernels.conv_chain import image_norm, image_norm_tangent, tiles  # pyright: ignore[reportMissingImports]

        tile = options.tile or image_norm.TILES[tiles.padded(convs_of(form)[0].out_channels)]
        super().__init__(form, x, replace(options, tile=tile))
        self._whole, self._whole_tangent = image_norm, image_norm_tangent
        self._eps = float(norms_of(form)[0].eps)
        uu, uh, hh = _HEADS[form.head]
        self._head = {"uu": self._alpha + uu, "uh": uh, "hh": hh}
        self._hidden = range(1, self._K + 1)

    # The parts of the batch, and memory.

    def _slices(self) -> list[slice]:
        per_part = self._most()
        return [slice(i, min(i + per_part, self._count)) for i in range(0, self._count, per_part)]

    def _work(self, part: slice) -> tuple[Tensor | None, Tensor]:
        """The active images of the part: as a mask or None, and as bytes, which Triton reads on every device."""
        rows, u = active_mask(self._u), self._u[part]
        rows = None if rows is None else rows[part]
        all_active = torch.ones(len(u), dtype=torch.bool, device=u.device)
        return rows, (all_active if rows is None else rows.contiguous()).view(torch.uint8)

    def _needing(self, count: int, planes: int, what: str) -> AbstractContextManager[None]:
        return memory_guard(self._bytes(count, planes, 3), self._u.device, f"{what} at {count} images")

    def _planes(self, count: int) -> Planes:
        """One plane per hidden layer."""
        return {layer: self._plane(count) for layer in self._hidden}

    def _partial(self, work: Tensor, *shape: int) -> Tensor:
        """Partial sums of each tile."""
        return self._u.new_empty((len(work) * self._tiles, *shape), dtype=torch.float64)

    def _room(self, count: int) -> ImageNormActivations:
        with self._needing(count, 2 * self._K, "Linearizing"):
            fixed = {layer: self._u.new_empty(count, 4) for layer in self._hidden}
            return ImageNormActivations(
                self._planes(count), self._planes(count), torch.empty_like(self._u[:count]), fixed
            )

    def allocate_saved(self) -> ImageNormActivations:
        """Uninitialized memory for the whole batch."""
        return self._room(self._count)

    # Launches.

    def _run(self, kernel: Any, work: Tensor, **given: Any) -> None:
        """Launch one program per tile. Omitted outputs are None and are not computed."""
        size = {"height": self._height, "width": self._width, "C": self._C, "CP": self._CP}
        given = {**size, **self._tile, "PREC": self._options.precision, "work": work, **given}
        kernel[len(work) * self._tiles,](
            **{n: given.get(n) for n in kernel.arg_names},
            num_warps=self._warps,
            num_stages=self._whole.STAGES,
            enable_fp_fusion=True,
        )

    def _of_images(self, kernel: Any, work: Tensor, **given: Any) -> None:
        """Launch one program per image."""
        given = {"work": work, "tiles": self._tiles, "BLOCK": self._whole.BLOCK, **given}
        kernel[len(work),](**given, num_warps=4, num_stages=self._whole.STAGES, enable_fp_fusion=True)

    def _means(self, work: Tensor, partial: Tensor, to: Tensor, column: int) -> None:
        """Write the totals of the tiles' sums, divided by pixels times channels, to columns of `to`."""
        count, stride = self._height * self._width * self._C, to.shape[1]
        constants = {"count": count, "stride": stride, "column": column, "K": partial.shape[1]}
        self._of_images(self._whole.add_tiles, work, partial=partial, to=to, **constants)

    def _of_layer(self, layer: int, kept: ImageNormActivations) -> dict[str, Tensor]:
        vectors = self._vectors[layer - 1]
        return {"u": kept.z[layer], "g": kept.g[layer], "fixed": kept.fixed[layer], "vectors": vectors}

    # The gradient.

    def gradient(self, kept: SavedActivations | None = None) -> tuple[Tensor, Tensor]:
        """`r` `[B]` and its gradient; the activations that the products need are written to `kept`."""
        value, grad = self._u.new_empty(self._count), torch.empty_like(self._u)
        for part in self._slices():
            count = part.stop - part.start
            saved = self._room(count) if kept is None else cast(ImageNormActivations, kept).of(part)
            with self._needing(count, 1, "A gradient"):
                self._sweep(part, saved, value[part], grad[part])
        return value, grad.view(self._shape)

    def _sweep(self, part: slice, kept: ImageNormActivations, value: Tensor, grad: Tensor) -> None:
        kernels, (_, mask) = self._whole, self._work(part)
        a, before = self._plane(len(mask)), aligned(self._u[part])
        moments, sums, energy = (self._partial(mask, n) for n in (3, 2, 1))
        for layer in self._hidden:
            tensors, w = self._of_layer(layer, kept), self._filters[layer - 1]
            self._run(kernels.layer, mask, before=before, w=w, moments=moments, ONE=layer == 1, **tensors)
            self._of_images(kernels.merge, mask, moments=moments, fixed=kept.fixed[layer], eps=self._eps)
            self._run(kernels.activate, mask, a=a, **tensors)
            before = a
        direct = torch.empty_like(kept.c)
        last = {"w": self._filters[-1], "bias": self._vectors[-1], **self._head}
        out = {"cotangent": kept.c, "direct": direct, "partial": energy}
        self._run(kernels.head, mask, a=a, pixels=self._u[part], **out, **last)
        self._of_images(kernels.add_tiles, mask, partial=energy, to=value, count=1, stride=1, column=0, K=1)
        cotangent = aligned(kept.c)
        for layer in reversed(self._hidden):
            tensors, w = self._of_layer(layer, kept), self._filters[layer]
            self._run(kernels.above, mask, cotangent=cotangent, w=w, partial=sums, ONE=layer == self._K, **tensors)
            self._means(mask, sums, kept.fixed[layer], 2)
            self._run(kernels.below, mask, gu=a, **tensors)
            cotangent = a
        self._run(kernels.join, mask, gu=a, w=self._filters[0], direct=direct, out=grad)

    # The products.

    def _along(self, part: slice, kept: ImageNormActivations, v: Tensor, theta: bool) -> _Tangent:
        """The tangent sweep along `v`. With `theta` every layer has its own planes, otherwise layers alternate."""
        kernels, (_, mask), head = self._whole_tangent, self._work(part), self._whole.head
        n = len(mask)
        xhat1, partial, partial_cross = self._planes(n), self._partial(mask, 2), self._partial(mask, 1)
        tangent_stats = {layer: v.new_empty(n, 8) for layer in self._hidden}
        ping_pong = [self._plane(n), self._plane(n)]
        a1, gu1 = (self._planes(n) if theta else {k: ping_pong[k % 2] for k in self._hidden} for _ in range(2))
        a, gu = (self._planes(n) if theta else {} for _ in range(2))
        # Zeros for inactive images.
        shape = (n * self._tiles, 3, self._CP)
        sums = {k: v.new_zeros(shape, dtype=torch.float64) for k in self._hidden} if theta else {}
        before = aligned(v)
        for layer in self._hidden:
            tensors, w = self._of_layer(layer, kept), self._filters[layer - 1]
            self._run(
                kernels.layer1, mask, before=before, w=w, u1=xhat1[layer], partial=partial, ONE=layer == 1, **tensors
            )
            self._means(mask, partial, tangent_stats[layer], 0)
            tensors |= {"u1": xhat1[layer], "along": tangent_stats[layer], "partial": partial_cross}
            self._run(kernels.activate1, mask, a1=a1[layer], a=a.get(layer), **tensors)
            self._means(mask, partial_cross, tangent_stats[layer], 4)
            before = a1[layer]
        c1, direct = torch.empty_like(v), torch.empty_like(v)
        last = {"w": self._filters[-1], "bias": v.new_zeros(1), **self._head}
        self._run(head, mask, a=before, pixels=v, cotangent=c1, direct=direct, partial=partial_cross, **last)
        cotangent = c1
        for layer in reversed(self._hidden):
            tensors, w = self._of_layer(layer, kept), self._filters[layer]
            tensors |= {"xhat1": xhat1[layer], "cn1": gu1[layer]}
            self._run(kernels.above1, mask, cotangent1=cotangent, w=w, partial=partial, ONE=layer == self._K, **tensors)
            self._means(mask, partial, tangent_stats[layer], 2)
            self._run(
                kernels.below1, mask, along=tangent_stats[layer], gu=gu.get(layer), sums=sums.get(layer), **tensors
            )
            cotangent = gu1[layer]
        return _Tangent(c1, direct, a1, gu1, a, gu, sums)

    def product(self, kept: SavedActivations, v: Tensor) -> Tensor:
        """`hess r v`."""
        out, v = torch.empty_like(self._u), v.view(self._u.shape)
        for part in self._slices():
            _, mask = self._work(part)
            with self._needing(len(mask), self._K + 2, "A product with the Hessian"):
                t = self._along(part, cast(ImageNormActivations, kept).of(part), v[part], False)
                arguments = {"gu": t.gu1[1], "w": self._filters[0], "direct": t.direct, "out": out[part]}
                self._run(self._whole.join, mask, **arguments)
        return out.view(self._shape)

    def parameters(self, kept: SavedActivations, v: Tensor) -> list[Tensor]:
        """`sum_b d/dtheta <grad r, v>`, float64: weight and bias of each convolution, then of each LayerNorm."""
        v, totals = v.view(self._u.shape), self._no_sums()
        for part in self._slices():
            with self._needing(part.stop - part.start, 5 * self._K + 2, "A parameter product"):
                for total, term in zip(
                    totals, self._sums(part, cast(ImageNormActivations, kept).of(part), v[part]), strict=True
                ):
                    total += term
        filters, sums = totals[: self._K + 1], totals[self._K + 1 : -1]
        norms = [s[i, : self._C] for s in sums for i in (1, 2)]
        return self._as_parameters(filters, sums, totals[-1]) + norms

    def _no_sums(self) -> list[Tensor]:
        CP, new = self._CP, {"dtype": torch.float64, "device": self._u.device}
        filters = [torch.zeros((9, CP, CP) if 0 < i < self._K else (9, CP), **new) for i in range(self._K + 1)]
        return [*filters, *(torch.zeros(3, CP, **new) for _ in self._hidden), torch.zeros((), **new)]

    def _sums(self, part: slice, kept: ImageNormActivations, v: Tensor) -> list[Tensor]:
        """Gradients of the packed filters; of each hidden layer's bias, gamma and beta; of the last bias."""
        from ...kernels.conv_chain import weight_gradients  # pyright: ignore[reportMissingImports]

        (rows, _), u, K, t = self._work(part), self._u[part], self._K, self._along(part, kept, v, True)
        filters = [weight_gradients.image_filters(u, t.gu1[1], rows, (v, t.gu[1]))]
        for layer in range(2, K + 1):
            filters.append(weight_gradients.filters(t.a[layer - 1], t.gu1[layer], rows, (t.a1[layer - 1], t.gu[layer])))
        filters.append(weight_gradients.image_filters(t.c1, t.a[K], rows, (kept.c, t.a1[K])).flip(0))
        last_bias = over_rows(t.c1, rows).sum(dtype=torch.float64)
        return [*filters, *(t.sums[layer].sum(0) for layer in self._hidden), last_bias]
