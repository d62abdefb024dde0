"""How a user would compute the same today: each peer is the conv chain's energy in its own words."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F

from ..regularizers import RED

Images = torch.Tensor


class BestTorch(torch.nn.Module):
    """The energy in the formulation that was the fastest of those tried in eager torch: channels last, fused
    LayerNorm; its graph kept and reused for products."""

    def __init__(self, reg: RED) -> None:
        super().__init__()
        self.reg = reg

    def energy(self, x: Images) -> torch.Tensor:
        """`r(x_b)` of a RED head without LayerNorm or with one over channels."""
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
        """`r(x_b)`: a module that `as_regularizer` takes."""
        return self.energy(x)

    def grad(self, x: Images) -> Images:
        """`grad r`."""
        x = x.detach().requires_grad_()
        return torch.autograd.grad(self.energy(x).sum(), x)[0]

    def products(self, x: Images) -> tuple[Callable[[Images], Images], Callable[[Images], list[Images]]]:
        """Hessian-vector and parameter products from one graph of the gradient."""
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            grad = torch.autograd.grad(self.energy(x).sum(), x, create_graph=True)[0]
        params = [p for p in self.reg.parameters() if p.requires_grad]

        def hvp(v: Images) -> Images:
            return torch.autograd.grad(grad, x, v, retain_graph=True)[0]

        def theta(v: Images) -> list[Images]:
            # A bias of the last convolution of the RED head has no part in some products; then it is zero.
            return list(torch.autograd.grad(grad, params, v, retain_graph=True, materialize_grads=True))

        return hvp, theta


def func_grad(reg: RED) -> Callable[[Images], Images]:
    """`torch.func.grad` of the energy as the package defines it."""
    return torch.func.grad(lambda x: reg.energy(x).sum())


def func_hvp(reg: RED, x: Images) -> Callable[[Images], Images]:
    """`torch.func.jvp` of `torch.func.grad`, the product as it is usually written."""
    grad = func_grad(reg)
    return lambda v: cast(Any, torch.func.jvp(grad, (x,), (v,)))[1]


def compiled_grad(reg: RED) -> Callable[[Images], Images]:
    """`torch.compile` of the best formulation's energy, then autograd."""
    energy = torch.compile(BestTorch(reg).energy)

    def grad(x: Images) -> Images:
        x = x.detach().requires_grad_()
        return torch.autograd.grad(energy(x).sum(), x)[0]

    return grad


def jax_available() -> bool:
    """Whether JAX can be imported."""
    return importlib.util.find_spec("jax") is not None


class Jax:
    """The same energy in JAX on the CPU, under jit."""

    def __init__(self, reg: RED) -> None:
        jax = cast(Any, importlib.import_module("jax"))
        jnp = jax.numpy
        net = reg.net
        convs = [
            (jnp.asarray(c.weight.detach().numpy()), jnp.asarray(cast(torch.Tensor, c.bias).detach().numpy()))
            for c in cast("list[torch.nn.Conv2d]", list(net.convs))
        ]
        norms = [
            (jnp.asarray(n.weight.detach().numpy()), jnp.asarray(n.bias.detach().numpy()))
            for n in cast("list[Any]", list(net.norms))
            if net.norm == "pixel"
        ]

        def conv(a: Any, w: Any, b: Any) -> Any:
            return (
                jax.lax.conv_general_dilated(
                    a, w.transpose(2, 3, 1, 0), (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
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
        return self._jnp.asarray(x[:, 0, :, :, None].numpy())

    @staticmethod
    def out(y: Any) -> Images:
        """Back to `[B, 1, H, W]`."""
        import numpy as np

        return torch.from_numpy(np.array(y))[..., 0][:, None]

    def grad(self, x: Images) -> Callable[[], Any]:
        """`grad r(x)`, ready to run; the transfer is not timed."""
        given = self._in(x)
        return lambda: self._grad(given).block_until_ready()

    def hvp(self, x: Images, vs: list[Images]) -> Callable[[int], Any]:
        """`jax.linearize` at x under jit, for each of `vs`."""
        _, linear = self._jax.linearize(self._grad, self._in(x))
        product, given = self._jax.jit(linear), [self._in(v) for v in vs]
        return lambda k: product(given[k % len(given)]).block_until_ready()
