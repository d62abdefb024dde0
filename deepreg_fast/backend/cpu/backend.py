"""The C++ backend: the extension built from `csrc/cpu`, for float32 tensors on the CPU.

It implements the sweeps of the conv chain, the ridge energy and smoothed TV (value, gradient, Hessian-vector and
parameter product), the SRM's and tomography's products and the solvers' vector work; see docs/kernels.md.
"""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import nn

from ...functional import hadamard
from ...functional.conv_chain import HEADS, ChannelNorm, ConvChainForm, layers_of
from ...functional.tomography import Geometry
from ...functional.tv import eps_of
from ...functional.unaltered import dtype_or_device_mismatch
from ..reference import Gradients, Linearization, describe_energy, srm_key, unsupported_norm_position
from . import ridge as cpu_ridge
from . import tomography as cpu_tomography
from . import tv as cpu_tv
from .extension import extension as _extension
from .extension import instruction_set, plain
from .linearization import CpuLinearization, gradient, sizes
from .vectors import CpuVectors

if TYPE_CHECKING:
    from ..._cpu import ConvChain

_MAX_DEPTH = 16


class ConvChainLinearization(CpuLinearization):
    """The Hessian at a point: SiLU's inputs and the cotangents of its outputs at the hidden pixels, in float32, except
    those that a one-channel convolution recomputes (docs/kernels.md).

    Memory: 5.1 MB for a 180 x 180 image of the 3-layer network with 16 channels and LayerNorm.
    """

    def __init__(self, energy: nn.Module, form: ConvChainForm, x: torch.Tensor) -> None:
        self._tensors = [p for m in (*_convs(form), *_norms(form)) for p in (m.weight, cast(torch.Tensor, m.bias))]
        self._last, self._gain = 2 * len(_convs(form)) - 2, float(form.net.gain)
        self._centered = form.net.norm == "pixel"
        self._gradients = Gradients(energy, self._tensors)
        kernels = _chain(form)
        params = [p for p in energy.parameters() if p.requires_grad]
        super().__init__(x, kernels, kernels.saved_floats(*sizes(x)[:3]), params)

    def _product(self, v: torch.Tensor, out: torch.Tensor) -> None:
        self._kernels.hvp(self.x, v, self._memory, out, *sizes(v))

    def param_vjp(self, v: torch.Tensor) -> dict[str, torch.Tensor]:
        """`sum_b d/dtheta <grad r(x_b), v_b>`, by parameter name."""
        v = self._check(v)
        lengths = [p.numel() for p in self._tensors]
        flat = v.new_empty(sum(lengths), dtype=torch.float64)
        self._kernels.param_vjp(self.x, v, self._memory, flat, *sizes(v))
        parts = [t.view(p.shape) for p, t in zip(self._tensors, flat.split(lengths), strict=True)]
        # The gain is folded into the outer filters: h(u) = net(gain u) / gain.
        parts[0] *= self._gain
        parts[self._last] /= self._gain
        parts[self._last + 1] /= self._gain
        if self._centered:
            # The kernels' filters are centered over their outputs (csrc/cpu/conv.h); this is the chain rule through it.
            for part in parts[: self._last]:
                part -= part.mean(0, keepdim=True)
        return self._gradients.by_name(parts)


def _form(energy: Any) -> ConvChainForm:
    """The form of an energy that `unsupported_reason` accepted."""
    return getattr(energy, "unchecked_form", energy.conv_chain_form)()


def _convs(form: ConvChainForm) -> list[nn.Conv2d]:
    return cast("list[nn.Conv2d]", list(form.net.convs))


def _norms(form: ConvChainForm) -> list[ChannelNorm]:
    return cast("list[ChannelNorm]", list(form.net.norms)) if form.net.norm != "none" else []


_PACKED: WeakKeyDictionary[nn.Module, tuple[Any, ConvChain]] = WeakKeyDictionary()


def _chain(form: ConvChainForm) -> ConvChain:
    """The chain with packed filters. They are packed again only if a comparison shows that a value has changed."""
    extension, _ = _extension()
    assert extension is not None
    convs, norms = _convs(form), _norms(form)
    tensors = [
        [plain(cast(torch.Tensor, p)) for p in parameters]
        for parameters in (
            [c.weight for c in convs],
            [c.bias for c in convs],
            [n.weight for n in norms],
            [n.bias for n in norms],
        )
    ]
    settings = (
        convs[0].out_channels,
        HEADS.index(form.head),
        float(form.alpha),
        float(form.center),
        float(form.net.gain),
        float(norms[0].eps) if norms else 0.0,
        form.net.norm == "image",
        instruction_set(),
    )
    cached = _PACKED.get(form.net)
    if cached is None or cached[0] != (len(convs), settings) or not cached[1].current(*tensors):
        cached = ((len(convs), settings), extension.ConvChain(*tensors, *settings))
        _PACKED[form.net] = cached
    return cached[1]


_TRANSFORMS = ("dct", "hadamard", "walsh")
_SRMS: WeakKeyDictionary[nn.Module, tuple[Any, CpuSrm | None]] = WeakKeyDictionary()


class CpuSrm:
    """The C++ kernels of one SRM, with copies of its buffers.

    Raises
    ------
    ValueError, IndexError
        If the kernels do not cover the buffers.
    """

    def __init__(self, A: Any, isa: str) -> None:
        extension, _ = _extension()
        assert extension is not None
        self._shape, self._measurements = A.image_shape, A.measurements
        matrices = [
            torch.from_numpy(hadamard.hadamard(n).astype("int8")) if A.transform == "hadamard" else None
            for n in A.image_shape[1:]
        ]
        self._kernels = extension.Srm(
            _TRANSFORMS.index(A.transform),
            *A.image_shape,
            A.block or 0,
            A.measurements,
            A.rows,
            A.signs,
            A.perm,
            *matrices,
            isa,
        )

    def current(self, A: Any) -> bool:
        """Whether the operator's buffers equal the copies, by comparison of all values."""
        try:
            return self._kernels.current(A.rows, A.signs, A.perm)
        except ValueError:
            return False

    def _apply(
        self, product: int, x: torch.Tensor | None, y: torch.Tensor | None, weight: float | torch.Tensor = 0.0
    ) -> torch.Tensor:
        like = cast(torch.Tensor, y if x is None else x)
        scalar, weights = (0.0, weight.to(like)) if isinstance(weight, torch.Tensor) else (weight, None)
        x, y, weights = (None if t is None else plain(t) for t in (x, y, weights))
        count = len(like)
        out = like.new_empty((count, self._measurements) if product == 0 else (count, *self._shape))
        self._kernels.apply(product, count, torch.get_num_threads(), x, y, weights, scalar, out)
        return out

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`A x`."""
        return self._apply(0, x, None)

    def adjoint(self, y: torch.Tensor) -> torch.Tensor:
        """`A^T y`."""
        return self._apply(1, None, y)

    def normal(self, x: torch.Tensor) -> torch.Tensor:
        """`A^T A x`."""
        return self._apply(2, x, None)

    def correct(self, x: torch.Tensor, y: torch.Tensor, weight: float | torch.Tensor) -> torch.Tensor:
        """`x_b + weight_b A^T (y_b - A x_b)`, `weight` `[B]` or a number."""
        return self._apply(3, x, y, weight)


_VECTORS: dict[str, CpuVectors] = {}


class CpuBackend:
    """Value and derivatives of the conv chain, the ridge energy and TV in C++."""

    name = "cpu"
    batch_invariant = True

    def unavailable(self) -> str | None:
        """None if the extension is built, otherwise the reason."""
        extension, reason = _extension()
        return reason if extension is None else None

    def unsupported_reason(self, energy: nn.Module, x: torch.Tensor) -> str | None:
        """None for a conv chain, a ridge energy or smoothed TV in float32 on the CPU that the kernels cover."""
        form: ConvChainForm | None = getattr(energy, "conv_chain_form", lambda: None)()
        ridge = cpu_ridge.form_of(energy)
        tv = eps_of(energy)
        if form is None and ridge is None and tv is None:
            reason = getattr(energy, "no_kernels", None)
            name = describe_energy(energy) + (f" ({reason})" if isinstance(reason, str) else "")
            return f"it has kernels for the conv chain (RED), Ridge and TV only, not for {name}."
        if x.device.type != "cpu" or x.dtype != torch.float32:
            return f"it takes float32 tensors on the CPU, not {x.dtype} on {x.device}."
        if tv is not None:
            return cpu_tv.unsupported_reason(x)
        if ridge is not None:
            return cpu_ridge.unsupported_reason(ridge, x)
        assert form is not None
        net = form.net
        if (reason := dtype_or_device_mismatch(x, *chain.from_iterable(layers_of(net)))) is not None:
            return reason
        if x.shape[1] != net.image_channels:
            return f"the images have {x.shape[1]} channels, but the network takes {net.image_channels}."
        if net.kernel_size != 3 or net.image_channels != 1 or len(net.convs) > _MAX_DEPTH:
            return (
                f"it has 3 x 3 filters, one image channel and depth up to {_MAX_DEPTH}; this is "
                f"{net.kernel_size} x {net.kernel_size}, {net.image_channels} and {len(net.convs)}."
            )
        if min(x.shape[-2:]) < 3:
            return "the images are smaller than a filter."
        return unsupported_norm_position(form)

    def srm(self, A: Any, like: torch.Tensor) -> CpuSrm | None:
        """The C++ products for float32 on the CPU."""
        if like.device.type != "cpu" or like.dtype != torch.float32:
            return None
        isa = instruction_set()
        kind = (isa, A.transform, A.block, A.image_shape, A.measurements)
        cached = _SRMS.get(A)
        if cached is not None and cached[0] == kind and cached[1] is not None and cached[1].current(A):
            return cached[1]
        # An SRM that the kernels do not cover is cached under this key until its buffers change.
        key = (isa, *srm_key(A))
        if cached is None or cached[1] is not None or cached[0] != key:
            try:
                cached = (kind, CpuSrm(A, isa))
            except (ValueError, IndexError):
                cached = (key, None)
            _SRMS[A] = cached
        return cached[1]

    def tomography(self, geometry: Geometry, like: torch.Tensor) -> cpu_tomography.CpuTomography | None:
        """The C++ projections for float32 on the CPU."""
        if like.device.type != "cpu" or like.dtype != torch.float32:
            return None
        return cpu_tomography.kernels(geometry, instruction_set())

    def vectors(self, like: torch.Tensor) -> CpuVectors | None:
        """The solvers' vector work for float32 on the CPU."""
        if like.device.type != "cpu" or like.dtype != torch.float32:
            return None
        isa = instruction_set()
        if isa not in _VECTORS:
            extension, _ = _extension()
            assert extension is not None
            _VECTORS[isa] = CpuVectors(extension.Vectors(isa))
        return _VECTORS[isa]

    def value_and_grad(self, energy: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`r(x_b)` and `grad r(x_b)` in one sweep."""
        if (ridge := cpu_ridge.form_of(energy)) is not None:
            return cpu_ridge.value_and_grad(ridge, x)
        if (eps := eps_of(energy)) is not None:
            return cpu_tv.value_and_grad(eps, x)
        return gradient(_chain(_form(energy)), plain(x))

    def linearize(self, energy: nn.Module, x: torch.Tensor) -> Linearization:
        """Save the activations that the Hessian at x needs."""
        if (ridge := cpu_ridge.form_of(energy)) is not None:
            return cpu_ridge.CpuRidgeLinearization(energy, ridge, x)
        if (eps := eps_of(energy)) is not None:
            return cpu_tv.CpuTvLinearization(eps, x)
        return ConvChainLinearization(energy, _form(energy), x)
