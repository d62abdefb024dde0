"""Operators of every kind against explicit matrices; per-image parameters; recovery; the recovery as a layer."""

from __future__ import annotations

import copy
import json
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import deepreg_fast as dr
from deepreg_fast.errors import DataError, InputError
from deepreg_fast.inverse.data_term import initial_point
from deepreg_fast.inverse.measurements import load_measurements, save_measurements
from deepreg_fast.inverse.problem import build_operator, operator_measuring
from deepreg_fast.operators import LinearOperator, from_description, gaussian_kernel, motion_kernel
from deepreg_fast.problem import PROBLEMS, Problem

from .helpers import images, normal

F64 = torch.float64
pytestmark = pytest.mark.filterwarnings("ignore:The kernel")


def kernel(h: int, w: int, seed: int = 0, batch: tuple[int, ...] = ()) -> torch.Tensor:
    k = torch.rand(*batch, h, w, generator=torch.Generator().manual_seed(seed), dtype=F64)
    return k / k.sum((-2, -1), keepdim=True)


def mask(*shape: int, seed: int = 0) -> torch.Tensor:
    m = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    m[..., 0, 0] = True
    return m


def coils(*shape: int) -> torch.Tensor:
    return torch.complex(normal(*shape, seed=5), normal(*shape, seed=6)) / 2.0


OPERATORS: dict[str, Callable[[], LinearOperator]] = {
    "srm-dct": lambda: dr.SRM((1, 6, 7), 0.4),
    "srm-hadamard": lambda: dr.SRM((2, 4, 12), 0.3, transform="hadamard", randomizer="both"),
    "srm-walsh": lambda: dr.SRM((1, 8, 6), 0.5, transform="walsh", randomizer="permutation"),
    "identity": lambda: dr.Identity((1, 5, 6)),
    **{f"blur-{b}": lambda b=b: dr.Blur((2, 7, 8), kernel(3, 5), b) for b in ("circular", "valid", "reflect", "zero")},
    "blur-even": lambda: dr.Blur((1, 7, 8), kernel(4, 2), "reflect"),
    "blur-per-image": lambda: dr.Blur((2, 6, 5), kernel(3, 3, batch=(3, 2))),
    "super-resolution": lambda: dr.SuperResolution((1, 9, 6), kernel(3, 4), 3),
    "super-resolution-per-image": lambda: dr.SuperResolution((1, 6, 8), kernel(3, 3, batch=(3, 1)), 2),
    "super-resolution-valid": lambda: dr.SuperResolution((1, 8, 9), kernel(3, 3), 2, "valid"),
    "inpainting": lambda: dr.Inpainting(mask(2, 5, 6)),
    "inpainting-per-image": lambda: dr.Inpainting(mask(3, 1, 5, 6)),
    "demosaicing": lambda: dr.Demosaicing((3, 5, 4), "grbg"),
    "fourier": lambda: dr.FourierSampling(mask(1, 6, 7)),
    "fourier-per-image": lambda: dr.FourierSampling(mask(3, 2, 5, 4)),
    "tomography": lambda: dr.Tomography((2, 5, 7), 4),
    "tomography-oblique": lambda: dr.Tomography((1, 6, 4), [3.0, 77.0, 135.0, 200.0, 290.5, -20.0], 7),
    "mri": lambda: dr.MRI(mask(5, 6)),
    "mri-per-image": lambda: dr.MRI(mask(3, 1, 4, 5)),
    "mri-coils": lambda: dr.MRI(mask(3, 1, 4, 5), coils(3, 4, 5)),
    "mri-coils-per-image": lambda: dr.MRI(mask(5, 4), coils(3, 2, 5, 4)),
    "composition": lambda: dr.Inpainting(mask(3, 1, 6, 6)) @ dr.Blur((1, 6, 6), kernel(3, 3)),
    "composition-closed": lambda: dr.SRM((1, 6, 6), 0.5) @ (2.0 * flat_identity((1, 6, 6))),
    "scaled": lambda: -1.5 * dr.FourierSampling(mask(1, 6, 5)),
    "stack": lambda: dr.Stack([dr.Blur((1, 6, 5), kernel(3, 3)), 0.5 * dr.Inpainting(mask(3, 1, 6, 5))]),
}


def flat_identity(shape: tuple[int, int, int]) -> LinearOperator:
    """The identity with image-shaped measurements: an unmasked inpainting, whose `A A^T = I` is not declared."""
    A = dr.Inpainting(torch.ones(shape))
    A.gram_scale = 1.0
    return A


def dense(A: LinearOperator, i: int) -> torch.Tensor:
    """The matrix of image i, from the products with unit images."""
    d = int(np.prod(A.image_shape))
    part = A.select(torch.full((d,), i))
    return part.A(torch.eye(d, dtype=F64).reshape(d, *A.image_shape)).flatten(1).T


def flat(t: torch.Tensor, i: int) -> torch.Tensor:
    return t[i].flatten()


@pytest.mark.parametrize("name", OPERATORS)
def test_every_operator_is_its_matrix(name: str) -> None:
    check_operator(OPERATORS[name]())


def check_operator(A: LinearOperator) -> None:
    """Products, adjoint, inverses and proximal map against the operator's matrices, in float64."""
    x, y = images(3, *A.image_shape), normal(3, *A.measurement_shape)
    c = torch.tensor([0.02, 0.4, 7.0], dtype=F64)
    assert A.A(x).shape == y.shape and A.measurements == y[0].numel()
    shifted, gram, prox = A.shifted_inverse(x, c), A.gram_solve(y, c), A.prox_l2(x, y, 1.0 / c)
    largest = 0.0
    for i in range(3):
        M = dense(A, i)
        eye, small = torch.eye(M.shape[1], dtype=F64), torch.eye(M.shape[0], dtype=F64)
        u, v = flat(x, i), flat(y, i)
        pairs = {
            "A": (A.A(x), M @ u, 1e-12),
            "adjoint": (A.A_adjoint(y), M.T @ v, 1e-12),
            "normal": (A.normal(x), M.T @ M @ u, 1e-12),
            # Solutions are up to 1/c = 50 times as large as x and y.
            "shifted": (shifted, torch.linalg.solve(M.T @ M + c[i] * eye, u), 1e-10),
            "gram": (gram, torch.linalg.solve(M @ M.T + c[i] * small, v), 1e-10),
            "prox": (prox, torch.linalg.solve(eye + M.T @ M / c[i], u + M.T @ v / c[i]), 1e-10),
        }
        for what, (got, want, tolerance) in pairs.items():
            assert (flat(got, i) - want).abs().max() <= tolerance, (what, i)
        largest = max(largest, float(torch.linalg.matrix_norm(M, 2) ** 2))
        if A.gram_scale is not None:
            torch.testing.assert_close(M @ M.T, A.gram_scale * small, rtol=0, atol=1e-12)
    assert A.sqnorm() == pytest.approx(largest, rel=1e-9)
    assert torch.equal(A.prox_l2(x, y, 0.0), x) or (A.prox_l2(x, y, 0.0) - x).abs().max() <= 1e-14


@pytest.mark.parametrize("name", OPERATORS)
def test_neighbors_change_no_bit(name: str) -> None:
    A = OPERATORS[name]()
    x, y = images(3, *A.image_shape).float(), normal(3, *A.measurement_shape).float()
    c = torch.tensor([0.02, 0.4, 7.0])
    calls: dict[str, Callable[[LinearOperator, torch.Tensor], torch.Tensor]] = {
        "A": lambda P, i: P.A(x[i]),
        "adjoint": lambda P, i: P.A_adjoint(y[i]),
        "normal": lambda P, i: P.normal(x[i]),
        "shifted": lambda P, i: P.shifted_inverse(x[i], c[i]),
        "gram": lambda P, i: P.gram_solve(y[i], c[i]),
        "prox": lambda P, i: P.prox_l2(x[i], y[i], c[i]),
    }
    everything = torch.arange(3)
    for what, call in calls.items():
        whole = call(A, everything)
        for rows in ([0], [1], [2], [0, 2], [2, 1]):
            i = torch.tensor(rows)
            assert torch.equal(call(A.select(i), i), whole[i]), (what, rows)


@pytest.mark.parametrize("name", OPERATORS)
def test_descriptions_and_measurement_files(name: str, tmp_path: Path) -> None:
    A = OPERATORS[name]()
    if name == "composition-closed":
        pytest.skip("its identity declares gram_scale on an object, which no description holds")
    B = from_description(json.loads(json.dumps(A.describe())))
    x = images(3, *A.image_shape)
    assert B.fingerprint() == A.fingerprint() and torch.equal(A.A(x), B.A(x))
    for suffix in ("npz", "safetensors"):
        save_measurements(tmp_path / f"y.{suffix}", A.A(x), A, 0.1)
        y, C, sigma = load_measurements(tmp_path / f"y.{suffix}")
        assert torch.equal(y, A.A(x)) and C.fingerprint() == A.fingerprint() and sigma == 0.1


@settings(max_examples=25)
@given(
    size=st.tuples(st.integers(1, 3), st.integers(3, 9), st.integers(3, 9)),
    taps=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    boundary=st.sampled_from(("circular", "valid", "reflect", "zero")),
    per_image=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_blur_of_any_size_is_a_convolution(
    size: tuple[int, int, int], taps: tuple[int, int], boundary: str, per_image: bool, seed: int
) -> None:
    c, h, w = size
    k = kernel(*taps, seed=seed, batch=(2, c) if per_image else ())
    A = dr.Blur(size, k, boundary)
    x, y = images(2, *size), normal(2, *A.measurement_shape)
    full = k if per_image else k.expand(2, c, *taps)
    out = A.A(x)
    # The definition, pixel by pixel.
    top, left = taps[0] // 2, taps[1] // 2
    oy, ox = (taps[0] - 1 - top, taps[1] - 1 - left) if boundary == "valid" else (0, 0)
    rng = np.random.default_rng(seed)
    for b, ch, i, j in [[int(rng.integers(n)) for n in out.shape] for _ in range(5)]:
        total = 0.0
        for p in range(taps[0]):
            for q in range(taps[1]):
                r, s = i + oy - p + top, j + ox - q + left
                if boundary == "circular":
                    r, s = r % h, s % w
                elif boundary == "reflect":
                    r, s = h - 1 - abs(h - 1 - abs(r)), w - 1 - abs(w - 1 - abs(s))
                inside = 0 <= r < h and 0 <= s < w
                total += float(full[b, ch, p, q] * x[b, ch, r, s]) if inside else 0.0
        assert float(out[b, ch, i, j]) == pytest.approx(total, abs=1e-13)
    assert float((A.A(x) * y).sum()) == pytest.approx(float((x * A.A_adjoint(y)).sum()), abs=1e-11)


def test_fourier_sampling_is_the_centered_transform() -> None:
    m, x = mask(1, 6, 7), images(2, 1, 6, 7)
    z = torch.fft.fftshift(torch.fft.fft2(torch.fft.ifftshift(x, dim=(2, 3)), norm="ortho"), dim=(2, 3)) * m
    y = dr.FourierSampling(m).A(x)
    torch.testing.assert_close(torch.complex(y[:, :1], y[:, 1:]), z, rtol=0, atol=1e-14)
    shown = dr.FourierSampling(m).as_image(y)
    assert shown.shape == x.shape and bool((shown[..., 3, 3] == shown.amax((2, 3))).all())


def test_kernels() -> None:
    g = gaussian_kernel(25, 1.6)
    assert g.shape == (25, 25) and float(g.sum()) == pytest.approx(1.0) and torch.equal(g, g.T)
    assert float(g[12, 13] / g[12, 12]) == pytest.approx(np.exp(-0.5 / 1.6**2))
    for angle, axis in ((0, 1), (90, 0)):
        m = motion_kernel(9, angle)
        assert m.shape[1 - axis] in (1, 3) and m.shape[axis] == 9
        assert torch.allclose(m.sum(1 - axis), torch.full((9,), 1 / 9, dtype=F64))
    m = motion_kernel(30, 45)
    assert float(m[1, -2]) > 0 and float(m[1, 1]) == 0 and float(m.sum()) == pytest.approx(1.0)
    assert torch.equal(m, m.flip(0, 1))


# -- recovery ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in OPERATORS if n != "composition-closed"])
@pytest.mark.parametrize("step", ["prox", "gradient"])
def test_a_recovery_is_a_stationary_point_and_independent_of_its_neighbors(name: str, step: str) -> None:
    A = OPERATORS[name]()
    y = A.A(images(3, *A.image_shape)) + 0.02 * normal(3, *A.measurement_shape)
    # Strongly convex and smooth, so that few iterations are enough.
    reg = dr.RED(channels=2, image_channels=A.image_shape[0], head="residual", alpha=1.0, seed=0).double()
    mu = torch.tensor([0.1, 0.3, 1.0], dtype=F64)
    options = dr.PGDOptions(300, 1e-6, acceleration="anderson", data_step=step)
    sol = dr.recover(y, A, reg, mu, options=options)
    assert sol.status.tolist() == [0, 0, 0]
    slope = A.A_adjoint(A.A(sol.x) - y) / mu.reshape(-1, 1, 1, 1) + reg.value_and_grad(sol.x)[1]
    scale = reg.value_and_grad(initial_point(y, A, reg))[1].flatten(1).norm(dim=1) + y.flatten(1).norm(dim=1) / mu
    assert bool((slope.flatten(1).norm(dim=1) <= 2e-6 * scale).all())
    # Another order, and a neighbor that ends at once.
    order = torch.tensor([1, 2, 0])
    y[0] = torch.nan
    other = dr.recover(y[order], A.select(order), reg, mu[order], options=options)
    assert torch.equal(other.x[:2], sol.x[1:]) and other.status.tolist() == [0, 0, int(dr.Status.NON_FINITE)]


def test_the_start_does_not_amplify_noise() -> None:
    """`A^+ y` of a blur divides the noise by `|K|`, which is nearly zero."""
    A, x = dr.Blur((1, 32, 32), gaussian_kernel(15, 2.0)), images(2, 1, 32, 32)
    y = dr.add_noise(A.A(x), 0.02, seed=1)
    start = initial_point(y, A, dr.TV())
    assert (start - x).norm() < (A.A_dagger(y) - x).norm() / 100 and (start - x).norm() < 0.5 * x.norm()
    B = dr.SRM((1, 32, 32), 0.4)
    c = torch.full_like(x, 0.5)
    assert torch.equal(initial_point(B.A(x), B, dr.RED(channels=2).double()), c + B.A_adjoint(B.A(x) - B.A(c)))


def test_a_prox_that_cg_cannot_solve_is_the_status_of_its_image() -> None:
    class NoAdjoint(LinearOperator):
        """For the second image, the adjoint has the wrong sign: the system is not definite."""

        per_image = ("sign",)

        def __init__(self) -> None:
            super().__init__((1, 4, 4), (1, 4, 4))
            self.register_buffer("sign", torch.tensor([1.0, -1.0]).reshape(2, 1, 1, 1))
            self.batch = 2

        def _forward(self, x: torch.Tensor) -> torch.Tensor:
            return 3.0 * x

        def _adjoint(self, y: torch.Tensor) -> torch.Tensor:
            return 3.0 * self.sign * y  # type: ignore[operator]

    A, z = NoAdjoint(), images(2, 1, 4, 4).float()
    y = A.A(images(2, 1, 4, 4, seed=1).float())
    prox = A.prox_l2(z, y, 1.0)
    assert bool(torch.isfinite(prox[0]).all()) and bool(torch.isnan(prox[1]).all())
    sol = dr.recover(y, A, dr.TV(), 1e-3, x0=z)
    failed = (int(dr.Status.NON_FINITE), int(dr.Status.RUNAWAY))
    assert sol.status[0] == 0 and int(sol.status[1]) in failed and bool(torch.isfinite(sol.x).all())


def test_parameters_of_other_images_are_refused() -> None:
    A = dr.Inpainting(mask(3, 1, 5, 6))
    with pytest.raises(InputError, match="must hold 3 images"):
        A.A(images(2, 1, 5, 6))
    with pytest.raises(InputError, match="3 images"):
        dr.recover(torch.zeros(2, 1, 5, 6), A, dr.TV(), 0.1)
    assert A.select(torch.tensor([2, 0])).batch == 2
    with pytest.raises(InputError, match="one number of images"):
        dr.Stack([A, dr.Inpainting(mask(2, 1, 5, 6))])


# -- the layer ---------------------------------------------------------------------------------------------------------

SOLVE = dr.PGDOptions(2000, 1e-10, acceleration="anderson")
ADJOINT = dr.ImplicitAdjoint(dr.CGOptions(400, 1e-10), bound=1e9)

LAYERS: dict[str, Callable[[], LinearOperator]] = {
    "srm": lambda: dr.SRM((1, 4, 4), 0.5),
    "blur-valid": lambda: dr.Blur((1, 4, 4), kernel(2, 1), "valid"),
    "super-resolution-per-image": lambda: dr.SuperResolution((1, 4, 4), kernel(3, 3, batch=(2, 1)), 2),
    "inpainting-per-image": lambda: dr.Inpainting(mask(2, 1, 4, 4)),
    "fourier": lambda: dr.FourierSampling(mask(1, 4, 4)),
    "tomography": lambda: 0.3 * dr.Tomography((1, 4, 4), 2),
}


@pytest.mark.parametrize("name", LAYERS)
def test_the_layer_passes_gradcheck(name: str) -> None:
    A = LAYERS[name]()
    batch = A.batch or 2
    reg = dr.RED(channels=2, image_channels=A.image_shape[0], head="residual", alpha=0.5, seed=0).double()
    with torch.no_grad():
        for i, p in enumerate(reg.parameters()):
            p.add_(0.1 * normal(*p.shape, seed=i))
    y = (A.A(images(batch, *A.image_shape)) + 0.05 * normal(batch, *A.measurement_shape)).requires_grad_()
    mu = torch.linspace(0.1, 0.3, batch, dtype=F64).requires_grad_()
    theta = [p for p in reg.parameters() if p.requires_grad]

    def f(y: torch.Tensor, mu: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        return dr.ops.recover(y, A, reg, mu, options=SOLVE, adjoint=ADJOINT)

    # In one random direction: a full Jacobian would take hundreds of recoveries.
    assert torch.autograd.gradcheck(f, (y, mu, *theta), eps=1e-5, atol=1e-5, rtol=1e-4, fast_mode=True)


def test_the_layer_is_the_recovery_and_its_hypergradient() -> None:
    A, x = dr.SRM((1, 8, 8), 0.5), images(2, 1, 8, 8)
    reg, y = dr.Ridge(filters=3, kernel_size=3).double(), A.A(images(2, 1, 8, 8)).requires_grad_()
    mu = torch.tensor(0.1, dtype=F64, requires_grad=True)
    x_hat, sol = dr.ops.recover(y, A, reg, mu, return_solution=True)
    assert torch.equal(x_hat, sol.x) and sol.status.tolist() == [0, 0]
    (x_hat - x).square().sum().backward()
    hg = dr.hypergradient(x, y.detach(), A, reg, 0.1)
    for n, p in reg.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.grad, hg.theta[n])
    torch.testing.assert_close(mu.grad * mu.detach(), hg.log_mu)


def test_a_failing_image_is_told_and_masked() -> None:
    A, reg = dr.SRM((1, 8, 8), 0.5), dr.Ridge(filters=2, kernel_size=3)
    x = images(3, 1, 8, 8).float()
    y = A.A(x)
    y[1, 3] = torch.nan
    y.requires_grad_()
    with pytest.warns(UserWarning, match="1 of 3 images failed"):
        out = dr.ops.recover(y, A, reg, 0.1)
    (out - x).square().sum().backward()
    assert y.grad is not None and bool(torch.isfinite(y.grad).all()) and bool((y.grad[1] == 0).all())
    assert all(bool(torch.isfinite(p.grad).all()) for p in reg.parameters() if p.grad is not None)
    alone = y.detach()[[0, 2]].requires_grad_()
    (dr.ops.recover(alone, A, reg, 0.1) - x[[0, 2]]).square().sum().backward()
    torch.testing.assert_close(y.grad[[0, 2]], alone.grad)


def test_the_layer_notices_parameters_that_changed() -> None:
    A, reg = dr.SRM((1, 8, 8), 0.5), dr.Ridge(filters=2, kernel_size=3)
    out = dr.ops.recover(A.A(images(1, 1, 8, 8).float()), A, reg, 0.1)
    with torch.no_grad():
        next(p for p in reg.parameters() if p.requires_grad).mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


# -- problems by name and from files -----------------------------------------------------------------------------------


@pytest.mark.parametrize("problem", PROBLEMS)
def test_named_problems(problem: str) -> None:
    A = build_operator(problem, (1, 36, 42))
    assert A.image_shape == (1, 36, 42) and A.has_shifted_inverse == (problem != "ct")
    assert A.fingerprint() == build_operator(problem, (1, 36, 42)).fingerprint()
    x = images(2, 1, 36, 42)
    assert A.as_image(A.A(x)).ndim == 4
    if problem in ("inpaint", "fourier"):
        share = A.mask.double().mean()  # type: ignore[union-attr]
        assert float(share) == pytest.approx(0.5 if problem == "inpaint" else 0.25, abs=1e-3)
        assert A.fingerprint() != build_operator(Problem(problem, operator_seed=1), (1, 36, 42)).fingerprint()


def test_problems_from_files(tmp_path: Path) -> None:
    k = np.zeros((5, 7), np.uint8)
    k[2], k[:, 3] = 120, 240
    Image.fromarray(k).save(tmp_path / "kernel.png")
    A = build_operator(str(tmp_path / "kernel.png"), (1, 16, 16))
    assert isinstance(A, dr.Blur) and float(A.kernel.sum()) == pytest.approx(1.0)
    (tmp_path / "p.json").write_text(json.dumps({"kind": "blur", "kernel": "kernel.png", "boundary": "valid"}))
    B = build_operator(str(tmp_path / "p.json"), (1, 16, 16))
    assert isinstance(B, dr.Blur) and B.boundary == "valid" and torch.equal(A.kernel, B.kernel)
    (tmp_path / "p.json").write_text(json.dumps({"kind": "inpainting", "mask": [[1, 0], [0, 1]]}))
    C = build_operator(str(tmp_path / "p.json"), (3, 2, 2))
    assert C.image_shape == (3, 2, 2)
    for text, sentence in (
        ("[1", "must be a JSON file"),
        ("[]", "must hold an object"),
        ('{"kind": "radon"}', "kind must be one of"),
        ('{"kind": "inpainting", "mask": [[1, 0], [0, 1]]}', "crop the images"),
    ):
        (tmp_path / "p.json").write_text(text)
        with pytest.raises((InputError, DataError), match=sentence):
            build_operator(str(tmp_path / "p.json"), (1, 16, 16))
    with pytest.raises(InputError, match="no such file"):
        build_operator("deblurr", (1, 16, 16))


BAD = [
    (lambda: dr.Blur((1, 4, 4), torch.ones(5, 5) / 25), "must not be larger than the images"),
    (lambda: dr.Blur((1, 8, 8), torch.zeros(3, 3)), "not all zero"),
    (lambda: dr.Blur((1, 8, 8), torch.full((3, 3), torch.nan)), "finite"),
    (lambda: dr.Blur((1, 8, 8), torch.ones(3)), r"\[h, w\]"),
    (lambda: dr.Blur((2, 8, 8), torch.ones(1, 3, 3, 3) / 9), "1 or 2 channels"),
    (lambda: dr.Blur((1, 8, 8), torch.ones(3, 3) / 9, "periodic"), "boundary must be one of"),
    (lambda: dr.SuperResolution((1, 9, 8), torch.ones(3, 3) / 9, 2), "crop them to 8 x 8"),
    (lambda: dr.SuperResolution((1, 8, 8), torch.ones(3, 3) / 9, 0), "factor must be an integer"),
    (lambda: dr.Inpainting(torch.ones(4, 4)), r"\[C, H, W\]"),
    (lambda: dr.Inpainting(torch.full((1, 4, 4), 0.5)), "zeros and ones"),
    (lambda: dr.Inpainting(torch.zeros(1, 4, 4)), "keeps none"),
    (lambda: dr.FourierSampling(torch.zeros(1, 4, 4)), "keeps none"),
    (lambda: dr.Demosaicing((1, 4, 4)), r"\(3, H, W\)"),
    (lambda: dr.Inpainting(mask(1, 4, 4)).A(torch.zeros(1, 1, 5, 4)), r"shape \[1, 4, 4\]"),
    (lambda: dr.Inpainting(mask(1, 4, 4)).A_adjoint(torch.zeros(1, 16)), "another operator"),
    (lambda: dr.SRM((1, 4, 4)) @ dr.SRM((1, 4, 4)), "like the images of A"),
    (lambda: 0.0 * dr.SRM((1, 4, 4)), "factor must not be zero"),
    (lambda: dr.Stack([]), "at least one operator"),
    (lambda: dr.Stack([dr.SRM((1, 4, 4)), dr.SRM((1, 4, 5))]), "one shape"),
    (lambda: dr.PGDOptions(data_step="both"), "data_step must be one of"),
]


@pytest.mark.parametrize(("call", "sentence"), BAD)
def test_bad_input_gets_one_sentence(call: Callable[[], object], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        call()


def test_kernels_to_wonder_at_are_told() -> None:
    with pytest.warns(UserWarning, match=r"its center is entry \(2, 1\)"):
        dr.Blur((1, 8, 8), kernel(4, 3))
    with pytest.warns(UserWarning, match="sums to 9"):
        dr.Blur((1, 8, 8), torch.ones(3, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dr.Blur((1, 8, 8), torch.ones(3, 3) / 9)


def test_operators_for_pictures_that_were_measured(tmp_path: Path) -> None:
    k = np.full((5, 3), 200, np.uint8)
    Image.fromarray(k).save(tmp_path / "kernel.png")
    A = operator_measuring(str(tmp_path / "kernel.png"), (1, 12, 14))
    assert A.image_shape == (1, 16, 16) and A.measurement_shape == (1, 12, 14)
    assert operator_measuring("sr3", (1, 12, 14)).image_shape == (1, 36, 42)
    assert operator_measuring("inpaint", (1, 12, 14)).image_shape == (1, 12, 14)
    (tmp_path / "p.json").write_text(json.dumps({"kind": "blur", "kernel": "kernel.png", "boundary": "valid"}))
    assert operator_measuring(str(tmp_path / "p.json"), (1, 12, 14)).image_shape == (1, 16, 16)
    with pytest.raises(InputError, match="no image size gives that"):
        operator_measuring("cs", (1, 12, 14))


@pytest.mark.parametrize("name", ["blur-circular", "fourier", "super-resolution"])
def test_stored_transforms_follow_their_tensors(name: str) -> None:
    A = OPERATORS[name]()
    x, y = images(2, *A.image_shape), normal(2, *A.measurement_shape)
    first = A.prox_l2(x, y, 2.0)
    assert torch.equal(A.prox_l2(x, y, 2.0), first)
    y.mul_(-1.0)
    changed = A.prox_l2(x, y, 2.0)
    assert torch.equal(changed, OPERATORS[name]().prox_l2(x, y.clone(), 2.0)) and not torch.equal(changed, first)
    B = copy.deepcopy(A)
    with torch.no_grad():
        for buffer in B.buffers():
            buffer.copy_(buffer.roll(1, -1))
    assert not torch.equal(B.prox_l2(x, y, 2.0), changed) and torch.equal(A.prox_l2(x, y, 2.0), changed)
    assert torch.equal(pickle.loads(pickle.dumps(A)).prox_l2(x, y, 2.0), changed)


@pytest.mark.parametrize("name", OPERATORS)
def test_inference_mode_changes_no_bit(name: str) -> None:
    def products() -> list[torch.Tensor]:
        A = OPERATORS[name]()
        x, y = images(3, *A.image_shape), normal(3, *A.measurement_shape)
        part = A.select(torch.tensor([1, 2]))
        return [A.A(x), A.A_adjoint(y), A.prox_l2(x, y, 2.0), part.prox_l2(x[1:], y[1:], 2.0), A.sqnorms()]

    with torch.inference_mode():
        inside = products()
    assert all(torch.equal(a, b) for a, b in zip(inside, products(), strict=True))
