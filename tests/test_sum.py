"""`Sum`: values and derivatives are the sums of the parts', and a training starts from its ridge."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import deepreg_fast as dr
from deepreg_fast.errors import InputError
from deepreg_fast.regularizers import from_description
from deepreg_fast.training.config import BilevelConfig

from .helpers import central, grad_s, log_lines, relative


def parts(seed: int = 3) -> list[dr.Regularizer]:
    ridge = dr.Ridge(6, 5, 3, convex=False, seed=seed)
    net = dr.RED(channels=4, alpha=-1.0, head="residual", seed=seed)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            p += 0.2 * torch.randn(p.shape, generator=g)
    return [ridge, net]


def images(dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.rand(3, 1, 13, 17, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def test_it_is_the_sum_of_its_parts() -> None:
    one, two = parts()
    both = dr.Sum([one, two])
    x, v = images(torch.float32), images(torch.float32, 1) - 0.5
    lin, first, second = both.linearize(x), one.linearize(x), two.linearize(x)
    value, grad = both.value_and_grad(x)
    assert torch.equal(value, one.value_and_grad(x)[0] + two.value_and_grad(x)[0])
    assert torch.equal(grad, one.value_and_grad(x)[1] + two.value_and_grad(x)[1])
    assert torch.equal(lin.hvp(v), first.hvp(v) + second.hvp(v))
    assert torch.equal(lin.grad, first.grad + second.grad)
    found = lin.param_vjp(v)
    assert set(found) == {name for name, _ in both.named_parameters()}
    for i, part in enumerate((first, second)):
        for name, g in part.param_vjp(v).items():
            assert torch.equal(found[f"parts.{i}.{name}"], g)


def test_its_derivatives_agree_with_differences() -> None:
    both = dr.Sum(parts()).double()
    x, v = images(torch.float64), images(torch.float64, 1) - 0.5
    lin = both.linearize(x)
    slope = central(lambda t: both.value_and_grad(x + t * v)[0])
    assert relative(slope, (lin.grad * v).flatten(1).sum(1)) < 1e-9
    assert relative(central(lambda t: both.value_and_grad(x + t * v)[1]), lin.hvp(v)) < 1e-9
    assert torch.allclose(grad_s(both, x), (x - 0.5) - lin.grad)
    # 1 + alpha of the ridge is 1, that of the network 0.
    assert both.alpha == 0.0


def test_it_is_rebuilt_from_its_description_and_its_file(tmp_path: Path) -> None:
    both = dr.Sum(parts())
    again = from_description(json.loads(json.dumps(both.describe())))
    again.load_state_dict(both.state_dict())
    x = images(torch.float32)
    assert torch.equal(again.value_and_grad(x)[1], both.value_and_grad(x)[1])
    dr.save(both, tmp_path / "both.safetensors", {"mu": "0.01"})
    loaded, _ = dr.load(tmp_path / "both.safetensors")
    assert torch.equal(loaded.value_and_grad(x)[1], both.value_and_grad(x)[1])


def test_it_is_rescaled_as_each_part_is() -> None:
    both = dr.Sum(parts()).double()
    x, s = images(torch.float64), 1.3
    expected = both.energy(0.5 + s * (x - 0.5)) / s**2
    assert torch.allclose(both.rescaled(s).energy(x), expected, rtol=1e-12)


def test_it_is_computed_by_its_parts_kernels() -> None:
    both, x = dr.Sum(parts()), images(torch.float32)
    if (missing := dr.backends()["cpu"]) is not None:
        pytest.skip(missing)
    assert both.backend_for(x).name == "cpu" and both.rescaled(1.3).backend_for(x).name == "cpu"
    A = dr.SRM((1, 13, 17), 0.4)
    with dr.use_backend("cpu"):
        assert dr.recover(A.A(x), A, both, mu=0.1).backend == "cpu"
    assert dr.Sum([*parts(), dr.TV(0.1)]).backend_for(x).name == "cpu"
    mixed = dr.Sum([*parts(), dr.ICNN(2)])
    assert mixed.backend_for(x).name == "reference"


def test_it_refuses_different_centres_and_no_parts() -> None:
    with pytest.raises(InputError, match="same center"):
        dr.Sum([dr.RED(4, center=0.0), dr.RED(4, center=0.5)])
    with pytest.raises(InputError, match="one regularizer or more"):
        dr.Sum([])


def test_training_starts_as_the_ridge_and_trains_both(tmp_path: Path) -> None:
    ridge = dr.Ridge(4, 5, 2, convex=False, seed=1)
    dr.save(ridge, tmp_path / "ridge.safetensors", {"mu": "0.02"})
    config = BilevelConfig(
        regularizer="ridge+red", filters=4, kernel_size=5, scales=2, convex=False, channels=4, beta=0.0, steps=3,
        batch=4, crop=24, validation=2, validation_crop=24, validate_every=0, out=str(tmp_path / "run"),
        init=str(tmp_path / "ridge.safetensors"), loss="psnr",
    )  # fmt: skip
    trainer = dr.BilevelTrainer(config, progress=False)
    x = images(torch.float32)
    assert torch.equal(trainer.reg.value_and_grad(x)[1], ridge.value_and_grad(x)[1])
    before = {k: v.clone() for k, v in trainer.reg.state_dict().items()}
    trainer.fit()
    after = trainer.reg.state_dict()
    # The hidden layers wait for the last one, which starts at zero: after the first step they move, too.
    assert all(not torch.equal(before[k], after[k]) for k in before)
    assert all(line["loss"] < 0 for line in log_lines(tmp_path / "run") if "mse_loss" in line)
