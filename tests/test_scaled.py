"""A regularizer at another contrast."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import deepreg_fast as dr
from deepreg_fast.regularizers import Scaled

from .helpers import images, normal, random_red, relative


class Curved(dr.RED):
    """A subclass that computes something else."""

    def energy(self, x: torch.Tensor) -> torch.Tensor:
        """`r(x) + sum u^4`."""
        return super().energy(x) + (x - self.center).pow(4).flatten(1).sum(1)


CASES = {
    **{
        f"red-{h}-{n}": (lambda h=h, n=n: random_red(head=h, norm=n))
        for h in ("red", "norm")
        for n in ("none", "image")
    },
    "residual": lambda: random_red(head="residual", alpha=0.3),
    "icnn": lambda: dr.ICNN(channels=3, depth=2).double(),
}


@pytest.mark.parametrize("name", CASES)
def test_a_gain_is_a_scale(name: str) -> None:
    """`rescaled` of a network with a gain is what the wrapper computes."""
    reg = CASES[name]()
    x, v = images(2, 1, 8, 7), normal(2, 1, 8, 7)
    fused, wrapped = reg.rescaled(1.6).linearize(x), Scaled(reg, 1.6).linearize(x)
    assert type(reg.rescaled(1.6)) is type(reg)
    assert reg.rescaled(1.6).describe()["gain"] == pytest.approx(1.6 * reg.describe()["gain"])
    assert relative(fused.value, wrapped.value) <= 1e-12
    assert relative(fused.grad, wrapped.grad) <= 1e-12
    assert relative(fused.hvp(v), wrapped.hvp(v)) <= 1e-12
    for k, g in fused.param_vjp(v).items():
        assert relative(wrapped.param_vjp(v)[f"reg.{k}"], g) <= 1e-10


def test_a_denoiser_is_rescaled_as_a_field() -> None:
    reg = dr.DenoiserField(channels=3, gain=2.0).double()
    with torch.no_grad():
        reg.net.convs[-1].weight.add_(0.3)
    x = images(2, 1, 8, 7)
    inner = reg.center + 1.6 * (x - reg.center)
    assert relative(reg.rescaled(1.6).value_and_grad(x)[1], reg.value_and_grad(inner)[1] / 1.6) <= 1e-12


def test_what_has_no_gain_is_wrapped() -> None:
    tv, other = dr.TV(0.05), Curved(channels=3, depth=2).double()
    x = images(1, 1, 6, 6)
    for reg in (tv, other):
        wrapped = reg.rescaled(1.5)
        assert isinstance(wrapped, Scaled)
        with torch.no_grad():
            assert relative(wrapped.energy(x), reg.energy(0.5 + 1.5 * (x - 0.5)) / 1.5**2) <= 1e-14
        assert reg.rescaled(1.0) is reg
    twice = tv.rescaled(1.5).rescaled(2.0)
    assert isinstance(twice, Scaled) and twice.reg is tv and twice.scale == 3.0
    with pytest.raises(dr.errors.InputError, match="scale must be a number in"):
        tv.rescaled(0.0)


def test_a_weight_file_keeps_the_scale(tmp_path: Path) -> None:
    reg = Scaled(random_red(double=False), 1.3)
    x = images(2, 1, 8, 7, dtype=torch.float32)
    dr.save(reg, tmp_path / "w.safetensors", {"mu": 0.1})
    again, meta = dr.load(tmp_path / "w.safetensors")
    assert isinstance(again, Scaled) and again.scale == 1.3 and meta == {"mu": 0.1}
    assert torch.equal(again.value_and_grad(x)[1], reg.value_and_grad(x)[1])


def test_kernels_of_the_inner_regularizer_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    if dr.backends()["cpu"]:
        pytest.skip("the C++ extension is not built")
    from deepreg_fast.backend.cpu import backend as cpu

    asked = []
    before = cpu.CpuBackend.value_and_grad
    monkeypatch.setattr(cpu.CpuBackend, "value_and_grad", lambda *a: asked.append(a[1]) or before(*a))
    reg = random_red(double=False)
    Scaled(reg, 1.3).value_and_grad(images(1, 1, 8, 8, dtype=torch.float32))
    assert asked == [reg]
