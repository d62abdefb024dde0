"""Kernels serve a network only where they compute what its modules do: any change to it reaches both backends alike."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils import spectral_norm as old_spectral_norm
from torch.nn.utils import weight_norm as old_weight_norm

import deepreg_fast as dr
from deepreg_fast.backend import select
from deepreg_fast.errors import InputError
from deepreg_fast.functional.conv_chain import ChannelNorm, ConvChain
from deepreg_fast.inverse.adjoint import adjoint_named
from deepreg_fast.regularizers.base import Regularizer

from .helpers import images, random_red, relative

pytestmark = pytest.mark.skipif(
    dr.backends()["cpu"] is not None, reason=f"the C++ extension is not built: {dr.backends()['cpu']}"
)
X = images(2, 1, 9, 8, dtype=torch.float32)
V = images(2, 1, 9, 8, seed=1, dtype=torch.float32) - 0.5


def answers(reg: Regularizer, backend: str, x: torch.Tensor = X, v: torch.Tensor = V) -> dict[str, torch.Tensor]:
    with dr.use_backend(backend):
        value, grad = reg.value_and_grad(x)
        lin = reg.linearize(x)
        return {"value": value, "grad": grad, "hvp": lin.hvp(v)} | lin.param_vjp(v)


def alike(reg: Regularizer) -> None:
    """The kernels refuse, or answer as the definition does, for the same parameters."""
    try:
        wanted = answers(copy.deepcopy(reg).double(), "reference", X.double(), V.double())
    except RuntimeError:
        # Hooks of torch keep tensors with graphs, which cannot be copied.
        wanted = {k: t.double() for k, t in answers(reg, "reference").items()}
    auto = answers(reg, "auto")
    assert wanted.keys() == auto.keys()
    for name, t in auto.items():
        # Of float32 sums: far above rounding, far below any change of the network.
        assert relative(t.double(), wanted[name]) < 1e-4, name


def layer(reg: Regularizer) -> nn.Conv2d:
    net: Any = reg.net
    return net.convs[1]


def hook_output(reg: Regularizer) -> None:
    layer(reg).register_forward_hook(lambda m, inputs, output: 1.5 * output)


def hook_input(reg: Regularizer) -> None:
    layer(reg).register_forward_pre_hook(lambda m, inputs: (0.5 * inputs[0],))


def hook_net(reg: Any) -> None:
    reg.net.register_forward_hook(lambda m, inputs, output: -output)


def hook_all(reg: Any) -> None:
    def hook(m: nn.Module, inputs: Any, output: torch.Tensor) -> Any:
        return 2.0 * output if isinstance(m, nn.Conv2d) else None

    reg.handle = nn.modules.module.register_module_forward_hook(hook)


def replace(**options: Any) -> Callable[[Any], None]:
    def change(reg: Any) -> None:
        channels = reg.net.convs[1].in_channels
        torch.manual_seed(0)
        reg.net.convs[1] = nn.Conv2d(channels, channels, **{"kernel_size": 3, "padding": 1, **options})

    return change


class Doubled(nn.Conv2d):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2.0 * super().forward(input)


class Wider(ConvChain):
    def forward(self, u: torch.Tensor) -> torch.Tensor:
        return super().forward(u) + 0.1 * u


def subclass_layer(reg: Any) -> None:
    c = reg.net.convs[1]
    new = Doubled(c.in_channels, c.out_channels, 3, padding=1)
    new.load_state_dict(c.state_dict())
    reg.net.convs[1] = new


def subclass_net(reg: Any) -> None:
    new = Wider(3, 4, reg.net.norm, gain=2.0)
    new.load_state_dict(reg.net.state_dict())
    reg.net = new


def attribute(**tensor_version: Any) -> Callable[[Any], None]:
    def change(reg: Any) -> None:
        for name, value in tensor_version.items():
            *path, last = name.split("__")
            at = reg
            for part in path:
                at = at[int(part)] if part.isdigit() else getattr(at, part)
            setattr(at, last, value)

    return change


def tie(reg: Any) -> None:
    reg.net.convs[2].weight = reg.net.convs[1].weight
    reg.net.convs[2].bias = reg.net.convs[1].bias


def untrained_layer(reg: Any) -> None:
    layer(reg).weight.requires_grad_(False)
    reg.net.convs[0].bias.requires_grad_(False)


def strided(reg: Any) -> None:
    c = layer(reg)
    c.weight = nn.Parameter(c.weight.detach().transpose(0, 1))


def without_bias(reg: Any) -> None:
    layer(reg).bias = None


def by_data(reg: Any) -> None:
    reg.value_and_grad(X)
    layer(reg).weight.data.mul_(1.5)
    layer(reg).weight.data = layer(reg).weight.data + 0.1


def further_parameter(reg: Any) -> None:
    reg.more = nn.Parameter(torch.ones(2))


def activation(reg: Any) -> None:
    net = reg.net
    net.forward = lambda u: net.convs[2](torch.tanh(net.convs[0](net.gain * u))) / net.gain


class Half(nn.Module):
    def forward(self, w: torch.Tensor) -> torch.Tensor:
        return 0.5 * w


def own_energy(reg: Any) -> None:
    class Steeper(type(reg)):  # type: ignore[misc]
        def energy(self, x: torch.Tensor) -> torch.Tensor:
            return 3.0 * super().energy(x)

    reg.__class__ = Steeper


MUTATIONS: dict[str, Callable[[Any], object]] = {
    "none": lambda reg: None,
    "output hook": hook_output,
    "input hook": hook_input,
    "hook of the network": hook_net,
    "hook of all modules": hook_all,
    "weight_norm": lambda reg: parametrizations.weight_norm(layer(reg)),
    "spectral_norm": lambda reg: parametrizations.spectral_norm(layer(reg)).eval(),
    "parametrization": lambda reg: parametrize.register_parametrization(layer(reg), "weight", Half()),
    "old weight_norm": lambda reg: old_weight_norm(layer(reg)),
    "old spectral_norm": lambda reg: old_spectral_norm(layer(reg)).eval(),
    "prune": lambda reg: prune.l1_unstructured(layer(reg), "weight", 0.5),
    "dilation": replace(dilation=2, padding=2),
    "padding mode": replace(padding_mode="reflect"),
    "circular": replace(padding_mode="circular"),
    "groups": replace(groups=3),
    "other size": replace(kernel_size=5, padding=2),
    "one by one": replace(kernel_size=1, padding=0),
    "no bias": replace(bias=False),
    "bias removed": without_bias,
    "layer of a subclass": subclass_layer,
    "network of a subclass": subclass_net,
    "energy of a subclass": own_energy,
    "alpha": attribute(alpha=0.7),
    "center": attribute(center=0.25),
    "head": attribute(head="residual"),
    "gain": attribute(net__gain=3.0),
    "gain as a parameter": lambda reg: (
        delattr(reg.net, "gain"),
        setattr(reg.net, "gain", nn.Parameter(torch.tensor(3.0))),
    ),
    "alpha as a tensor": attribute(alpha=torch.tensor(0.7)),
    "padding changed": attribute(net__convs__1__padding=(2, 2), net__convs__1__dilation=(2, 2)),
    "tied": tie,
    "frozen": untrained_layer,
    "strided": strided,
    "data": by_data,
    "a further parameter": further_parameter,
    "activation": activation,
    "energy of its own": lambda reg: setattr(reg, "energy", lambda x: x.square().flatten(1).sum(1)),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_changed_network_is_what_both_backends_compute(mutation: str) -> None:
    # Four convolutions, so that inner ones can be tied.
    reg = random_red(double=False, depth=4, scale=0.3)
    with torch.no_grad():
        before = answers(reg, "cpu")["grad"]
    MUTATIONS[mutation](reg)
    try:
        alike(reg)
        changed = not torch.equal(answers(reg, "auto")["grad"], before)
    finally:
        if hasattr(reg, "handle"):
            reg.handle.remove()  # type: ignore[operator, union-attr]
    same = ("none", "weight_norm", "old weight_norm", "frozen", "a further parameter")
    assert changed == (mutation not in same) or mutation in ("weight_norm", "old weight_norm")


NORM_MUTATIONS: dict[str, Callable[[Any], object]] = {
    "eps of one": attribute(net__norms__1__eps=0.3),
    "dims of one": attribute(net__norms__0__dims=(1, 2, 3)),
    "another norm": lambda reg: reg.net.norms.__setitem__(0, nn.GroupNorm(1, 3)),
    "norm hook": lambda reg: reg.net.norms[1].register_forward_hook(lambda m, i, o: 0.5 * o),
    "place": attribute(net__norm_place="after"),
    "tied norms": lambda reg: reg.net.norms.__setitem__(1, reg.net.norms[0]),
    "norm of a subclass": lambda reg: setattr(reg.net.norms[0], "__class__", type("Other", (ChannelNorm,), {})),
}


@pytest.mark.parametrize("mutation", NORM_MUTATIONS)
@pytest.mark.parametrize("norm", ["pixel", "image"])
def test_a_changed_norm_is_what_both_backends_compute(norm: str, mutation: str) -> None:
    reg = random_red(double=False, depth=4, norm=norm)
    before = answers(reg, "cpu")["grad"]
    NORM_MUTATIONS[mutation](reg)
    alike(reg)
    same = mutation == "norm of a subclass" or (mutation, norm) == ("dims of one", "image")
    assert same or not torch.equal(answers(reg, "auto")["grad"], before)


RIDGE_MUTATIONS: dict[str, Callable[[Any], object]] = {
    "none": lambda reg: None,
    "convex": attribute(net__convex=False),
    "zero_mean": attribute(net__zero_mean=False),
    "scales": attribute(net__scales=(2.0, 9.0)),
    "center": attribute(center=0.25),
    "parametrization": lambda reg: parametrize.register_parametrization(reg.net, "filters", Half()),
    "prune": lambda reg: prune.l1_unstructured(reg.net, "filters", 0.5),
    "numbers": lambda reg: setattr(reg.net, "numbers", lambda: (0.5 * reg.net.filters, 0.1 + 0.0 * reg.net.raw)),
    "data": lambda reg: (reg.value_and_grad(X), reg.net.raw.data.add_(0.5)),
    "energy of a subclass": own_energy,
    "frozen": lambda reg: reg.net.raw.requires_grad_(False),
    "one set of steps": lambda reg: setattr(reg.net, "raw", nn.Parameter(reg.net.raw.detach()[:1])),
    "further parameter": further_parameter,
}


@pytest.mark.parametrize("mutation", RIDGE_MUTATIONS)
def test_a_changed_ridge_is_what_both_backends_compute(mutation: str) -> None:
    reg = dr.Ridge(3, 5, 2)
    RIDGE_MUTATIONS[mutation](reg)
    alike(reg)


@pytest.mark.parametrize("make", [lambda: random_red(double=False), lambda: dr.Ridge(2, 3), lambda: dr.ICNN(2, 2)])
def test_images_of_another_kind_are_refused(make: Callable[[], Regularizer]) -> None:
    reg = make()
    x = torch.rand(2, 3, 9, 8)
    for call in (
        lambda: reg.value_and_grad(x),
        lambda: reg.linearize(x),
        lambda: reg.energy(x),
        lambda: dr.ops.value_and_grad(reg, x),
        lambda: reg.value_and_grad(X.to_sparse()),
    ):
        with pytest.raises(InputError, match=r"channel|grey images|tensor \[B, C, H, W\]"):
            call()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_parameters_of_several_dtypes_are_refused(dtype: torch.dtype) -> None:
    reg = random_red(double=False)
    last: Any = reg.net.convs[-1]
    last.to(dtype)
    with pytest.raises(InputError, match="one dtype"):
        reg.value_and_grad(X)
    assert select(reg, X).name == "reference"


def test_images_in_other_memory_are_read_as_they_are() -> None:
    reg = random_red(double=False)
    value, grad = reg.value_and_grad(X)
    wide = torch.empty(2, 1, 9, 16)
    wide[..., ::2] = X
    for x in (wide[..., ::2], X.expand(3, -1, -1, -1, -1)[1], torch._neg_view(-X), nn.Parameter(X)):
        found = reg.value_and_grad(x)
        assert torch.equal(found[0], value) and torch.equal(found[1], grad)
        lin = reg.linearize(x)
        assert torch.equal(lin.hvp(torch._neg_view(-V)), lin.hvp(V))


def test_shared_parts_have_summed_gradients() -> None:
    reg = random_red(double=False)
    alone, twice = answers(reg, "cpu"), answers(dr.Sum([reg, reg]), "auto")
    assert {k.removeprefix("parts.0.") for k in twice} == set(alone)
    for k, t in alone.items():
        found = twice[k] if k in twice else twice[f"parts.0.{k}"]
        torch.testing.assert_close(found, 2 * t)


@pytest.mark.parametrize("method", ["cg", "unrolled"])
@pytest.mark.parametrize("mutation", ["weight_norm", "spectral_norm", "old weight_norm", "prune", "tied", "frozen"])
def test_hypergradients_of_changed_networks(mutation: str, method: str) -> None:
    reg, A = random_red(double=False, alpha=1.0, depth=4), dr.SRM((1, 9, 8), 0.5)
    MUTATIONS[mutation](reg)
    adjoint = adjoint_named(method, steps=3)
    found, wanted = [], []
    for backend, to in (("auto", found), ("reference", wanted)):
        with dr.use_backend(backend):
            to.append(dr.hypergradient(X, A.A(X), A, reg, mu=1e-2, options=dr.PGDOptions(20), adjoint=adjoint).theta)
    names = [n for n, p in reg.named_parameters() if p.requires_grad]
    assert list(found[0]) == list(wanted[0]) == names
    for n in names:
        assert relative(found[0][n], wanted[0][n]) < 1e-2, n


def test_hypergradient_without_parameters() -> None:
    A = dr.SRM((1, 9, 8), 0.5)
    found = dr.hypergradient(X, A.A(X), A, dr.TV(), mu=1e-2, adjoint=dr.Unrolled(2))
    assert found.theta == {} and bool(torch.isfinite(found.log_mu))


def test_a_compiled_regularizer_is_the_one_that_was_compiled() -> None:
    reg, A = random_red(double=False, alpha=1.0), dr.SRM((1, 9, 8), 0.5)
    compiled: Any = torch.compile(reg, backend="eager")
    found = dr.hypergradient(X, A.A(X), A, compiled, mu=1e-2)
    wanted = dr.hypergradient(X, A.A(X), A, reg, mu=1e-2)
    assert found.theta.keys() == wanted.theta.keys() and torch.equal(found.solution.x, wanted.solution.x)


@pytest.mark.parametrize("method", ["cg", "unrolled"])
def test_a_compiled_module_is_differentiated_twice(method: str) -> None:
    class Energy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 2, 3, padding=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.softplus(self.conv(x)).square().flatten(1).sum(1)

    module, A = Energy(), dr.SRM((1, 9, 8), 0.5)
    adjoint = adjoint_named(method, steps=2)
    options = dr.PGDOptions(3)
    wanted = dr.hypergradient(X, A.A(X), A, module, mu=1e-2, options=options, adjoint=adjoint).theta
    module.conv = torch.compile(module.conv, backend="aot_eager")  # type: ignore[assignment]
    found = dr.hypergradient(X, A.A(X), A, module, mu=1e-2, options=options, adjoint=adjoint).theta
    for (_, a), (_, b) in zip(sorted(found.items()), sorted(wanted.items()), strict=True):
        torch.testing.assert_close(a, b)
