"""The public names, used as the README writes them."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import torch
from PIL import Image

import deepreg_fast as dr
from deepreg_fast.data import embedded_images

from .helpers import images, normal, random_red


def test_the_whole_method_by_its_public_names(tmp_path: Path) -> None:
    A = dr.SRM((1, 12, 12), ratio=0.2, transform="dct", randomizer="sign", seed=0)
    assert dr.SRM((1, 180, 180), measurements=6480).measurements == dr.SRM((1, 180, 180), ratio=0.2).measurements
    x = images(2, 1, 12, 12, dtype=torch.float32)
    y = A.A(x)
    assert y.shape == (2, A.measurements) == (2, 29)
    assert A.A_adjoint(y).shape == A.A_dagger(y).shape == A.prox_l2(x, y, 0.5).shape == x.shape
    reg = dr.RED(channels=16, depth=3, norm="none", alpha=0.0)
    assert isinstance(reg, torch.nn.Module)
    val, grad = reg.value_and_grad(x)
    assert val.shape == (2,) and grad.shape == x.shape
    lin = reg.linearize(x)
    assert lin.hvp(x).shape == x.shape
    assert {k: v.shape for k, v in lin.param_vjp(x).items()} == {k: p.shape for k, p in reg.named_parameters()}
    sol = dr.recover(y, A, reg, mu=1e-2, options=dr.PGDOptions())
    for name in ("x", "status", "iterations", "residual", "history"):
        assert hasattr(sol, name)
    hg = dr.hypergradient(x, y, A, reg, mu=1e-2)
    assert set(hg.theta) == set(lin.param_vjp(x)) and hg.log_mu.ndim == 0
    assert hg.solution.x.shape == hg.adjoint.x.shape == x.shape  # type: ignore[union-attr]
    by_lam = dr.hypergradient(x, y, A, reg, lam=1.0, sigma=0.1)
    assert torch.allclose(by_lam.log_mu, hg.log_mu)
    dr.save(reg, tmp_path / "weights.safetensors")
    again, meta = dr.load(tmp_path / "weights.safetensors")
    assert torch.equal(again.value_and_grad(x)[1], grad) and meta == {}
    with dr.use_backend("reference"):
        assert torch.equal(reg.value_and_grad(x)[1], grad)
    assert dr.backends()["reference"] is None and set(dr.backends()) >= {"reference", "cpu", "gpu"}
    with pytest.raises(dr.errors.InputError, match="auto"):
        dr.use_backend("tpu").__enter__()
    for name, reason in dr.backends().items():
        if reason is not None:
            with pytest.raises(dr.errors.BackendUnavailable, match="cannot run here"):
                dr.use_backend(name).__enter__()


def test_every_public_name_is_there_and_documented() -> None:
    for name in dr.__all__:
        thing = getattr(dr, name)
        if inspect.isclass(thing) or inspect.isfunction(thing):
            assert (inspect.getdoc(thing) or "").strip(), name
    assert set(dr.__all__) <= set(dir(dr))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        dr.nothing  # noqa: B018


@pytest.mark.parametrize(
    "reg",
    [
        dr.RED(3, norm="image"),
        dr.RED(3, norm="pixel", norm_place="after"),
        dr.ICNN(channels=3),
        dr.Ridge(3, 3),
        dr.TV(0.02),
        dr.DenoiserField(),
        dr.DenoiserField(norm="pixel", norm_place="after", kernel_size=5),
    ],
)
def test_weights_round_trip_in_both_precisions(reg: dr.Regularizer, tmp_path: Path) -> None:
    for dtype in (torch.float32, torch.float64):
        reg = reg.to(dtype)
        dr.save(reg, tmp_path / "w.safetensors", {"note": ["any", 1]})
        again, meta = dr.load(tmp_path / "w.safetensors")
        x = images(2, 1, 9, 9, dtype=dtype)
        assert type(again) is type(reg) and again.describe() == reg.describe() and meta == {"note": ["any", 1]}
        assert torch.equal(again.value_and_grad(x)[1], reg.value_and_grad(x)[1])


def test_spectrum_is_that_of_the_dense_hessian() -> None:
    reg, x = random_red(alpha=0.2), images(2, 1, 5, 6)
    low, high = dr.spectrum(reg, x, steps=30)
    for i in range(2):
        lin = reg.linearize(x[i : i + 1])
        columns = [lin.hvp(torch.eye(30, dtype=torch.float64)[k].reshape(1, 1, 5, 6)).flatten() for k in range(30)]
        values = torch.linalg.eigvalsh(1.2 * torch.eye(30, dtype=torch.float64) - torch.stack(columns))
        assert low[i] == pytest.approx(float(values[0]), abs=1e-8)
        assert high[i] == pytest.approx(float(values[-1]), abs=1e-8)
    lipschitz = torch.maximum(-low, high)
    for seed in range(5):
        delta = 1e-4 * normal(2, 1, 5, 6, seed=seed)
        assert (dr.beta_hat(reg, x, delta).beta <= lipschitz * 1.01).all()


def test_perturbations_climb() -> None:
    """Repeated ascent brings `beta_hat` to the largest slope nearby."""
    reg, x = random_red(), images(2, 1, 8, 8)
    radius = torch.full((2,), 1e-3, dtype=torch.float64)
    delta = normal(2, 1, 8, 8)
    point = dr.beta_hat(reg, x, 1e-3 * delta / delta.flatten(1).norm(dim=1).view(2, 1, 1, 1))
    first = point.beta
    for _ in range(60):
        delta, kept = point.power_step(radius)
        assert not bool(kept.any())
        assert torch.allclose(delta.flatten(1).norm(dim=1), radius)
        point = dr.beta_hat(reg, x, delta)
    low, high = dr.spectrum(reg, x, steps=40)
    assert (point.beta > first).all()
    assert torch.allclose(point.beta, torch.maximum(-low, high), rtol=0.02)
    # The start of every network, h = 0: grad s is constant zero and no direction is better than another.
    flat = dr.beta_hat(dr.RED(channels=2).double(), x, delta)
    kept_delta, kept = flat.power_step(radius)
    assert bool(kept.all()) and torch.equal(kept_delta, delta)


def test_the_readmes_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its code runs as written, but for the number of steps."""
    text = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    code = "\n".join(blocks)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    for i in range(12):
        Image.fromarray((images(64, 64, seed=i) * 255).byte().numpy()).save(tmp_path / "images" / f"{i}.png")
    assert "steps=5000" in code
    names = {"x": embedded_images(180)[1].x[:1], "kernel": torch.full((3, 5), 1 / 15), "gamma": 2.0, "c": 0.1}
    names["mask"] = names["x"][0] > 0.5  # type: ignore[index]
    exec(compile(code.replace("steps=5000", "steps=1, channels=2"), "README.md", "exec"), names)
    assert (tmp_path / "runs" / "bilevel" / "weights.safetensors").exists()
    assert names["sol"].status.eq(0).all()  # type: ignore[attr-defined]


@pytest.mark.skipif(dr.backends()["cpu"] is not None, reason="autograd, which the reference asks, is off there")
def test_what_is_made_in_inference_mode_works():
    with torch.inference_mode():
        A, reg = dr.SRM((1, 12, 12), 0.5), dr.RED(channels=4)
        x = torch.rand(2, 1, 12, 12)
        y, inside = A.A(x), reg.linearize(x).grad
    outside = torch.rand(2, 1, 12, 12)
    assert dr.recover(y.clone(), A, reg, 0.1).x.shape == x.shape
    assert A.A(outside).shape == y.shape and reg.value_and_grad(outside)[1].shape == inside.shape
