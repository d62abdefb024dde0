"""Peers: other implementations of the conv chain's energy, as a user would write them today."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F

from ..regularizers import RED

Images = torch.Tensor


class BestTorch(torch.nn.Module):
    """The energy in the fastest of the tried formulations in eager torch: channels last, fused LayerNorm, and one graph
    that is reused for all products."""

    def __init__(self, reg: RED) -> None:
        super().__init__()
        self.reg = reg

    def energy(self, x: Images) -> torch.Tensor:
        """`r(x_b)` of a RED head, without LayerNorm or with LayerNorm over channels."""
        reg, net = self.reg, self.reg.net
        u = x - reg.center
        a = (net.gain * u).contiguous(memory_format=torch.channels_last)
        for conv, norm in zip(net.convs[:-1], net.norms, strict=True):
            a = cast(torch.nn.Conv2d, conv)(a)
            if net.norm == "pixel":
                layer = cast(Any, norm)
                rows = a.permute(0, 2, 3, 1)
                rows = F.layer_norm(rows, rows.shape[-1:], layer.weight, layer.bias, layer.eps)
                a = rows.permute(0, 3, 1, 2)
            a = F.silu(a)
        h = net.convs[-1](a) / net.gain
        return (0.5 * reg.alpha * u.square() + 0.5 * u * (u - h)).flatten(1).sum(1)

    def forward(self, x: Images) -> torch.Tensor:
        """`r(x_b)`, so that `as_regularizer` accepts this module."""
        return self.energy(x)

    def grad(self, x: Images) -> Images:
        """`grad r`."""
        x = x.detach().requires_grad_()
        return torch.autograd.grad(self.energy(x).sum(), x)[0]

    def graph(self, x: Images) -> tuple[Images, Images]:
        """x and `grad r(x)`, connected by a graph."""
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            return x, torch.autograd.grad(self.energy(x).sum(), x, create_graph=True)[0]

    def products(self, x: Images) -> tuple[Callable[[Images], Images], Callable[[Images], list[Images]]]:
        """Hessian-vector and parameter products from one graph of the gradient."""
        x, grad = self.graph(x)
        params = [p for p in self.reg.parameters() if p.requires_grad]

        def hvp(v: Images) -> Images:
            return torch.autograd.grad(grad, x, v, retain_graph=True)[0]

        def theta(v: Images) -> list[Images]:
            # The bias of the last convolution does not enter some products of the RED head; its gradient is then zero.
            return list(torch.autograd.grad(grad, params, v, retain_graph=True, materialize_grads=True))

        return hvp, theta


def func_grad(reg: RED) -> Callable[[Images], Images]:
    """`torch.func.grad` of the package's definition of the energy."""
    return torch.func.grad(lambda x: reg.energy(x).sum())


def func_hvp(reg: RED, x: Images) -> Callable[[Images], Images]:
    """`torch.func.jvp` of `torch.func.grad`, the usual way to write the product."""
    grad = func_grad(reg)
    return lambda v: cast(Any, torch.func.jvp(grad, (x,), (v,)))[1]


def compiled_grad(reg: RED) -> Callable[[Images], Images]:
    """Autograd through `torch.compile` of the best formulation's energy."""
    energy = torch.compile(BestTorch(reg).energy)

    def grad(x: Images) -> Images:
        x = x.detach().requires_grad_()
        return torch.autograd.grad(energy(x).sum(), x)[0]

    return grad


def why_no_jax(device: torch.device) -> str | None:
    """None if JAX is installed and supports a device of that type, otherwise how to get it."""
    if importlib.util.find_spec("jax") is None:
        return "pip install 'deepreg-fast[bench]'"
    if device.type == "cuda":
        # Leave memory for the other candidates.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        try:
            cast(Any, importlib.import_module("jax")).devices("gpu")
        except Exception as error:  # a plugin for another CUDA version fails in many ways
            lines = str(error).splitlines() or [""]
            return f"JAX finds no GPU ({lines[0][:80]}); pip install 'jax[cuda13]'"
    return None


class Jax:
    """The same energy in JAX under jit, on JAX's first device, in true float32 (its default on a GPU is TF32).

    Each call blocks until its result is ready, because a device clock would not wait for it.
    """

    def __init__(self, reg: RED) -> None:
        jax = cast(Any, importlib.import_module("jax"))
        jnp = jax.numpy
        net = reg.net
        convs = [
            (_array(jnp, c.weight), _array(jnp, cast(torch.Tensor, c.bias)))
            for c in cast("list[torch.nn.Conv2d]", list(net.convs))
        ]
        norms = [
            (_array(jnp, n.weight), _array(jnp, n.bias))
            for n in cast("list[Any]", list(net.norms))
            if net.norm == "pixel"
        ]

        def conv(a: Any, w: Any, b: Any) -> Any:
            return (
                jax.lax.conv_general_dilated(
                    a,
                    w.transpose(2, 3, 1, 0),
                    (1, 1),
                    "SAME",
                    dimension_numbers=("NHWC", "HWIO", "NHWC"),
                    precision=jax.lax.Precision.HIGHEST,
                )
                + b
            )

        def energy(x: Any) -> Any:
            u = x - reg.center
            a = net.gain * u
            for k, (w, b) in enumerate(convs[:-1]):
                a = conv(a, w, b)
                if norms:
                    a = a - a.mean(-1, keepdims=True)
                    a = a / jnp.sqrt((a * a).mean(-1, keepdims=True) + reg.describe()["eps"])
                    a = a * norms[k][0] + norms[k][1]
                a = jax.nn.silu(a)
            h = conv(a, *convs[-1]) / net.gain
            return (0.5 * reg.alpha * u * u + 0.5 * u * (u - h)).sum()

        self._jax, self._jnp = jax, jnp
        self._grad = jax.jit(jax.grad(energy))

    def _in(self, x: Images) -> Any:
        return _array(self._jnp, x[:, 0, :, :, None])

    @staticmethod
    def out(y: Any) -> Images:
        """Back to `[B, 1, H, W]`."""
        import numpy as np

        return torch.from_numpy(np.array(y))[..., 0][:, None]

    def grad(self, x: Images) -> Callable[[], Any]:
        """A function that computes `grad r(x)`; the transfer is not timed."""
        x_jax = self._in(x)
        return lambda: self._grad(x_jax).block_until_ready()

    def hvp(self, x: Images, vs: list[Images]) -> Callable[[int], Any]:
        """A function that computes the product for each of `vs`, by `jax.linearize` at x under jit."""
        _, linear = self._jax.linearize(self._grad, self._in(x))
        product, vs_jax = self._jax.jit(linear), [self._in(v) for v in vs]
        return lambda k: product(vs_jax[k % len(vs_jax)]).block_until_ready()


def _array(jnp: Any, t: torch.Tensor) -> Any:
    return jnp.asarray(t.detach().cpu().numpy())
