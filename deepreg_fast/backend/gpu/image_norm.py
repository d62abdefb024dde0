"""The network's sweeps on a GPU with a LayerNorm over a whole image (docs/kernels.md).

It launches `kernels/conv_chain/image_norm.py` and `image_norm_tangent.py` in order and keeps the tensors between them.

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
from .memory import memory_guard
from .pixel_norm import DEFAULT, ChainOptions, Planes, SavedActivations, Sweeps, _over_rows, aligned, convs_of, norms_of

_HEADS = {"red": (1.0, -0.5, 0.0), "residual": (1.0, -1.0, 1.0), "norm": (0.0, 0.0, 1.0)}
"""`phi_uu, phi_uh, phi_hh` of docs/math.md, M9."""


@dataclass(frozen=True)
class ImageNormActivations(SavedActivations):
    """Of each hidden layer what its convolution gave (z), the cotangent above SiLU (g), and four numbers an image
    (`fixed` `[B, 4]`, kernels/conv_chain/image_norm.py); the cotangent of h (c)."""

    fixed: Planes

    def each(self, f: Callable[[Tensor], Tensor]) -> ImageNormActivations:
        """With `f` of each tensor in its place."""
        z, g, fixed = ({layer: f(t) for layer, t in planes.items()} for planes in (self.z, self.g, self.fixed))
        return ImageNormActivations(z, g, f(self.c), fixed)

    def of(self, part: slice) -> ImageNormActivations:
        """The same for a part of the batch."""
        return self.each(lambda t: t[part])


@dataclass(frozen=True)
class _Tangent:
    """Of a sweep along v: the cotangent of h, what does not go through h, and each hidden layer's a1 and gu1; where the
    parameters are wanted also a, gu and the sums of `below1`."""

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

    # The batch, part by part, and its memory.

    def _slices(self) -> list[slice]:
        most = self._most()
        return [slice(i, min(i + most, self._count)) for i in range(0, self._count, most)]

    def _work(self, part: slice) -> tuple[Tensor | None, Tensor]:
        """Which images of the part are at work, as `rows` and in bytes, which Triton reads alike on every device."""
        rows, u = active_mask(self._u), self._u[part]
        rows = None if rows is None else rows[part]
        every = torch.ones(len(u), dtype=torch.bool, device=u.device)
        return rows, (every if rows is None else rows).view(torch.uint8)

    def _needing(self, count: int, planes: int, what: str) -> AbstractContextManager[None]:
        return memory_guard(self._bytes(count, planes, 3), self._u.device, f"{what} at {count} images")

    def _planes(self, count: int) -> Planes:
        """One for each hidden layer."""
        return {layer: self._plane(count) for layer in self._hidden}

    def _partial(self, work: Tensor, *shape: int) -> Tensor:
        """Of each tile."""
        return self._u.new_empty((len(work) * self._tiles, *shape), dtype=torch.float64)

    def _room(self, count: int) -> ImageNormActivations:
        with self._needing(count, 2 * self._K, "Linearizing"):
            fixed = {layer: self._u.new_empty(count, 4) for layer in self._hidden}
            return ImageNormActivations(
                self._planes(count), self._planes(count), torch.empty_like(self._u[:count]), fixed
            )

    def allocate_saved(self) -> ImageNormActivations:
        """Uninitialized, for the whole batch."""
        return self._room(self._count)

    # Launches.

    def _run(self, kernel: Any, work: Tensor, **given: Any) -> None:
        """A program a tile. An argument that is not given is None: what it would hold is not computed."""
        size = {"height": self._height, "width": self._width, "C": self._C, "CP": self._CP}
        given = {**size, **self._tile, "PREC": self._options.precision, "work": work, **given}
        kernel[len(work) * self._tiles,](
            **{n: given.get(n) for n in kernel.arg_names},
            num_warps=self._warps,
            num_stages=self._whole.STAGES,
            enable_fp_fusion=True,
        )

    def _of_images(self, kernel: Any, work: Tensor, **given: Any) -> None:
        """A program an image."""
        given = {"work": work, "tiles": self._tiles, "BLOCK": self._whole.BLOCK, **given}
        kernel[len(work),](**given, num_warps=4, num_stages=self._whole.STAGES, enable_fp_fusion=True)

    def _means(self, work: Tensor, partial: Tensor, to: Tensor, column: int) -> None:
        """The tiles' sums to columns of `to`, divided by the number of pixels and channels."""
        count, stride = self._height * self._width * self._C, to.shape[1]
        given = {"count": count, "stride": stride, "column": column, "K": partial.shape[1]}
        self._of_images(self._whole.add_tiles, work, partial=partial, to=to, **given)

    def _of_layer(self, layer: int, kept: ImageNormActivations) -> dict[str, Tensor]:
        vectors = self._vectors[layer - 1]
        return {"u": kept.z[layer], "g": kept.g[layer], "fixed": kept.fixed[layer], "vectors": vectors}

    # The gradient.

    def gradient(self, kept: SavedActivations | None = None) -> tuple[Tensor, Tensor]:
        """`r` `[B]` and its gradient; what the products need goes into `kept`."""
        value, grad = self._u.new_empty(self._count), torch.empty_like(self._u)
        for part in self._slices():
            count = part.stop - part.start
            here = self._room(count) if kept is None else cast(ImageNormActivations, kept).of(part)
            with self._needing(count, 1, "A gradient"):
                self._sweep(part, here, value[part], grad[part])
        return value, grad.view(self._shape)

    def _sweep(self, part: slice, kept: ImageNormActivations, value: Tensor, grad: Tensor) -> None:
        kernels, (_, work) = self._whole, self._work(part)
        a, before = self._plane(len(work)), aligned(self._u[part])
        moments, sums, energy = (self._partial(work, n) for n in (3, 2, 1))
        for layer in self._hidden:
            of, w = self._of_layer(layer, kept), self._filters[layer - 1]
            self._run(kernels.layer, work, before=before, w=w, moments=moments, ONE=layer == 1, **of)
            self._of_images(kernels.merge, work, moments=moments, fixed=kept.fixed[layer], eps=self._eps)
            self._run(kernels.activate, work, a=a, **of)
            before = a
        direct = torch.empty_like(kept.c)
        last = {"w": self._filters[-1], "bias": self._vectors[-1], **self._head}
        out = {"cotangent": kept.c, "direct": direct, "partial": energy}
        self._run(kernels.head, work, a=a, pixels=self._u[part], **out, **last)
        self._of_images(kernels.add_tiles, work, partial=energy, to=value, count=1, stride=1, column=0, K=1)
        above = aligned(kept.c)
        for layer in reversed(self._hidden):
            of, w = self._of_layer(layer, kept), self._filters[layer]
            self._run(kernels.above, work, cotangent=above, w=w, partial=sums, ONE=layer == self._K, **of)
            self._means(work, sums, kept.fixed[layer], 2)
            self._run(kernels.below, work, gu=a, **of)
            above = a
        self._run(kernels.join, work, gu=a, w=self._filters[0], direct=direct, out=grad)

    # The products.

    def _along(self, part: slice, kept: ImageNormActivations, v: Tensor, theta: bool) -> _Tangent:
        """The sweep along `v`. With `theta` every layer has planes of its own; else neighbours share two."""
        kernels, (_, work), head = self._whole_tangent, self._work(part), self._whole.head
        n = len(work)
        xhat1, partial, across = self._planes(n), self._partial(work, 2), self._partial(work, 1)
        along = {layer: v.new_empty(n, 8) for layer in self._hidden}
        pair = [self._plane(n), self._plane(n)]
        a1, gu1 = (self._planes(n) if theta else {k: pair[k % 2] for k in self._hidden} for _ in range(2))
        a, gu = (self._planes(n) if theta else {} for _ in range(2))
        # Zeros for images that are not at work.
        shape = (n * self._tiles, 3, self._CP)
        sums = {k: v.new_zeros(shape, dtype=torch.float64) for k in self._hidden} if theta else {}
        before = aligned(v)
        for layer in self._hidden:
            of, w = self._of_layer(layer, kept), self._filters[layer - 1]
            self._run(kernels.layer1, work, before=before, w=w, u1=xhat1[layer], partial=partial, ONE=layer == 1, **of)
            self._means(work, partial, along[layer], 0)
            of |= {"u1": xhat1[layer], "along": along[layer], "partial": across}
            self._run(kernels.activate1, work, a1=a1[layer], a=a.get(layer), **of)
            self._means(work, across, along[layer], 4)
            before = a1[layer]
        c1, direct = torch.empty_like(v), torch.empty_like(v)
        last = {"w": self._filters[-1], "bias": v.new_zeros(1), **self._head}
        self._run(head, work, a=before, pixels=v, cotangent=c1, direct=direct, partial=across, **last)
        above = c1
        for layer in reversed(self._hidden):
            of, w = self._of_layer(layer, kept), self._filters[layer]
            of |= {"xhat1": xhat1[layer], "cn1": gu1[layer]}
            self._run(kernels.above1, work, cotangent1=above, w=w, partial=partial, ONE=layer == self._K, **of)
            self._means(work, partial, along[layer], 2)
            self._run(kernels.below1, work, along=along[layer], gu=gu.get(layer), sums=sums.get(layer), **of)
            above = gu1[layer]
        return _Tangent(c1, direct, a1, gu1, a, gu, sums)

    def product(self, kept: SavedActivations, v: Tensor) -> Tensor:
        """`hess r v`."""
        out, v = torch.empty_like(self._u), v.view(self._u.shape)
        for part in self._slices():
            _, work = self._work(part)
            with self._needing(len(work), self._K + 2, "A product with the Hessian"):
                t = self._along(part, cast(ImageNormActivations, kept).of(part), v[part], False)
                given = {"gu": t.gu1[1], "w": self._filters[0], "direct": t.direct, "out": out[part]}
                self._run(self._whole.join, work, **given)
        return out.view(self._shape)

    def parameters(self, kept: SavedActivations, v: Tensor) -> list[Tensor]:
        """`sum_b d/dtheta <grad r, v>`, float64: weight and bias of each convolution, then of each LayerNorm."""
        v, found = v.view(self._u.shape), self._no_sums()
        for part in self._slices():
            with self._needing(part.stop - part.start, 5 * self._K + 2, "A parameter product"):
                for total, one in zip(
                    found, self._sums(part, cast(ImageNormActivations, kept).of(part), v[part]), strict=True
                ):
                    total += one
        filters, sums = found[: self._K + 1], found[self._K + 1 : -1]
        norms = [s[i, : self._C] for s in sums for i in (1, 2)]
        return self._as_parameters(filters, sums, found[-1]) + norms

    def _no_sums(self) -> list[Tensor]:
        CP, new = self._CP, {"dtype": torch.float64, "device": self._u.device}
        filters = [torch.zeros((9, CP, CP) if 0 < i < self._K else (9, CP), **new) for i in range(self._K + 1)]
        return [*filters, *(torch.zeros(3, CP, **new) for _ in self._hidden), torch.zeros((), **new)]

    def _sums(self, part: slice, kept: ImageNormActivations, v: Tensor) -> list[Tensor]:
        """The gradients of the filters as the kernels have them, of the layers' bias, gamma, beta, of the last bias."""
        from ...kernels.conv_chain import weight_gradients  # pyright: ignore[reportMissingImports]

        (rows, _), u, K, t = self._work(part), self._u[part], self._K, self._along(part, kept, v, True)
        filters = [weight_gradients.image_filters(u, t.gu1[1], rows, (v, t.gu[1]))]
        for layer in range(2, K + 1):
            filters.append(weight_gradients.filters(t.a[layer - 1], t.gu1[layer], rows, (t.a1[layer - 1], t.gu[layer])))
        filters.append(weight_gradients.image_filters(t.c1, t.a[K], rows, (kept.c, t.a1[K])).flip(0))
        last_bias = _over_rows(t.c1, rows).sum(dtype=torch.float64)
        return [*filters, *(t.sums[layer].sum(0) for layer in self._hidden), last_bias]
