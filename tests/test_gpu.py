"""The reference backend on a CUDA device gives the CPU's answers."""

from __future__ import annotations

import pytest

import deepreg_fast as dr

from .helpers import images, random_red, relative

pytestmark = pytest.mark.gpu


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
    adjoint = dr.AdjointOptions(tolerance=1e-10, max_iterations=500)
    here = dr.hypergradient(x, A.A(x), A, reg, 0.1, options=options, adjoint=adjoint)
    reg, A, x = reg.cuda(), A.cuda(), x.cuda()
    there = dr.hypergradient(x, A.A(x), A, reg, 0.1, options=options, adjoint=adjoint)
    assert there.solution.status.eq(0).all()
    assert relative(there.solution.x.cpu(), here.solution.x) <= 1e-9
    for k, g in here.theta.items():
        assert relative(there.theta[k].cpu(), g) <= 1e-6
