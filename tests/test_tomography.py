"""Parallel-beam tomography: an independent matrix, the C++ kernels, filters, derivatives, and other projectors."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import deepreg_fast as dr
from deepreg_fast.errors import InputError
from deepreg_fast.functional import tomography as definition

from .helpers import images, normal
from .test_cpu_backend import _sets

F64 = torch.float64
needs_kernels = pytest.mark.skipif(
    dr.backends()["cpu"] is not None, reason=f"the C++ extension is not built: {dr.backends()['cpu']}"
)
geometries = {
    "size": st.tuples(st.integers(1, 2), st.integers(1, 20), st.integers(1, 37)),
    "angles": st.lists(
        st.floats(-400.0, 400.0) | st.sampled_from([0.0, 45.0, 90.0, 135.0, 180.0, 225.0]), min_size=1
    ).map(lambda a: a[:6]),
    "detectors": st.none() | st.integers(1, 30),
    "seed": st.integers(0, 99),
}


@pytest.fixture(name="isa", params=_sets(), scope="module")
def _isa(request: pytest.FixtureRequest):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DEEPREG_FAST_ISA", request.param)
        yield request.param


def matrix(A: dr.Tomography) -> np.ndarray:
    """Joseph's weights ray by ray: each line `x cos a + y sin a = s`, sampled once per row or per column."""
    _, h, w = A.image_shape
    angles, detectors = A.geometry.angles, A.geometry.detectors
    M = np.zeros((len(angles), detectors, h, w))
    for a, angle in enumerate(angles):
        c, s = math.cos(math.radians(angle)), math.sin(math.radians(angle))
        upright = abs(c) >= abs(s)
        for d in range(detectors):
            offset = d - (detectors - 1) / 2
            for line in range(h if upright else w):
                if upright:
                    place = (offset + (line - (h - 1) / 2) * s) / c + (w - 1) / 2
                else:
                    place = (h - 1) / 2 - (offset - (line - (w - 1) / 2) * c) / s
                k = math.floor(place)
                for pixel, weight in ((k, 1.0 - (place - k)), (k + 1, place - k)):
                    if 0 <= pixel < (w if upright else h):
                        where = (a, d, line, pixel) if upright else (a, d, pixel, line)
                        M[where] += weight / max(abs(c), abs(s))
    return M.reshape(len(angles) * detectors, h * w)


def error(a: torch.Tensor, exact: torch.Tensor) -> float:
    return float((a.double() - exact).norm() / exact.norm().clamp(min=1e-30))


@settings(deadline=None, max_examples=25)
@given(**geometries)
def test_the_definition_is_the_matrix(
    size: tuple[int, int, int], angles: list[float], detectors: int | None, seed: int
) -> None:
    A = dr.Tomography(size, angles, detectors)
    M = torch.from_numpy(matrix(A))
    x, y = images(2, *size, seed=seed), normal(2, *A.measurement_shape, seed=seed)
    out, back = A.A(x), A.A_adjoint(y)
    torch.testing.assert_close(out.flatten(2), x.flatten(2) @ M.T, rtol=0, atol=1e-11)
    torch.testing.assert_close(back.flatten(2), y.flatten(2) @ M, rtol=0, atol=1e-11)
    assert abs(float((out * y).sum() - (x * back).sum())) <= 1e-12 * float(out.norm() * y.norm() + 1.0)


@needs_kernels
@settings(deadline=None, max_examples=25)
@given(**geometries)
def test_the_error_is_at_most_twice_that_of_torch(
    isa: str, size: tuple[int, int, int], angles: list[float], detectors: int | None, seed: int
) -> None:
    A = dr.Tomography(size, angles, detectors)
    x, y = images(3, *size, seed=seed).float(), normal(3, *A.measurement_shape, seed=seed).float()
    ours = A.A(x), A.A_adjoint(y)
    with dr.use_backend("reference"):
        torchs = A.A(x), A.A_adjoint(y)
    for a, b, e in zip(ours, torchs, (A.A(x.double()), A.A_adjoint(y.double())), strict=True):
        # Where torch is exact by luck, an answer is still allowed its own rounding.
        assert a.dtype == torch.float32 and error(a, e) <= max(2.0 * error(b, e), 2.0**-22)


@needs_kernels
def test_the_error_at_a_usual_size_is_at_most_twice_that_of_torch(isa: str) -> None:
    A = dr.Tomography((1, 150, 180), 20)
    x, y = images(1, 1, 150, 180).float(), normal(1, *A.measurement_shape).float()
    with dr.use_backend("reference"):
        torchs = A.A(x), A.A_adjoint(y)
    exact = A.A(x.double()), A.A_adjoint(y.double())
    for a, b, e in zip((A.A(x), A.A_adjoint(y)), torchs, exact, strict=True):
        assert error(a, e) <= 2.0 * error(b, e)
    product = (torchs[0].double() * y.double()).sum()
    assert abs(float(product - (x.double() * A.A_adjoint(y)).sum())) <= 2.0**-22 * float(torchs[0].norm() * y.norm())


@needs_kernels
def test_bits_do_not_depend_on_neighbors_or_threads(isa: str) -> None:
    A, before = dr.Tomography((2, 45, 67), 9), torch.get_num_threads()
    x, y = images(5, 2, 45, 67).float(), normal(5, *A.measurement_shape).float()
    answers = []
    try:
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            answers.append((A.A(x), A.A_adjoint(y), A.fbp(y)))
        alone = [(A.A(x[i : i + 1]), A.A_adjoint(y[i : i + 1]), A.fbp(y[i : i + 1])) for i in range(5)]
    finally:
        torch.set_num_threads(before)
    answers.append(tuple(torch.cat(parts) for parts in zip(*alone, strict=True)))
    for other in answers[1:]:
        assert all(map(torch.equal, answers[0], other))


@needs_kernels
def test_values_that_are_not_finite_stay_in_their_image(isa: str) -> None:
    A = dr.Tomography((1, 12, 9), 5)
    x, y = images(2, 1, 12, 9).float(), normal(2, *A.measurement_shape).float()
    good = A.A(x)[1], A.A_adjoint(y)[1]
    x[0, 0, 3, 4], y[0, 0, 2, 7] = math.nan, math.inf
    bad = A.A(x), A.A_adjoint(y)
    for g, b in zip(good, bad, strict=True):
        assert torch.equal(g, b[1]) and not bool(torch.isfinite(b[0]).all())


def test_derivatives() -> None:
    A = dr.Tomography((1, 4, 5), [10.0, 100.0])
    x, y = images(2, 1, 4, 5).requires_grad_(), normal(2, *A.measurement_shape).requires_grad_()
    for f, t in ((A.A, x), (A.A_adjoint, y)):
        assert torch.autograd.gradcheck(f, (t,), check_forward_ad=True)
        assert torch.autograd.gradgradcheck(lambda t, f=f: f(t).square(), (t,))
    g = torch.func.grad(lambda t: 0.5 * A.A(t).square().sum())(x.detach())
    torch.testing.assert_close(g, A.normal(x.detach()))
    many = images(3, 2, 1, 4, 5)
    assert torch.equal(torch.func.vmap(A.A)(many), torch.stack([A.A(m) for m in many]))
    f32 = x.detach().float().requires_grad_()
    (A.A(f32) * y.detach().float()).sum().backward()
    assert f32.grad is not None and torch.equal(f32.grad, A.A_adjoint(y.detach().float()))


def bump(n: int, width: float, row: float = 0.0, column: float = 0.0) -> torch.Tensor:
    i = torch.arange(n, dtype=F64) - (n - 1) / 2
    return torch.exp(-((i[:, None] - row).square() + (i - column).square()) / (2.0 * width**2))[None, None]


def test_a_bump_and_its_filtered_back_projection() -> None:
    A, x = dr.Tomography((1, 64, 64), 90), bump(64, 5.0, -7.5, 4.0)
    y = A.A(x)
    s = torch.arange(A.geometry.detectors, dtype=F64) - (A.geometry.detectors - 1) / 2
    turn = torch.arange(90, dtype=F64)[:, None] * (math.pi / 90)
    exact = (
        5.0 * math.sqrt(2.0 * math.pi) * torch.exp(-(s - 4.0 * turn.cos() - 7.5 * turn.sin()).square() / (2.0 * 5.0**2))
    )
    assert float((y - exact).abs().max()) < 0.01 * float(exact.max())
    assert float((A.fbp(y) - x).abs().max()) < 0.03 and torch.equal(A.A_dagger(y), A.fbp(y))
    assert torch.equal(A.as_image(y), y)
    for n in (8, 9, 16):
        response = definition.ramp(n, F64, torch.device("cpu"))
        assert float(response.min()) > 0 and float(response.max()) == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize(("angles", "c", "fewer"), [(60, 1e-1, 1.5), (60, 1e-3, 1.9), (180, 1e-3, 3.0)])
def test_the_filter_saves_products(angles: int, c: float, fewer: float) -> None:
    A = dr.Tomography((1, 64, 64), angles)
    A_plain = dr.Tomography((1, 64, 64), angles)
    b = normal(1, 1, 64, 64).float()
    shift = torch.tensor([c * A.sqnorm()])
    steps = []
    for preconditioner in (None, lambda v: A.precondition(v, shift)):
        sol = dr.cg(lambda v: A_plain.normal(v) + shift * v, b, dr.CGOptions(400, 1e-3), preconditioner=preconditioner)
        assert int(sol.status[0]) == 0
        steps.append(int(sol.iterations[0]))
    assert steps[0] >= fewer * steps[1], steps
    u, v = normal(1, 1, 64, 64, seed=2), normal(1, 1, 64, 64, seed=3)
    Pu, Pv = A.precondition(u, 0.3), A.precondition(v, 0.3)
    assert float((Pu * v).sum()) == pytest.approx(float((u * Pv).sum()), rel=1e-10) and float((Pu * u).sum()) > 0


def test_other_projectors_agree() -> None:
    x = bump(48, 4.0, 6.0, -4.0) + 0.5 * bump(48, 2.5, -9.0, 3.0)
    angles = [180.0 * i / 12 for i in range(12)]
    transform = pytest.importorskip("skimage.transform")
    theirs = transform.radon(x[0, 0].numpy(), angles, circle=True).T
    ours = dr.Tomography((1, 48, 48), angles, 49).A(x)[0, 0].numpy()
    # Its center is pixel 24, half a pixel from ours, and it interpolates twice.
    shifted = [np.interp(np.arange(48) - 24 + 0.5 * (math.cos(t) - math.sin(t)), np.arange(49) - 24, row)
               for t, row in zip(np.radians(angles), ours, strict=True)]  # fmt: skip
    assert np.abs(np.stack(shifted) - theirs).mean() < 0.02 * theirs.mean() + 0.05


def test_astra_agrees() -> None:
    astra = pytest.importorskip("astra")
    angles = np.arange(13) * 180.0 / 13 + 0.7
    A = dr.Tomography((1, 31, 40), angles.tolist(), 52)
    volume, beams = astra.create_vol_geom(31, 40), astra.create_proj_geom("parallel", 1.0, 52, np.radians(angles))
    W = astra.OpTomo(astra.create_projector("linear", beams, volume))
    x = images(1, 1, 31, 40).float()
    theirs = torch.from_numpy(np.asarray(W @ x.numpy().ravel()))
    assert error(theirs, A.A(x.double()).flatten()) < 1e-5


def test_arguments_are_checked() -> None:
    assert dr.Tomography((1, 4, 4), 3).geometry.angles == (0.0, 60.0, 120.0)
    assert (
        dr.Tomography((1, 4, 4), torch.tensor([0.0, 60.0, 120.0])).fingerprint()
        == dr.Tomography((1, 4, 4), 3).fingerprint()
    )
    for wrong in (0, [], "many", [0.0, math.nan], True):
        with pytest.raises(InputError, match="angle"):
            dr.Tomography((1, 4, 4), wrong)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="detectors"):
        dr.Tomography((1, 4, 4), 3, 0)
