"""Numbers as they come out of numpy, settings that change after construction, and faults that are one image's alone."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import deepreg_fast as dr
from deepreg_fast.errors import InputError

from .helpers import images


def test_numbers_of_numpy_are_numbers(tmp_path: Path) -> None:
    """Sizes, seeds, counts and weights that come out of numpy (or of a tensor without dimensions)."""
    n, x = np.int64(2), images(2, 1, 8, 8, dtype=torch.float32)
    for number in (np.float32(0.25), np.array(0.25), torch.tensor(0.25), np.float64(0.25)):
        A = dr.SRM((np.int32(1), np.array(8), torch.tensor(8)), number, seed=np.uint8(3))
        assert A.describe() == dr.SRM((1, 8, 8), 0.25, seed=3).describe()
    A = dr.SRM(np.array([1, 8, 8]), measurements=np.int16(20), transform="walsh", block=np.int64(4), keep_dc=np.True_)
    regs = [
        dr.RED(n, np.int64(3), alpha=np.float32(0.5), kernel_size=np.int64(3), gain=np.int64(2), seed=n),
        dr.Ridge(n, np.int64(3), n, np.bool_(False)),
        dr.ICNN(n, n, np.float32(0.5)),
        dr.TV(np.float32(0.25)),
        dr.DenoiserField(n, n),
        dr.RED(2).rescaled(np.float32(2.0)),
    ]
    for i, reg in enumerate(regs):
        json.dumps(reg.describe())
        dr.save(reg, tmp_path / f"{i}.safetensors")
        assert dr.load(tmp_path / f"{i}.safetensors")[0].describe() == reg.describe()
    options = dr.PGDOptions(np.int64(3), np.float32(0.125), memory=n, monotone=np.False_)
    assert type(options.max_iterations) is int and type(options.tolerance) is float and options.monotone is False
    y = A.A(x)
    for mu in (np.float64(0.25), np.array(0.25), np.array([0.25, 0.25]), torch.tensor(0.25)):
        found = dr.recover(y, A, regs[0], mu, options=options)
        assert torch.equal(found.x, dr.recover(y, A, regs[0], 0.25, options=options).x)
    lam = dr.recover(y, A, regs[0], lam=np.float32(0.5), sigma=np.int64(1), options=options)
    assert torch.equal(lam.x, dr.recover(y, A, regs[0], 0.5, options=options).x)
    dr.CGOptions(n, np.float32(0.5), np.True_)
    dr.MinresOptions(n)
    dr.Unrolled(n)
    dr.ImplicitAdjoint(bound=np.float32(2.0))
    config = dr.BilevelConfig(steps=np.int64(5), lr=np.float32(0.25))
    assert json.loads(config.to_json())["steps"] == 5
    assert torch.equal(dr.add_noise(y, np.float32(0.25), np.int64(3)), dr.add_noise(y, 0.25, 3))
    assert torch.equal(A.prox_l2(x, y, np.float32(2.0)), A.prox_l2(x, y, 2.0))
    assert torch.equal(A.shifted_inverse(x, np.int64(2)), A.shifted_inverse(x, 2))
    dr.spectrum(regs[0], x, np.int64(2), seed=np.int64(1))


@pytest.mark.parametrize("bad", [True, np.True_, np.float64(2.0), "2", np.array([2]), None, torch.tensor(True), 2 + 0j])
def test_what_is_no_integer(bad: Any) -> None:
    for call in (
        lambda: dr.SRM((1, bad, 8)),
        lambda: dr.SRM((1, 8, 8), seed=bad),
        lambda: dr.SRM((1, 8, 8), transform="walsh", block=bad) if bad is not None else dr.RED(bad),
        lambda: dr.RED(bad),
        lambda: dr.RED(2, seed=bad),
        lambda: dr.PGDOptions(bad),
        lambda: dr.spectrum(dr.TV(), images(1, 1, 4, 4), bad),
    ):
        with pytest.raises(InputError):
            call()


@pytest.mark.parametrize("bad", ["yes", 1, 0.0, None, np.int64(1)])
def test_what_is_no_boolean(bad: Any) -> None:
    for call in (
        lambda: dr.PGDOptions(monotone=bad),
        lambda: dr.Ridge(2, 3, convex=bad),
        lambda: dr.CGOptions(truncated_fallback=bad),
    ):
        with pytest.raises(InputError, match="(?i)must be true or false"):
            call()


@pytest.mark.parametrize("bad", [True, np.True_, "1", np.nan, np.array([0.5]), np.complex64(1)])
def test_what_is_no_number(bad: Any) -> None:
    for call in (
        lambda: dr.TV(bad),
        lambda: dr.SRM((1, 8, 8), bad),
        lambda: dr.PGDOptions(tau=bad),
        lambda: dr.RED(2, alpha=bad),
    ):
        with pytest.raises(InputError, match="must be a number"):
            call()


def test_what_changes_after_construction_is_described(tmp_path: Path) -> None:
    """So that a file gives back the function that was saved, or does not load by itself."""
    x = images(2, 1, 8, 8, dtype=torch.float32)
    red, ridge, icnn = dr.RED(2, norm="pixel", seed=1), dr.Ridge(2, 3), dr.ICNN(2, 2)
    red.alpha, red.center, red.head, red.net.gain = 0.5, 0.25, "residual", 3.0
    for m in red.net.norms:
        m.eps = 0.5
    ridge.center, ridge.net.zero_mean, icnn.rho, icnn.net.gain = 0.25, False, 0.75, 2.0
    for i, reg in enumerate((red, ridge, icnn)):
        dr.save(reg, tmp_path / f"{i}.safetensors")
        again = dr.load(tmp_path / f"{i}.safetensors")[0]
        assert torch.equal(again.value_and_grad(x)[0], reg.value_and_grad(x)[0])

    class Steeper(dr.ICNN):
        def energy(self, x: torch.Tensor) -> torch.Tensor:
            return 2.0 * super().energy(x)

    steep = Steeper(2, 2)
    torch.testing.assert_close(steep.rescaled(2.0).energy(x), steep.energy(0.5 + 2.0 * (x - 0.5)) / 4.0)
    red.net.convs[1] = torch.nn.Conv2d(2, 2, 3, padding=2, dilation=2)
    for reg in (red, steep):
        dr.save(reg, tmp_path / "other.safetensors")
        with pytest.raises(InputError, match="kind must be one of"):
            dr.load(tmp_path / "other.safetensors")
        again = dr.load(tmp_path / "other.safetensors", copy.deepcopy(reg))[0]
        assert torch.equal(again.value_and_grad(x)[0], reg.value_and_grad(x)[0])


def test_tied_weights_are_written(tmp_path: Path) -> None:
    reg = dr.RED(2, 4, seed=1)
    reg.net.convs[2].weight = reg.net.convs[1].weight  # type: ignore[union-attr]
    x = images(2, 1, 8, 8, dtype=torch.float32)
    for r in (reg, dr.Sum([reg, reg])):
        dr.save(r, tmp_path / "w.safetensors")
        assert torch.equal(dr.load(tmp_path / "w.safetensors")[0].value_and_grad(x)[1], r.value_and_grad(x)[1])


def test_an_image_whose_prox_cg_cannot_solve_ends_alone() -> None:
    class Diagonal(dr.LinearOperator):
        """Of a condition that CG cannot cope with, which an image sees only where it is bright."""

        def __init__(self) -> None:
            super().__init__((1, 4, 5), 20)
            self.register_buffer("d", torch.logspace(0, 5, 20, dtype=torch.float64).float())
            self.d: torch.Tensor

        def _forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.flatten(1) * self.d

        def _adjoint(self, y: torch.Tensor) -> torch.Tensor:
            return (y * self.d).reshape(-1, 1, 4, 5)

    A = Diagonal()
    y = torch.zeros(2, 20)
    y[1] = 1e3 * images(1, 20, dtype=torch.float32)
    x0 = torch.zeros(2, 1, 4, 5)
    z = torch.zeros(2, 1, 4, 5)
    p = A.prox_l2(z, y, 1e4)
    assert torch.equal(p[0], z[0]) and bool(torch.isnan(p[1]).all())
    options = dr.PGDOptions(60, tau=1e2)
    both = dr.recover(y, A, dr.TV(), 1e-2, options=options, x0=x0)
    for i in range(2):
        alone = dr.recover(y[i : i + 1], A, dr.TV(), 1e-2, options=options, x0=x0[i : i + 1])
        assert int(alone.status[0]) == int(both.status[i]) and torch.equal(alone.x[0], both.x[i])
    assert both.status[1] != dr.Status.CONVERGED and bool(torch.isfinite(both.x).all())
