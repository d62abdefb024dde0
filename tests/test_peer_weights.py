"""Weights of others: synthetic files of the authors' layouts, derivatives, round trips, and refusals."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import deepreg_fast as dr
from deepreg_fast.cli import main
from deepreg_fast.data import png
from deepreg_fast.errors import BackendUnavailable, InputError
from deepreg_fast.functional.tdv import extend, fold
from deepreg_fast.regularizers import TDV, MultiConvRidge
from deepreg_fast.regularizers.multi_conv import spline_integral


def tensors(shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(3)
    return {k: 0.3 * torch.randn(s, generator=g) for k, s in shapes.items()}


def hertrich_ridge(path: Path) -> Path:
    filters = {"0.parametrizations.weight.original": (2, 1, 5, 5), "1.weight": (3, 2, 5, 5), "2.weight": (6, 3, 5, 5)}
    shapes: dict[str, tuple[int, ...]] = {"alpha": (), "scale": (), "regularizer.beta": ()}
    shapes |= {f"regularizer.filters.{k}": s for k, s in filters.items()}
    torch.save(tensors({**shapes, "regularizer.scaling": (1, 6, 1, 1)}), path)
    return path


def goujon(path: Path) -> Path:
    name = "conv_layer.conv_layers."
    shapes: dict[str, tuple[int, ...]] = {f"{name}0.parametrizations.weight.original": (2, 1, 3, 3), "mu_": ()}
    shapes |= {f"{name}1.weight": (4, 2, 3, 3), "spline_scaling.coefficients": (4, 11)}
    state = tensors(shapes)
    state["activation_cvx.coefficients"] = torch.linspace(-0.1, 0.1, 21).tanh()[None]
    state["activation_ccv.coefficients"] = torch.linspace(-0.1, 0.1, 21)[None]
    torch.save({"epoch": 1, "state_dict": state}, path)
    spline = {"x_min": -0.1, "x_max": 0.1}
    config = {"spline_activation": spline, "noise_range": [0, 30], "noise_val": 25, "rho_wcvx": 1}
    (path.parent / "config.json").write_text(json.dumps(config))
    return path


def tdv_state(prefix: str, features: int, blocks: int, scales: int) -> dict[str, torch.Tensor]:
    f = features
    shapes: dict[str, tuple[int, ...]] = {"K1.weight": (f, 1, 3, 3), "KN.weight": (1, f, 1, 1)}
    for b in range(blocks):
        for s in range(scales):
            for place in range(2 if s < scales - 1 else 1):
                shapes |= {f"mb.{b}.mb.{s}.{place}.conv{c}.weight": (f, f, 3, 3) for c in (1, 2)}
        for s in range(scales - 1):
            shapes |= {f"mb.{b}.conv_{way}.{s}.weight": (f, f, 3, 3) for way in ("down", "up")}
            shapes |= {f"mb.{b}.conv_{way}.{s}.blur": (1, 1, 5, 5) for way in ("down", "up")}
    return tensors({prefix + k: v for k, v in shapes.items()})


def hertrich_tdv(path: Path) -> Path:
    scalars = {"alpha": torch.tensor(0.2), "scale": torch.tensor(-0.1)}
    torch.save(tdv_state("regularizer.", 3, 2, 3) | scalars, path)
    return path


def kobler(path: Path) -> Path:
    state = tdv_state("R.", 3, 1, 3) | {"T": torch.tensor(0.1), "lmbda": torch.tensor(0.2)}
    torch.save({"config": {"S": 10}, "model": state}, path)
    return path


FILES = [("my_WCRR.pt", hertrich_ridge), ("c.pth", goujon), ("tdv.pt", hertrich_tdv), ("gray.pth", kobler)]
every_file = pytest.mark.parametrize(("name", "write"), FILES, ids=[w.__name__ for _, w in FILES])


@every_file
def test_gradient_hessian_and_round_trip(name: str, write: Callable[[Path], Path], tmp_path: Path) -> None:
    reg, notes = dr.load_peer(write(tmp_path / name))
    x = torch.rand(2, 1, 11, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    v = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    path = tmp_path / "ours.safetensors"
    dr.save(reg, path, notes)
    again, meta = dr.load(path)
    assert meta == notes and torch.equal(again.energy(x.float()), reg.energy(x.float()))
    reg.double()
    lin, h = reg.linearize(x), 1e-6
    slope = (reg.energy(x + h * v) - reg.energy(x - h * v)) / (2 * h)
    assert torch.allclose(slope, (lin.grad * v).flatten(1).sum(1), rtol=1e-6)
    h = 1e-8  # small, so that few responses cross a knot of a profile
    bend = (reg.value_and_grad(x + h * v)[1] - reg.value_and_grad(x - h * v)[1]) / (2 * h)
    assert float((bend - lin.hvp(v)).norm() / bend.norm()) < 1e-5
    products = lin.param_vjp(v)
    assert products.keys() == dict(reg.named_parameters()).keys()


def test_the_kind_of_equal_names(tmp_path: Path) -> None:
    x = torch.rand(1, 1, 9, 9)
    unnamed = hertrich_ridge(tmp_path / "weights.pt")
    with pytest.raises(InputError, match="give the kind"):
        dr.load_peer(unnamed)
    convex, weak = (dr.load_peer(unnamed, k)[0] for k in ("CRR", "WCRR"))
    assert isinstance(convex, MultiConvRidge) and convex.rho == 0.0
    assert isinstance(weak, MultiConvRidge) and weak.rho == 1.0
    assert bool((weak.energy(x) < convex.energy(x)).all())


def test_the_wrapper_scales_as_its_authors(tmp_path: Path) -> None:
    reg, _ = dr.load_peer(hertrich_tdv(tmp_path / "tdv.pt"))
    assert isinstance(reg, TDV)
    x = torch.rand(2, 1, 8, 8)
    wrapped = reg.energy(x)
    alpha, s = reg.log_weight.item(), reg.log_contrast.item()
    nn.init.zeros_(reg.log_weight)
    nn.init.zeros_(reg.log_contrast)
    expected = torch.tensor(alpha - 2 * s).exp() * reg.energy(torch.tensor(s).exp() * x)
    assert torch.allclose(wrapped, expected, rtol=1e-5)


def test_the_bank_is_the_chain_away_from_the_border() -> None:
    reg = MultiConvRidge((1, 2, 3, 6)).double()
    x = torch.rand(1, 1, 20, 21, dtype=torch.float64)
    bank, chain = F.conv2d(x, reg.bank(), padding=6), reg.responses(x)
    inner = (..., slice(4, -4), slice(4, -4))
    assert torch.allclose(bank[inner], chain[inner], atol=1e-13)
    assert not torch.allclose(bank[..., 3, 4:-4], chain[..., 3, 4:-4], atol=1e-6)
    spectrum = torch.fft.fft2(reg.bank().detach(), s=(256, 256)).abs().square().sum((0, 1))
    assert float(spectrum.max()) == pytest.approx(1.0, abs=1e-12)


def test_the_spline_integral_is_that_of_the_spline() -> None:
    values = torch.tensor([-3.0, -1.0, 0.0, 2.0, 2.5], dtype=torch.float64)
    t = torch.linspace(-1.7, 1.7, 23, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(spline_integral(t, values, 1.0).sum(), t)
    place = (t.detach().clamp(-1, 1) + 1) * 2
    j = place.floor().clamp(max=3).long()
    assert torch.allclose(slope, values[j] + (place - j) * (values[j + 1] - values[j]))
    assert float(spline_integral(torch.zeros(1, dtype=torch.float64), values, 1.0)) == 0.0


@pytest.mark.parametrize("mirrored", [False, True])
def test_fold_is_the_transpose_of_extend(mirrored: bool) -> None:
    x, y = torch.rand(1, 2, 2, 5, dtype=torch.float64), torch.rand(1, 2, 8, 11, dtype=torch.float64)
    assert torch.allclose((extend(x, 3, mirrored) * y).sum(), (x * fold(y, 3, mirrored)).sum())


def test_recover_and_hypergradient(tmp_path: Path) -> None:
    reg, notes = dr.load_peer(hertrich_ridge(tmp_path / "CRR.pt"))
    reg.double()
    truth = torch.rand(1, 1, 12, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    A, mu, options = dr.Identity((1, 12, 12)), notes["mu"], dr.PGDOptions(3000, 1e-9)
    y = A.A(truth) + 0.05
    hyper = dr.hypergradient(truth, y, A, reg, mu, options=options)

    def loss(log_mu: float) -> float:
        sol = dr.recover(y, A, reg, math.exp(log_mu), options=options)
        assert sol.status.tolist() == [dr.Status.CONVERGED]
        return float((sol.x - truth).square().sum())

    measured = (loss(1e-4) - loss(-1e-4)) / 2e-4
    assert float(hyper.log_mu) == pytest.approx(measured, rel=1e-4)
    assert hyper.theta.keys() == dict(reg.named_parameters()).keys()


def test_recover_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    weights, picture = hertrich_ridge(tmp_path / "CRR.pt"), tmp_path / "picture.png"
    picture.write_bytes(png(torch.rand(1, 12, 12, generator=torch.Generator().manual_seed(0))))
    arguments = [str(picture), "--weights", str(weights), "--problem", "denoise", "--sigma", "0.1"]
    monkeypatch.setattr(sys, "argv", ["deepreg-fast", "recover", *arguments, "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code, capsys.readouterr()
    assert json.loads((tmp_path / "out/results.json").read_text())["images"][0]["psnr"] > 5.0


def test_the_reason_for_the_reference_backend() -> None:
    x = torch.rand(1, 1, 8, 8)
    for reg in (MultiConvRidge((1, 2, 3, 6)), TDV(features=2)):
        with pytest.raises(BackendUnavailable, match=reg.no_kernels[:30]), dr.use_backend("cpu"):
            reg.value_and_grad(x)


def damaged(path: Path) -> Path:
    path.write_bytes(hertrich_ridge(path).read_bytes()[:500])
    return path


def other(path: Path) -> Path:
    torch.save({"conv.weight": torch.zeros(2)}, path)
    return path


def incomplete(path: Path) -> Path:
    torch.save({k: v for k, v in torch.load(hertrich_tdv(path)).items() if "conv1" not in k}, path)
    return path


def infinite(path: Path) -> Path:
    state = torch.load(hertrich_tdv(path))
    state["alpha"] = torch.tensor(float("inf"))
    torch.save(state, path)
    return path


def without_config(path: Path) -> Path:
    goujon(path)
    (path.parent / "config.json").unlink()
    return path


@pytest.mark.parametrize(
    ("write", "options", "message"),
    [
        (lambda p: p, {}, "none at"),
        (damaged, {}, "copy it again"),
        (other, {}, "conv.weight"),
        (incomplete, {}, "all tensors"),
        (infinite, {}, "finite"),
        (without_config, {}, "config.json"),
        (goujon, {"sigma": 0.5}, "30/255"),
        (goujon, {"kind": "CRR"}, "rho_wcvx"),
        (kobler, {"kind": "CRR"}, "holds weights of TDV"),
        (kobler, {"sigma": 0.1}, "leave them out"),
        (kobler, {"kind": "ICNN"}, "kind must be"),
    ],
)
def test_refusals(write: Any, options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message) as error:
        dr.load_peer(write(tmp_path / "file.pt"), **options)
    assert "\n" not in str(error.value)
