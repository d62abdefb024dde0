"""On a CUDA device every piece gives the answers of float64 and of the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import deepreg_fast as dr

from .helpers import images, log_lines, normal, random_red, relative, small_config

pytestmark = pytest.mark.gpu

EPS = 2.0**-23
VARIANTS = [
    {"norm": norm, "head": head, "channels": channels, "depth": depth}
    for norm, head, channels, depth in (
        ("none", "red", 16, 3),
        ("pixel", "red", 16, 3),
        ("image", "red", 16, 3),
        ("pixel", "residual", 16, 3),
        ("none", "norm", 16, 3),
        ("pixel", "red", 5, 2),
        ("none", "red", 32, 4),
        ("pixel", "red", 64, 3),
        ("image", "residual", 7, 2),
    )
]


def pieces(reg: dr.RED, x: torch.Tensor, v: torch.Tensor) -> dict[str, torch.Tensor]:
    """Everything that a backend computes, one tensor each."""
    value, grad = reg.value_and_grad(x)
    lin = reg.linearize(x)
    theta = torch.cat([t.flatten() for t in lin.param_vjp(v).values()])
    return {"value": value, "gradient": grad, "linearized": lin.grad, "hvp": lin.hvp(v), "theta": theta}


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: "-".join(map(str, v.values())))
@pytest.mark.parametrize("shape", [(3, 1, 24, 20), (2, 1, 181, 179), (1, 1, 3, 3), (2, 1, 17, 300)])
def test_derivatives(variant: dict[str, object], shape: tuple[int, ...]) -> None:
    """The error against float64 is at most twice that of torch in float32."""
    reg = random_red(scale=0.1, double=False, gain=1.0, alpha=0.3, **variant).cuda()
    x, v = (t.float().cuda() for t in (images(*shape), normal(*shape)))
    with dr.use_backend("gpu"):
        ours = pieces(reg, x, v)
    with dr.use_backend("reference"):
        torchs = pieces(reg, x, v)
        exact = pieces(reg.double(), x.double(), v.double())
    for name, e in exact.items():
        limit = max(2.0 * relative(torchs[name].double(), e), 4 * EPS)
        assert relative(ours[name].double(), e) <= limit, name


@pytest.mark.parametrize("randomizer", ["sign", "permutation", "both"])
@pytest.mark.parametrize(
    ("transform", "shape", "block"),
    [
        ("dct", (1, 24, 20), None),
        ("dct", (1, 181, 179), None),
        ("dct", (1, 180, 180), None),
        ("dct", (2, 33, 7), None),
        ("dct", (1, 512, 384), None),
        ("hadamard", (1, 180, 180), None),
        ("hadamard", (1, 12, 28), None),
        ("walsh", (1, 180, 180), None),
        ("walsh", (1, 256, 256), None),
        ("walsh", (1, 64, 48), 64),
    ],
)
def test_products_of_an_operator(
    transform: str, shape: tuple[int, int, int], block: int | None, randomizer: str
) -> None:
    A = dr.SRM(shape, 0.3, transform=transform, randomizer=randomizer, block=block).cuda()
    wide = dr.SRM(shape, 0.3, transform=transform, randomizer=randomizer, block=block).cuda()
    x, gamma = images(3, *shape).cuda(), torch.tensor([0.5, 2.0, 30.0], dtype=torch.float64).cuda()
    y = normal(3, A.measurements).cuda()

    def products(op: dr.SRM, x: torch.Tensor, y: torch.Tensor, gamma: torch.Tensor) -> dict[str, torch.Tensor]:
        return {
            "forward": op.A(x),
            "adjoint": op.A_adjoint(y),
            "normal": op.normal(x),
            "prox": op.prox_l2(x, y, gamma),
            "shifted": op.shifted_inverse(x, gamma),
        }

    exact = products(wide.double(), x, y, gamma)
    single = x.float(), y.float(), gamma.float()
    with dr.use_backend("reference"):
        torchs = products(A, *single)
    with dr.use_backend("gpu"):
        ours = products(A, *single)
    for name, e in exact.items():
        limit = max(2.0 * relative(torchs[name].double(), e), 4 * EPS)
        assert relative(ours[name].double(), e) <= limit, name


@pytest.mark.parametrize("transform", ["dct", "hadamard", "walsh"])
def test_operators(transform: str) -> None:
    A, x = dr.SRM((1, 24, 20), 0.3, transform=transform, randomizer="both"), images(3, 1, 24, 20)
    y = A.A(x)
    B = dr.SRM((1, 24, 20), 0.3, transform=transform, randomizer="both").to("cuda")
    assert relative(B.A(x.cuda()).cpu(), y) <= 1e-13
    assert relative(B.A_adjoint(y.cuda()).cpu(), A.A_adjoint(y)) <= 1e-13
    assert B.fingerprint() == A.fingerprint()
    with pytest.raises(dr.errors.InputError, match="device"):
        B.A(x)


@pytest.mark.parametrize("acceleration", ["none", "fista", "anderson"])
def test_recovery_and_hypergradient(acceleration: str) -> None:
    reg, A, x = random_red(scale=0.05, alpha=0.5), dr.SRM((1, 16, 16), 0.3), images(3, 1, 16, 16)
    options = dr.PGDOptions(2000, 1e-11, acceleration)
    adjoint = dr.ImplicitAdjoint(dr.CGOptions(500, 1e-10))
    here = dr.hypergradient(x, A.A(x), A, reg, 0.1, options=options, adjoint=adjoint)
    reg, A, x = reg.cuda(), A.cuda(), x.cuda()
    there = dr.hypergradient(x, A.A(x), A, reg, 0.1, options=options, adjoint=adjoint)
    assert there.solution.status.eq(0).all()
    assert relative(there.solution.x.cpu(), here.solution.x) <= 1e-9
    for k, g in here.theta.items():
        assert relative(there.theta[k].cpu(), g) <= 1e-6


@pytest.mark.parametrize("solver", [dr.CGOptions, dr.MinresOptions])
@pytest.mark.parametrize("acceleration", ["none", "fista", "anderson"])
def test_recovery_and_hypergradient_by_the_kernels(acceleration: str, solver: Any) -> None:
    """In float32, at 33 x 47: both solve the same problem, so that they differ by what the tolerances allow."""
    reg = random_red(scale=0.05, alpha=0.5, channels=16, norm="pixel")
    A, x = dr.SRM((1, 33, 47), 0.4), images(5, 1, 33, 47)
    options = dr.PGDOptions(3000, 1e-5, acceleration)
    adjoint = dr.ImplicitAdjoint(solver(500, 1e-5))
    tight = {"options": dr.PGDOptions(5000, 1e-10, "anderson"), "adjoint": dr.ImplicitAdjoint(solver(500, 1e-10))}
    exact = dr.hypergradient(x, A.A(x), A, reg, 0.1, **tight)  # type: ignore[arg-type]
    here = dr.hypergradient(x.float(), A.A(x.float()), A, reg.float(), 0.1, options=options, adjoint=adjoint)
    reg, A, x = reg.cuda(), A.cuda(), x.float().cuda()
    with dr.use_backend("gpu"):
        there = dr.hypergradient(x, A.A(x), A, reg, 0.1, options=options, adjoint=adjoint)
    assert there.solution.status.eq(0).all()
    floor = 1e-4
    apart = relative(here.solution.x.double(), exact.solution.x)
    assert relative(there.solution.x.cpu().double(), exact.solution.x) <= max(2 * apart, floor)
    for k, g in exact.theta.items():
        assert relative(there.theta[k].cpu().double(), g) <= max(2 * relative(here.theta[k].double(), g), 10 * floor), k


def test_a_training_goes_the_way_of_the_cpu(folder: Path, tmp_path: Path) -> None:
    """A few steps from the same weights on the same images: losses and weights agree to float32 and loose solves."""
    settings = {"steps": 4, "channels": 8, "norm": "pixel", "validate_every": 0, "warmup": 0}
    settings |= {"tolerance_start": 1e-4, "tolerance_end": 1e-4, "inner_iterations": 200}
    settings |= {"adjoint_tolerance": 1e-4, "adjoint_iterations": 100}
    found = {}
    for device in ("cpu", "cuda"):
        out = tmp_path / device
        trainer = dr.BilevelTrainer(small_config(folder, out, device=device, **settings), progress=False)
        reg = trainer.fit()
        losses = [line["mse_loss"] for line in log_lines(out) if "mse_loss" in line]
        found[device] = losses, {k: p.detach().cpu() for k, p in reg.named_parameters()}
    assert found["cuda"][0] == pytest.approx(found["cpu"][0], rel=1e-3)
    for k, p in found["cpu"][1].items():
        # Adam's step is at most the learning rate each time, whatever the gradient's size.
        assert torch.allclose(found["cuda"][1][k], p, rtol=1e-2, atol=2e-3), k
