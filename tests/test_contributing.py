"""CONTRIBUTING's recipes, to the letter: its code is run, registered, trained and recovered with."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import deepreg_fast as dr
from deepreg_fast import backend, operators, regularizers
from deepreg_fast.inverse import measurements

from . import test_derivatives as derivatives
from .helpers import images, log_lines, relative, small_config
from .test_inverse_problems import check_operator

TEXT = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")


@pytest.fixture(name="names", scope="module")
def _names() -> dict[str, Any]:
    """What CONTRIBUTING's Python blocks define."""
    names: dict[str, Any] = {"__name__": "recipes"}
    for block in re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL):
        exec(compile(block, "CONTRIBUTING.md", "exec"), names)
    return names


def test_regularizer(names: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    assert 'deepreg_fast.regularizers.register("huber", Huber)' in TEXT
    regularizers.register("huber", names["Huber"])
    for check in (derivatives.test_gradient, derivatives.test_hessian_product, derivatives.test_parameter_product):
        check(names["Huber"]().double())
    c = small_config(folder, tmp_path, steps=30, beta=0.0, lr=2e-2, channels=2)
    dr.BilevelTrainer(c, reg=names["Huber"](), progress=False).fit()
    loss = [d["mse_loss"] for d in log_lines(tmp_path) if "mse_loss" in d]
    assert np.mean(loss[-6:]) < np.mean(loss[:6])
    reg, meta = dr.load(tmp_path / "weights.safetensors")
    assert type(reg) is names["Huber"]
    A, x = dr.SRM((1, 12, 12), 0.5), images(2, 1, 12, 12, dtype=torch.float32)
    assert dr.recover(A.A(x), A, reg, meta["mu"]).status.eq(0).all()


def test_operator(names: dict[str, Any], tmp_path: Path) -> None:
    assert 'deepreg_fast.operators.register("left_half", LeftHalf)' in TEXT
    operators.register("left_half", names["LeftHalf"])
    A = names["LeftHalf"]((1, 6, 9))
    check_operator(A)
    x = images(2, 1, 6, 9)
    measurements.save_measurements(tmp_path / "y.npz", A.A(x), A)
    y, B, _ = measurements.load_measurements(tmp_path / "y.npz")
    assert type(B) is names["LeftHalf"]
    sol = dr.recover(y, B, dr.TV(0.05), 1e-3, options=dr.PGDOptions(3000, 1e-6, "anderson", tau=0.02))
    assert sol.status.eq(0).all() and relative(B.A(sol.x), y) < 0.1


def test_backend(names: dict[str, Any]) -> None:
    assert "backend.register(HandMadeTV())" in TEXT
    kept = dict(backend._TABLE)
    try:
        backend.register(names["HandMadeTV"]())
        assert list(dr.backends())[0] == "hand-made" and dr.backends()["hand-made"] is None
        A, x = dr.SRM((1, 8, 8), 0.5), images(2, 1, 8, 8)
        assert dr.recover(A.A(x), A, dr.TV(0.1), 1e-2).backend == "hand-made"
        assert dr.recover(A.A(x), A, dr.RED(channels=2).double(), 1e-2).backend != "hand-made"
        with dr.use_backend("hand-made"):
            assert dr.TV(0.1).linearize(x).hvp(x).shape == x.shape
            with pytest.raises(dr.errors.BackendUnavailable, match="it supports TV only"):
                dr.RED(channels=2).double().value_and_grad(x)
    finally:
        backend._TABLE.clear()
        backend._TABLE.update(kept)


def test_step(names: dict[str, Any]) -> None:
    extrapolate, x, v = names["extrapolate"], images(3, 5), images(3, 5, seed=1)
    weight = torch.tensor([0.0, 1.0, 3.0])
    kept = dict(backend._TABLE)
    try:
        backend.register(names["HandMadeSteps"]())
        assert torch.equal(extrapolate(x, v, weight), names["StepKernels"]().extrapolate(x, v, weight))
        torch.testing.assert_close(extrapolate(x, v, weight), extrapolate.definition(x, v, weight))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(names["StepKernels"], "extrapolate", lambda *_: "kernel")
            assert extrapolate(x, v, weight) == "kernel"
    finally:
        backend._TABLE.clear()
        backend._TABLE.update(kept)
    assert torch.equal(extrapolate(x, v, weight), extrapolate.definition(x, v, weight))
