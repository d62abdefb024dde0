"""The penalties on `grad s` beyond `beta_hat`: curvature from above, free perturbations; and what training adds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import deepreg_fast as dr
from deepreg_fast.batched.linalg import norm as lengths
from deepreg_fast.data import embedded_images
from deepreg_fast.regularizers.lipschitz import PENALTIES, CurvatureQuotient, curvature

from .helpers import central, images, log_lines, moved, normal, random_red, relative, small_config

WEIGHTS = Path(__file__).parents[1] / "benchmarks/results/bsd400_cs5/bilevel.safetensors"


def _kappa(reg: dr.RED, x: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """The definition, by autograd's gradients of s, attached to the graph of the parameters."""

    def grad_s(t: torch.Tensor) -> torch.Tensor:
        t = t.detach().requires_grad_()
        s = 0.5 * (1.0 + reg.alpha) * (t - reg.center).square().sum() - reg.energy(t).sum()
        return torch.autograd.grad(s, t, create_graph=True)[0]

    return ((grad_s(x + delta) - grad_s(x)) * delta).sum((1, 2, 3)) / delta.square().sum((1, 2, 3))


@pytest.mark.parametrize("options", [{}, {"norm": "pixel"}, {"norm": "image", "norm_place": "after"}, {"head": "norm"}])
def test_derivatives_of_the_curvature(options: dict[str, Any]) -> None:
    reg = random_red(alpha=0.2, **options)
    x, delta, move = images(2, 1, 6, 6), 0.1 * normal(2, 1, 6, 6), normal(2, 1, 6, 6, seed=5)
    point = curvature(reg, x, delta)
    by_hand = _kappa(reg, x, delta)
    assert relative(point.beta, by_hand.detach()) <= 1e-10
    slope = central(lambda t: curvature(reg, x, delta + t * move).beta, 1e-4)
    assert relative((point.grad_delta() * move).flatten(1).sum(1), slope) <= 1e-6
    weights = torch.tensor([1.0, 0.5], dtype=torch.float64)
    found = point.grad_theta(weights)
    names, params = zip(*reg.named_parameters(), strict=True)
    wanted = torch.autograd.grad((weights * by_hand).sum(), params, allow_unused=True)
    for name, w in zip(names, wanted, strict=True):
        # The differences cancel the last bias of head "red", exactly or to rounding.
        exact = torch.zeros_like(found[name]) if w is None else w
        torch.testing.assert_close(found[name], exact, rtol=1e-9, atol=1e-12)
    direction = {k: normal(*p.shape, seed=i) for i, (k, p) in enumerate(reg.named_parameters())}
    along = torch.as_tensor(sum((found[k] * direction[k]).sum() for k in found))
    slope = central(lambda t: moved(reg, direction, t, lambda: (weights * curvature(reg, x, delta).beta).sum()))
    assert relative(along, slope) <= 1e-6


def _ascended(reg: dr.RED, x: torch.Tensor, radius: torch.Tensor, steps: int) -> list[CurvatureQuotient]:
    delta = normal(*x.shape).to(x)
    delta = delta * (radius / lengths(delta)).to(x).view(-1, 1, 1, 1)
    points = [curvature(reg, x, delta)]
    for _ in range(steps):
        delta, kept = points[-1].power_step(radius)
        assert not bool(kept.any())
        torch.testing.assert_close(lengths(delta), radius, rtol=1e-5, atol=0)
        points.append(curvature(reg, x, delta))
    return points


def test_the_curvature_climbs_to_the_largest_eigenvalue() -> None:
    """Not to the one of largest modulus, which is negative here; and it never falls on the way."""
    reg, x = random_red(scale=0.3, seed=1), images(2, 1, 8, 8)
    with torch.no_grad():
        for p in reg.net.convs[-1].parameters():
            p.neg_()
    low, high = dr.spectrum(reg, x, steps=60)
    assert (-low > 1.5 * high).all() and (high > 0).all()
    path = torch.stack([p.beta for p in _ascended(reg, x, torch.full((2,), 1e-4, dtype=torch.float64), 80)])
    assert bool((path.diff(dim=0) > -1e-5).all())
    torch.testing.assert_close(path[-1], high, rtol=0.01, atol=0)


@pytest.mark.skipif(not WEIGHTS.exists(), reason="the trained weights are in the repository only")
def test_the_curvature_of_a_trained_regularizer() -> None:
    """In float32 on natural crops, in the steps that 20 visits of 3 steps would give; with perturbations so short that
    the curvature stays what it is at x (at a hundredth of the image it has fallen by up to a half)."""
    reg, _ = dr.load(WEIGHTS)
    assert isinstance(reg, dr.RED)
    x = embedded_images(96).train.x[::24, :, 24:72, 24:72].contiguous()
    low, high = dr.spectrum(reg, x, steps=60)
    assert (-low > 3.0 * high).all()
    radius = 1e-4 * lengths(x - reg.center)
    found = _ascended(reg, x, radius, 60)[-1].beta
    torch.testing.assert_close(found, high, rtol=0.05, atol=0)


@pytest.mark.parametrize("penalty", sorted(PENALTIES))
def test_free_perturbations_climb(penalty: str) -> None:
    reg, x = random_red(scale=0.3, seed=1), images(2, 1, 8, 8)
    radius = torch.full((2,), 0.5, dtype=torch.float64)
    delta = normal(2, 1, 8, 8)
    point = PENALTIES[penalty](reg, x, delta * (radius / lengths(delta)).view(-1, 1, 1, 1))
    first = point.beta
    for _ in range(40):
        step, kept = point.gradient_step(radius)
        assert torch.allclose(lengths(step - point.delta), torch.where(kept, 0.0, 0.25 * radius))
        point = PENALTIES[penalty](reg, x, step)
    assert (point.beta > first + 0.1).all()
    assert (lengths(point.delta) >= 0.01 * radius).all() and not torch.allclose(lengths(point.delta), radius)


@pytest.mark.parametrize("penalty", sorted(PENALTIES))
def test_perturbations_stay_where_there_is_no_direction(penalty: str) -> None:
    """`h = 0`, the start of every network, in float32: `grad s` is zero but for rounding."""
    x, delta = images(2, 1, 8, 8, dtype=torch.float32), 0.1 * normal(2, 1, 8, 8).float()
    point = PENALTIES[penalty](dr.RED(channels=2), x, delta)
    moved_to, kept = point.power_step(lengths(delta))
    assert bool(kept.all()) and torch.equal(moved_to, delta) and bool((point.beta.abs() < 1e-5).all())


def test_a_one_sided_penalty_leaves_sharpness_free(folder: Path, tmp_path: Path) -> None:
    """Trained alike with the bound 0.3, `r` is as nearly convex by either penalty, and sharper by the one-sided."""
    ends = {}
    for penalty in PENALTIES:
        out = tmp_path / penalty
        c = small_config(folder, out, steps=80, beta=0.3, xi=10.0, penalty=penalty, delta_steps=2)
        dr.BilevelTrainer(c, progress=False).fit()
        ends[penalty] = [d for d in log_lines(out) if "val_lambda_max" in d][-1]
    # On images that neither saw. Without a penalty both ends pass 0.75 within 20 steps.
    assert all(d["val_lambda_max"] < 0.45 for d in ends.values())
    assert ends["curvature"]["val_lambda_min"] < 2.0 * ends["lipschitz"]["val_lambda_min"]


def test_free_perturbations_train(folder: Path, tmp_path: Path) -> None:
    c = small_config(folder, tmp_path, steps=60, beta=0.3, xi=10.0, delta_steps=2, delta_ball="free")
    trainer = dr.BilevelTrainer(c, progress=False)
    trainer.fit()
    assert [d["val_lambda_max"] for d in log_lines(tmp_path) if "val_lambda_max" in d][-1] < 0.45
    rows = trainer.placement.rows(np.arange(24))
    size = lengths(trainer.objective.store.get("delta", rows)) / lengths(trainer.placed.batch(rows) - 0.5)
    assert float(size.max() / size.min()) > 1.5


def test_jfb_first_then_the_configured_adjoint(folder: Path, tmp_path: Path) -> None:
    c = small_config(folder, tmp_path / "whole", steps=20, jfb_steps=8, adjoint_tolerance=1e-3)
    whole = dr.BilevelTrainer(c, progress=False)
    whole.fit()
    spent = [d["adjoint_iterations_mean"] for d in log_lines(tmp_path / "whole") if "adjoint_iterations_mean" in d]
    assert spent[:8] == [0.0] * 8 and all(n > 0 for n in spent[8:])
    pure = small_config(folder, tmp_path / "jfb", steps=20, adjoint="jfb")
    dr.BilevelTrainer(pure, progress=False).fit()
    first, second = ([d["loss"] for d in log_lines(tmp_path / k) if "loss" in d] for k in ("whole", "jfb"))
    assert first[:9] == second[:9] and first[10:] != second[10:]


@pytest.mark.parametrize("stop", [4, 12])
@pytest.mark.parametrize("options", [{"penalty": "curvature"}, {"delta_ball": "free"}])
def test_resumes_to_the_same_bits(folder: Path, tmp_path: Path, stop: int, options: dict[str, str]) -> None:
    """Stopped within the JFB steps or after them."""
    c = small_config(folder, tmp_path / "a", steps=16, jfb_steps=8, checkpoint_seconds=0.0, beta=0.1, **options)
    whole = dr.BilevelTrainer(c, progress=False).fit()
    cut = dr.BilevelTrainer(replace(c, out=str(tmp_path / "b")), progress=False)
    inner = cut._step

    def step() -> dict[str, Any]:
        if cut.step_done == stop:
            raise KeyboardInterrupt
        return inner()

    cut._step = step  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        cut.fit()
    again = dr.BilevelTrainer(replace(c, out=str(tmp_path / "b")), progress=False).resume()
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), again.parameters(), strict=True))


def test_settings_of_the_network_and_the_operator_arrive(folder: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "norm": "pixel",
        "norm_place": "after",
        "norm_eps": 0.05,
        "center": 0.25,
        "kernel_size": 5,
        "gain": 3.0,
        "keep_dc": False,
        "randomizer": "permutation",
        "steps": 6,
        "lr": 1e-3,
    }
    trainer = dr.BilevelTrainer(small_config(folder, tmp_path / "bilevel", **changes), progress=False)
    trainer.fit()
    assert not trainer.A.keep_dc
    loaded, _ = dr.load(tmp_path / "bilevel" / "weights.safetensors")
    told = {"norm": "pixel", "norm_place": "after", "eps": 0.05, "center": 0.25, "kernel_size": 5, "gain": 3.0}
    assert told.items() <= loaded.describe().items()
    c = trainer.config
    same = {k: getattr(c, k) for k in dr.BaselineConfig.__dataclass_fields__ if hasattr(c, k)}
    for baseline in (dr.DenoiserTrainer, dr.GradientStepTrainer):
        t = baseline(dr.BaselineConfig(**{**same, "out": str(tmp_path / baseline.method)}), progress=False)
        t.fit()
        found, _ = dr.load(tmp_path / baseline.method / "weights.safetensors")
        assert told.items() <= found.describe().items()
    for bad in (
        {"penalty": "two"},
        {"delta_ball": "box"},
        {"jfb_steps": -1},
        {"mu0": 1e-5},
        {"norm_place": "between"},
        {"norm_eps": 0.0},
        {"kernel_size": 4},
        {"center": float("inf")},
    ):
        with pytest.raises(dr.errors.InputError):
            dr.BilevelTrainer(small_config(folder, tmp_path / "bad", **bad), progress=False)
