"""The C++ backend: the extension built from `csrc/cpu`, for float32 tensors on the CPU.

It has the sweeps of the conv chain, the ridge energy and smoothed TV (value, gradient, Hessian-vector and parameter
product), the SRM's products and the solvers' vector work; docs/kernels.md says how.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import nn

from ..definitions import hadamard
from ..definitions.conv_chain import HEADS, ChannelNorm, ConvChainForm
from . import cpu_ridge, cpu_tv
from .cpu_vectors import CpuVectors
from .extension import borrow, give_back, instruction_set
from .extension import extension as _extension
from .reference import Linearization, Still, changes, norm_elsewhere

if TYPE_CHECKING:
    from .._cpu import ConvChain

_MAX_DEPTH = 16


class CpuLinearization:
    """The Hessian at a point: what enters SiLU and the cotangent above it at the hidden pixels, in float32, of those
    that a convolution of one channel does not make again (docs/kernels.md).

    Memory: 5.1 MB for a 180 x 180 image of the 3-layer network with 16 channels and LayerNorm.
    """

    def __init__(self, energy: nn.Module, form: ConvChainForm, x: torch.Tensor) -> None:
        self.x = x.detach().contiguous()
        self._form = form
        self._params = [p for p in energy.parameters() if p.requires_grad]
        self._still = Still(self._params)
        self._names = {id(p): n for n, p in energy.named_parameters()}
        self._chain = _chain(form)
        self._memory = borrow(self._chain.kept(*_size(x)[:3]))
        self.value, self.grad = _gradient(self._chain, self.x, self._memory.data_ptr())

    def __del__(self) -> None:
        memory = getattr(self, "_memory", None)
        if memory is not None:
            give_back(memory)

    def _check(self, v: torch.Tensor) -> torch.Tensor:
        self._still.check(v, self.x)
        return v.detach().contiguous()

    def hvp(self, v: torch.Tensor) -> torch.Tensor:
        """`hess r(x_b) v_b`."""
        v = self._check(v)
        out = torch.empty_like(v)
        self._chain.hvp(self.x.data_ptr(), v.data_ptr(), self._memory.data_ptr(), out.data_ptr(), *_size(v))
        return out

    def param_vjp(self, v: torch.Tensor) -> dict[str, torch.Tensor]:
        """`sum_b d/dtheta <grad r(x_b), v_b>`, by parameter name."""
        v = self._check(v)
        net, convs, norms = self._form.net, _convs(self._form), _norms(self._form)
        tensors = [cast(torch.Tensor, p) for m in (*convs, *norms) for p in (m.weight, m.bias)]
        flat = torch.empty(sum(p.numel() for p in tensors), dtype=torch.float64)
        self._chain.param_vjp(self.x.data_ptr(), v.data_ptr(), self._memory.data_ptr(), flat.data_ptr(), *_size(v))
        parts = [t.view(p.shape) for p, t in zip(tensors, flat.split([p.numel() for p in tensors]), strict=True)]
        # The gain is folded into the outer filters: h(u) = net(gain u) / gain.
        last = 2 * len(convs) - 2
        parts[0] *= net.gain
        parts[last] /= net.gain
        parts[last + 1] /= net.gain
        if net.norm == "pixel":
            # The kernels' filters are centred over their outputs (csrc/cpu/conv.h): the chain rule through that.
            for part in parts[:last]:
                part -= part.mean(0, keepdim=True)
        return {self._names[id(p)]: t.to(p.dtype) for p, t in zip(tensors, parts, strict=True) if p.requires_grad}


def _form(energy: Any) -> ConvChainForm:
    """The form of an energy that `why_not` let pass."""
    return energy.conv_chain_form()


def _size(x: torch.Tensor) -> tuple[int, int, int, int]:
    """Images, height, width, threads."""
    return x.shape[0], x.shape[2], x.shape[3], torch.get_num_threads()


def _convs(form: ConvChainForm) -> list[nn.Conv2d]:
    return cast("list[nn.Conv2d]", list(form.net.convs))


def _norms(form: ConvChainForm) -> list[ChannelNorm]:
    return cast("list[ChannelNorm]", list(form.net.norms)) if form.net.norm != "none" else []


_PACKED: WeakKeyDictionary[nn.Module, tuple[Any, ConvChain, list[torch.Tensor]]] = WeakKeyDictionary()


def _chain(form: ConvChainForm) -> ConvChain:
    """The chain with its filters packed: again only if a value has changed, which is looked at, not guessed."""
    extension, _ = _extension()
    assert extension is not None
    convs, norms = _convs(form), _norms(form)
    given = [
        [cast(torch.Tensor, p).detach().contiguous() for p in parameters]
        for parameters in (
            [c.weight for c in convs],
            [c.bias for c in convs],
            [n.weight for n in norms],
            [n.bias for n in norms],
        )
    ]
    # The tensors are kept with the chain, so that their addresses stay theirs.
    tensors = [t for group in given for t in group]
    arguments = (
        *([t.data_ptr() for t in group] for group in given),
        convs[0].out_channels,
        HEADS.index(form.head),
        form.alpha,
        form.center,
        form.net.gain,
        norms[0].eps if norms else 0.0,
        form.net.norm == "image",
        instruction_set(),
    )
    found = _PACKED.get(form.net)
    if found is None or found[0] != arguments or not found[1].current():
        found = (arguments, extension.ConvChain(*arguments), tensors)
        _PACKED[form.net] = found
    return found[1]


def _gradient(chain: ConvChain, x: torch.Tensor, kept: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    value = torch.empty(x.shape[0], dtype=torch.float64)
    grad = torch.empty_like(x)
    chain.gradient(x.data_ptr(), value.data_ptr(), grad.data_ptr(), kept, *_size(x))
    return value.to(x.dtype), grad


_TRANSFORMS = ("dct", "hadamard", "walsh")
_SRMS: WeakKeyDictionary[nn.Module, tuple[Any, CpuSrm]] = WeakKeyDictionary()


class CpuSrm:
    """The C++ kernels of one SRM; they hold copies of its buffers."""

    def __init__(self, A: Any, isa: str) -> None:
        extension, _ = _extension()
        assert extension is not None
        self._shape, self._measurements = A.image_shape, A.measurements
        matrices = [
            torch.from_numpy(hadamard.hadamard(n).astype("int8")) if A.transform == "hadamard" else None
            for n in A.image_shape[1:]
        ]
        address = [0 if t is None else t.contiguous().data_ptr() for t in (A.rows, A.signs, A.perm, *matrices)]
        self._kernels = extension.Srm(
            _TRANSFORMS.index(A.transform), *A.image_shape, A.block or 0, A.measurements, *address, isa
        )

    def _apply(
        self, product: int, x: torch.Tensor | None, y: torch.Tensor | None, weight: float | torch.Tensor = 0.0
    ) -> torch.Tensor:
        one, weights = (0.0, weight) if isinstance(weight, torch.Tensor) else (weight, None)
        given = [None if t is None else t.contiguous() for t in (x, y, weights)]
        count = cast(torch.Tensor, y if x is None else x).shape[0]
        out = torch.empty((count, self._measurements) if product == 0 else (count, *self._shape))
        address = [0 if t is None else t.data_ptr() for t in given]
        self._kernels.apply(product, count, torch.get_num_threads(), *address, one, out.data_ptr())
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
    """Value and derivatives of the conv chain, the ridge energy and TV in C++; the rest goes to the reference."""

    name = "cpu"
    batch_invariant = True

    def unavailable(self) -> str | None:
        """None if the extension is built, else the reason."""
        extension, reason = _extension()
        return reason if extension is None else None

    def why_not(self, energy: nn.Module, x: torch.Tensor) -> str | None:
        """None for a conv chain, a ridge energy or smoothed TV in float32 on the CPU that the kernels cover."""
        form: ConvChainForm | None = getattr(energy, "conv_chain_form", lambda: None)()
        ridge = cpu_ridge.form_of(energy)
        tv = cpu_tv.eps_of(energy)
        if form is None and ridge is None and tv is None:
            return f"it has kernels for the conv chain (RED), Ridge and TV only, not for {type(energy).__name__}."
        if x.device.type != "cpu" or x.dtype != torch.float32:
            return f"it takes float32 tensors on the CPU, not {x.dtype} on {x.device}."
        if tv is not None:
            return None
        if ridge is not None:
            return cpu_ridge.why_not(ridge, x)
        assert form is not None
        net = form.net
        if net.kernel_size != 3 or net.image_channels != 1 or len(net.convs) > _MAX_DEPTH:
            return (
                f"it has 3 x 3 filters, one image channel and depth up to {_MAX_DEPTH}; this is "
                f"{net.kernel_size} x {net.kernel_size}, {net.image_channels} and {len(net.convs)}."
            )
        if min(x.shape[-2:]) < 3:
            return "the images are smaller than a filter."
        return norm_elsewhere(form)

    def srm(self, A: nn.Module, like: torch.Tensor) -> CpuSrm | None:
        """The C++ products for float32 on the CPU."""
        if like.device.type != "cpu" or like.dtype != torch.float32:
            return None
        isa = instruction_set()
        key = (isa, *[(t.data_ptr(), changes(t)) for t in A._buffers.values() if t is not None])
        found = _SRMS.get(A)
        if found is None or found[0] != key:
            found = (key, CpuSrm(A, isa))
            _SRMS[A] = found
        return found[1]

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
        if (eps := cpu_tv.eps_of(energy)) is not None:
            return cpu_tv.value_and_grad(eps, x)
        return _gradient(_chain(_form(energy)), x.detach().contiguous())

    def linearize(self, energy: nn.Module, x: torch.Tensor) -> Linearization:
        """Keeps what the Hessian at x needs."""
        if (ridge := cpu_ridge.form_of(energy)) is not None:
            return cpu_ridge.CpuRidgeLinearization(energy, ridge, x)
        if (eps := cpu_tv.eps_of(energy)) is not None:
            return cpu_tv.CpuTvLinearization(eps, x)
        return CpuLinearization(energy, _form(energy), x)
