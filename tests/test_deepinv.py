"""The bridges to deepinv: its physics as operators, and our operators, priors and recovery in its algorithms."""

from __future__ import annotations

import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import deepreg_fast as dr
from deepreg_fast.adapters.deepinv import package
from deepreg_fast.errors import InputError

from .helpers import images, normal, random_red

if not package.available():
    pytest.skip("deepinv cannot be imported", allow_module_level=True)
deepinv: Any = package.deepinv()
P: Any = deepinv.physics

pytestmark = [
    pytest.mark.filterwarnings("ignore:The kernel"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:At least one input physics"),
]
BOUNDARIES = {"circular": "circular", "valid": "valid", "reflect": "reflect", "constant": "zero"}
REPLICATE = [*BOUNDARIES, "replicate"]
Case = Callable[[], tuple[Any, tuple[int, int, int]]]


def kernel(h: int, w: int, batch: tuple[int, ...] = (1, 1)) -> torch.Tensor:
    k = images(*batch, h, w)
    return k / k.sum((-2, -1), keepdim=True)


def mask(*shape: int, seed: int = 0) -> torch.Tensor:
    m = images(*shape, seed=seed, dtype=torch.float32) < 0.5
    m[..., 0, 0] = True
    return m


def rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def filters(count: int) -> torch.Tensor:
    return kernel(3, 4).float()[:, :, None].repeat(1, 1, count, 1, 1)


def _virtual() -> tuple[Any, tuple[int, int, int]]:
    size = (1, 8, 8)
    inner = P.Inpainting(size, mask=0.5, rng=rng())
    rotate = deepinv.transform.Rotate(n_trans=4, multiples=90, positive=True)
    parameters = rotate.iterate_params(rotate.get_params(torch.zeros(1, *size)))
    return P.VirtualLinearPhysics(physics=inner, transform=rotate, g_params=next(iter(parameters))), size


def _coils() -> tuple[Any, tuple[int, int, int]]:
    maps = torch.complex(normal(1, 3, 7, 6), normal(1, 3, 7, 6, seed=2)).to(torch.complex64) / 3
    return P.MultiCoilMRI(coil_maps=maps, mask=mask(1, 1, 7, 6).float(), img_size=(2, 7, 6)), (2, 7, 6)


def _pansharpen(padding: str, name: str | None) -> tuple[Any, tuple[int, int, int]]:
    size = (3, 12, 16)
    return P.Pansharpen(img_size=size, padding=padding, filter=name, use_brovey=False), size


CASES: dict[str, Case] = {
    "CS": lambda: (P.CompressedSensing(m=20, img_size=(1, 7, 6), rng=rng()), (1, 7, 6)),
    "complex_CS": lambda: (
        P.CompressedSensing(m=15, img_size=(1, 5, 5), dtype=torch.cdouble, compute_inverse=True, rng=rng()),
        (1, 5, 5),
    ),
    "inpainting": lambda: (P.Inpainting((2, 7, 6), mask=0.5, rng=rng()), (2, 7, 6)),
    "inpainting-entries": lambda: (P.Inpainting((2, 7, 6), mask=0.5, pixelwise=False, rng=rng()), (2, 7, 6)),
    "weights": lambda: (P.Inpainting((1, 7, 6), mask=images(1, 7, 6).float()), (1, 7, 6)),
    "demosaicing": lambda: (P.Demosaicing((3, 8, 6)), (3, 8, 6)),
    "denoising": lambda: (P.Denoising(P.GaussianNoise(0.1)), (1, 7, 6)),
    "colorize": lambda: (P.Decolorize(), (3, 7, 6)),
    "fftdeblur": lambda: (P.BlurFFT((2, 9, 8), filter=kernel(3, 4).float()), (2, 9, 8)),
    **{f"deblur-{p}": lambda p=p: (P.Blur(kernel(3, 4).float(), padding=p), (2, 9, 8)) for p in REPLICATE},
    **{
        f"deblur-fft-{p}": lambda p=p: (P.Blur(kernel(3, 3).float(), padding=p, use_fft=True), (2, 9, 8))
        for p in BOUNDARIES
    },
    **{
        f"space-{p}": lambda p=p: (
            P.SpaceVaryingBlur(filters=filters(2), multipliers=images(1, 1, 2, 9, 8).float(), padding=p),
            (1, 9, 8),
        )
        for p in REPLICATE
    },
    "tiled": lambda: (P.TiledSpaceVaryingBlur(filters=filters(16), patch_size=(8, 5), stride=(4, 3)), (1, 20, 13)),
    "unmixing": lambda: (P.HyperSpectralUnmixing(E=4, C=6), (4, 5, 6)),
    **{
        f"super-resolution-{p}": lambda p=p: (
            P.Downsampling(img_size=(1, 12, 12), factor=2, padding=p, filter="bilinear"),
            (1, 12, 12),
        )
        for p in REPLICATE
    },
    **{
        f"upsampling-{p}": lambda p=p: (
            P.Upsampling(img_size=(1, 12, 12), factor=2, padding=p, filter="bilinear"),
            (1, 6, 6),
        )
        for p in REPLICATE
        if p != "valid"
    },
    "decimation": lambda: (P.Downsampling(img_size=(1, 8, 8), factor=2, filter=None), (1, 8, 8)),
    "matlab": lambda: (P.DownsamplingMatlab(factor=2), (1, 12, 12)),
    "singlepixel": lambda: (P.SinglePixelCamera(m=20, fast=False, img_size=(1, 8, 8), rng=rng()), (1, 8, 8)),
    **{
        f"singlepixel-{o}": lambda o=o: (
            P.SinglePixelCamera(m=20, fast=True, img_size=(1, 8, 8), rng=rng(), ordering=o),
            (1, 8, 8),
        )
        for o in ("sequency", "cake_cutting", "zig_zag", "xy")
    },
    "MRI": lambda: (P.MRI(img_size=(2, 7, 6), mask=mask(1, 1, 7, 6).float()), (2, 7, 6)),
    "MultiCoilMRI": _coils,
    "pansharpen-aliased": lambda: _pansharpen("circular", None),
    **{f"pansharpen-{p}": lambda p=p: _pansharpen(p, "bilinear") for p in ("circular", "valid", "reflect")},
    "structured_random": lambda: (P.StructuredRandom(img_size=(1, 8, 8), output_size=(1, 8, 8)), (1, 8, 8)),
    "cassi-ss": lambda: (P.CompressiveSpectralImaging((7, 37, 31), rng=rng(), mode="ss"), (7, 37, 31)),
    "cassi-sd": lambda: (P.CompressiveSpectralImaging((7, 37, 31), rng=rng(), mode="sd"), (7, 37, 31)),
    "ptychography": lambda: (P.PtychographyLinearOperator(img_size=(1, 32, 32), probe=None, shifts=None), (1, 32, 32)),
    "tomography": lambda: (P.Tomography(img_width=12, angles=8), (1, 12, 12)),
    "tomography-fan": lambda: (P.Tomography(img_width=12, angles=8, fan_beam=True), (1, 12, 12)),
    "virtual": _virtual,
    "composition": lambda: (
        P.Downsampling(img_size=(1, 8, 8), factor=2, filter=None) * P.BlurFFT((1, 8, 8), filter=kernel(3, 3).float()),
        (1, 8, 8),
    ),
    "stack": lambda: (
        P.Blur(kernel(3, 3).float(), padding="valid").stack(P.Inpainting((1, 8, 8), mask=0.5, rng=rng())),
        (1, 8, 8),
    ),
}
CLOSED = {
    "Inpainting": ("inpainting", "inpainting-entries", "demosaicing", "denoising"),
    "Blur": ("fftdeblur", *(f"deblur-{p}" for p in BOUNDARIES), *(f"deblur-fft-{p}" for p in BOUNDARIES)),
    "SuperResolution": ("decimation", *(f"super-resolution-{p}" for p in BOUNDARIES)),
}
PROJECTIONS = ("colorize", "MRI", "structured_random", "virtual", *(n for n in CASES if n.startswith("singlepixel-")))


def norm(t: torch.Tensor) -> float:
    return float(t.detach().double().norm())


@pytest.mark.parametrize("name", CASES)
def test_every_physics_is_its_operator(name: str) -> None:
    physics, size = CASES[name]()
    A = dr.from_deepinv(physics, size)
    dtype = torch.float64 if name == "complex_CS" else torch.float32
    x = images(2, *size, dtype=dtype)
    y = A.A(x)
    theirs = physics.A(x.to(torch.cdouble) if name == "complex_CS" else x)
    assert norm(y.flatten(1) - package.flatten(theirs).flatten(1)) <= 1e-5 * norm(y)
    w, z = normal(*y.shape).to(dtype), normal(*x.shape).to(dtype)
    left, right = (A.A(x).double() * w).sum(), (x * A.A_adjoint(w).double()).sum()
    assert abs(left - right) <= 1e-5 * norm(y) * norm(w)
    assert norm(A.normal(x) - A.A_adjoint(y)) <= 1e-5 * norm(A.A_adjoint(y))
    c = 0.1 * A.sqnorm()
    v = A.shifted_inverse(x, c)
    assert norm(A.normal(v) + c * v - x) <= 1e-4 * norm(x)
    r = A.gram_solve(w, c)
    assert norm(A.A(A.A_adjoint(r)) + c * r - w) <= 1e-4 * norm(w)
    for gamma in (1 / c, torch.tensor([0.1 / c, 10 / c], dtype=dtype)):
        p = A.prox_l2(z, w, gamma)
        g = gamma.reshape(-1, 1, 1, 1) if isinstance(gamma, torch.Tensor) else gamma
        pull = g * A.A_adjoint(A.A(p) - w)
        assert norm(p - z + pull) <= 1e-4 * (norm(z) + norm(pull))
    kind = next((k for k, names in CLOSED.items() if name in names), "PhysicsOperator")
    assert type(A).__name__ == kind
    if kind == "PhysicsOperator":
        assert A.has_shifted_inverse == (name in PROJECTIONS)
        with pytest.raises(InputError, match="torch.save"):
            A.describe()
        assert len(A.fingerprint()) == 64
    if name in PROJECTIONS:
        assert norm(A.A(A.A_dagger(y)) - y) <= 1e-4 * norm(y)
        assert A.sqnorm() == pytest.approx(float(physics.compute_sqnorm(x[:1], tol=1e-6, verbose=False)), rel=1e-3) or (
            name == "virtual"
        )


@pytest.mark.parametrize("padding", BOUNDARIES)
@pytest.mark.parametrize("taps", [(3, 3), (4, 4), (4, 3), (4, 5)])
def test_our_blur_is_theirs(padding: str, taps: tuple[int, int]) -> None:
    k = kernel(*taps)
    x = images(2, 2, 9, 8)
    A, physics = dr.Blur((2, 9, 8), k, BOUNDARIES[padding]), P.Blur(k, padding=padding)
    y = A.A(x)
    torch.testing.assert_close(y, physics.A(x), rtol=0, atol=1e-14)
    torch.testing.assert_close(A.A_adjoint(y), physics.A_adjoint(y), rtol=0, atol=1e-14)
    small = dr.SuperResolution((2, 8, 8), k, 2, BOUNDARIES[padding])
    down = P.Downsampling(img_size=(2, 8, 8), filter=k, factor=2, padding=padding)
    torch.testing.assert_close(small.A(x[:, :, :8]), down.A(x[:, :, :8]), rtol=0, atol=1e-14)
    if padding == "circular":
        whole = P.BlurFFT((2, 9, 8), filter=k)
        torch.testing.assert_close(y, whole.A(x), rtol=0, atol=1e-14)
        torch.testing.assert_close(A.prox_l2(x, y, 0.7), whole.prox_l2(x, y, 0.7), rtol=0, atol=1e-12)
        torch.testing.assert_close(
            small.prox_l2(x[:, :, :8], small.A(x[:, :, :8]), 0.7),
            down.prox_l2(x[:, :, :8], small.A(x[:, :, :8]), 0.7),
            rtol=0,
            atol=1e-12,
        )


def test_our_samples_are_those_of_their_mri() -> None:
    m = mask(9, 8)
    x = images(2, 1, 9, 8)
    physics = P.MRI(img_size=(2, 9, 8), mask=m.double())
    A = dr.FourierSampling(m)
    y = A.A(x)
    torch.testing.assert_close(y, physics.A(torch.cat([x, torch.zeros_like(x)], 1)), rtol=0, atol=1e-14)
    torch.testing.assert_close(A.A_adjoint(y), physics.A_adjoint(y)[:, :1], rtol=0, atol=1e-14)


OURS: dict[str, Callable[[], dr.LinearOperator]] = {
    "srm": lambda: dr.SRM((2, 8, 6), 0.4, randomizer="both"),
    "srm-hadamard": lambda: dr.SRM((1, 8, 4), 0.4, transform="hadamard"),
    "blur": lambda: dr.Blur((1, 8, 6), kernel(3, 4)),
    "blur-valid": lambda: dr.Blur((1, 8, 6), kernel(3, 3), "valid"),
    "super-resolution": lambda: dr.SuperResolution((1, 8, 6), kernel(3, 3), 2),
    "inpainting": lambda: dr.Inpainting(mask(2, 8, 6)),
    "fourier": lambda: dr.FourierSampling(mask(8, 6)),
    "identity": lambda: dr.Identity((1, 8, 6)),
}


@pytest.mark.parametrize("name", OURS)
def test_to_deepinv_and_back(name: str) -> None:
    A = OURS[name]()
    physics = dr.to_deepinv(A)
    assert dr.from_deepinv(physics, A.image_shape) is A
    with pytest.raises(InputError, match="img_size"):
        dr.from_deepinv(physics, (3, 4, 4))
    x, z = images(2, *A.image_shape), normal(2, *A.image_shape)
    y = physics(x)
    assert y.ndim == 4 and torch.equal(y.reshape(2, *A.measurement_shape), A.A(x))
    flat = y.reshape(2, *A.measurement_shape)
    assert torch.equal(physics.A_adjoint(y), A.A_adjoint(flat))
    assert torch.equal(physics.A_adjoint_A(x), A.normal(x)) and torch.equal(physics.A_dagger(y), A.A_dagger(flat))
    torch.testing.assert_close(physics.A_A_adjoint(y).flatten(1), A.A(A.A_adjoint(flat)).flatten(1))
    b = torch.tensor([0.5, 2.0], dtype=torch.float64)
    for gamma in (0.7, torch.tensor(0.7, dtype=torch.float64), b, b.reshape(2, 1, 1, 1)):
        own = gamma.reshape(-1) if isinstance(gamma, torch.Tensor) else gamma
        for start, point in ((z, z), (None, 0 * z), (0.5, 0 * z + 0.5)):
            torch.testing.assert_close(physics.prox_l2(start, y, gamma), A.prox_l2(point, flat, own))
    clone = physics.clone()
    assert torch.equal(clone.A(x), y) and torch.equal(clone.prox_l2(z, y, 0.3), physics.prox_l2(z, y, 0.3))
    # The solvers' gradients, by CG of deepinv's where ours is CG.
    u = y.clone().requires_grad_()
    physics.prox_l2(z, u, 0.7).square().sum().backward()
    assert u.grad is not None and bool((u.grad != 0).any())


def test_noise_and_the_mask_of_an_srm() -> None:
    torch.manual_seed(0)
    A = dr.SRM((1, 16, 16), 0.5)
    physics = dr.to_deepinv(A, noise_sigma=0.1)
    x = images(4, 1, 16, 16, dtype=torch.float32)
    assert float((physics(x) - physics.A(x)).std()) == pytest.approx(0.1, rel=0.1)
    assert float((physics.U(physics.mask * physics.V_adjoint(x)) - physics.A(x)).abs().max()) < 1e-5
    with pytest.raises(InputError, match="belongs to its rows"):
        physics.update(mask=torch.ones(1, 256))
    other = dr.to_deepinv(dr.SRM((1, 16, 16), 0.5, seed=7), noise_sigma=1.0)
    other.load_state_dict(physics.state_dict())
    assert torch.equal(other.A(x), physics.A(x))
    for bad in (-1.0, float("nan")):
        with pytest.raises(InputError, match="noise_sigma"):
            dr.to_deepinv(A, noise_sigma=bad)
    with pytest.raises(InputError, match="operator"):
        dr.to_deepinv(torch.nn.Identity())  # type: ignore[arg-type]


PER_IMAGE: dict[str, Case] = {
    "Inpainting": lambda: (P.Inpainting((1, 8, 6), mask=mask(3, 1, 8, 6).float()), (1, 8, 6)),
    "Blur": lambda: (P.Blur(kernel(3, 3, (3, 1)).float(), padding="reflect"), (1, 8, 6)),
    "BlurFFT": lambda: (P.BlurFFT((2, 8, 6), filter=kernel(3, 3, (3, 2)).float()), (2, 8, 6)),
    "replicate": lambda: (P.Blur(kernel(3, 3, (3, 1)).float(), padding="replicate"), (1, 8, 6)),
    "MRI": lambda: (P.MRI(img_size=(2, 8, 6), mask=mask(3, 1, 8, 6).float()), (2, 8, 6)),
}


@pytest.mark.parametrize("name", PER_IMAGE)
def test_parameters_for_each_image(name: str) -> None:
    physics, size = PER_IMAGE[name]()
    A = dr.from_deepinv(physics, size)
    assert A.batch == 3
    x = images(3, *size, dtype=torch.float32)
    y = A.A(x)
    torch.testing.assert_close(y, physics.A(x), rtol=0, atol=1e-6)
    part = A.select(torch.tensor([2, 0]))
    assert part.batch == 2
    torch.testing.assert_close(part.A(x[[2, 0]]), y[[2, 0]], rtol=0, atol=1e-6)
    torch.testing.assert_close(part.A_adjoint(y[[2, 0]]), A.A_adjoint(y)[[2, 0]], rtol=0, atol=1e-6)
    with pytest.raises(InputError, match="select"):
        A.A(x[:2])
    sol = dr.recover(y, A, dr.TV(0.1), mu=1e-3, options=dr.PGDOptions(5))
    assert sol.x.shape == x.shape


def test_params_go_to_a_copy() -> None:
    physics = P.Inpainting((1, 8, 6), mask=mask(1, 8, 6).float())
    before, m = physics.mask.clone(), mask(3, 1, 8, 6, seed=5)
    A = dr.from_deepinv(physics, (1, 8, 6), params={"mask": m.float()})
    assert A.batch == 3 and torch.equal(A.mask, m) and torch.equal(physics.mask, before)
    with pytest.raises(InputError, match="filter"):
        dr.from_deepinv(physics, (1, 8, 6), params={"filter": m.float()})


def _linear(A: Any, A_adjoint: Any = None) -> Any:
    return P.LinearPhysics(A=A, A_adjoint=A_adjoint, img_size=(1, 8, 8))


BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "an iradon": (lambda: P.Tomography(img_width=8, angles=6, adjoint_via_backprop=False), "transpose"),
    "one part in a thousand": (lambda: _linear(lambda x, **_: x, lambda y, **_: 1.001 * y), "transpose"),
    "one pixel": (lambda: _linear(lambda x, **_: x, lambda y, **_: y.roll(1, 3)), "transpose"),
    "nonlinear": (lambda: _linear(lambda x, **_: x**2, lambda y, **_: y), "must be linear"),
    "affine": (lambda: _linear(lambda x, **_: x + 1, lambda y, **_: y), "must be linear"),
    "random": (lambda: _linear(lambda x, **_: x * torch.rand(1), lambda y, **_: y), "deterministic"),
    "not a LinearPhysics": (lambda: P.Haze(), "LinearPhysics"),
    "no physics": (lambda: torch.nn.Identity(), "LinearPhysics"),
    "other images": (lambda: P.CompressedSensing(m=9, img_size=(1, 5, 5)), "img_size"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_wrong_physics_is_refused(name: str) -> None:
    make, message = BAD[name]
    with pytest.raises(InputError, match=message):
        dr.from_deepinv(make(), (1, 8, 8))


def test_an_adjoint_that_is_wrong_for_some_sizes_only() -> None:
    for size, wrong in (((4, 8, 8), True), ((7, 37, 31), False)):
        physics = P.CompressiveSpectralImaging(size, rng=rng(), mode="ss")
        x = images(2, *size, dtype=torch.float32)
        w = physics.A(x.flip(3))
        left, right = (physics.A(x) * w).sum(), (x * physics.A_adjoint(w)).sum()
        assert bool(abs(left - right) > 1e-3 * abs(left)) == wrong
        if wrong:
            with pytest.raises(InputError, match="transpose"):
                dr.from_deepinv(physics, size)


def test_an_exact_adjoint_is_accepted_and_a_wrong_dtype_refused() -> None:
    A = dr.from_deepinv(_linear(lambda x, **_: x.roll(1, 3)), (1, 8, 8))
    x = images(2, 1, 8, 8, dtype=torch.float32)
    assert torch.equal(A.A_adjoint(A.A(x)), x) and A.gram_scale == pytest.approx(1.0)
    B = dr.from_deepinv(P.Decolorize(), (3, 8, 8))
    with pytest.raises(InputError, match="float32"):
        B.A(images(2, 3, 8, 8))
    with pytest.raises(InputError, match="C, H, W"):
        dr.from_deepinv(P.Decolorize(), (8, 8))
    C = dr.from_deepinv(P.Decolorize().double(), (3, 8, 8))
    assert C.A(images(2, 3, 8, 8)).dtype == torch.float64


def test_the_prior_is_the_regularizer() -> None:
    reg = random_red(0, alpha=1.0)
    prior = dr.DeepInvPrior(reg)
    x = images(2, 1, 8, 8).requires_grad_()
    assert prior.explicit_prior and torch.equal(prior(x), prior.fn(x, 0.1))
    value, gradient = prior.grad(x, 0.1, get_energy=True)
    (expected,) = torch.autograd.grad(prior.fn(x).sum(), x)
    torch.testing.assert_close(gradient, expected)
    assert torch.equal(value, prior.fn(x))
    torch.autograd.gradcheck(lambda t: prior.grad(t), (x[:1, :, :3, :3].detach().requires_grad_(),))
    (prior.grad(x).square().sum()).backward()
    assert all(p.grad is not None for p in reg.parameters())
    for gamma in (0.2, torch.tensor([0.2, 0.2]), torch.tensor([0.2, 0.2]).reshape(2, 1, 1, 1)):
        u = prior.prox(x.detach(), 0.1, gamma=gamma)
        assert norm(u - x + 0.2 * prior.grad(u)) <= 1e-4 * norm(x)
    assert torch.equal(prior.prox(x, gamma=0.0), x)
    with pytest.warns(UserWarning, match="1 of 2 images|2 of 2 images"):
        dr.DeepInvPrior(reg, dr.PGDOptions(2, 1e-9)).prox(x.detach(), gamma=1.0)
    assert isinstance(dr.DeepInvPrior(lambda_energy()).fn(x.detach()), torch.Tensor)
    with pytest.raises(InputError, match="energy"):
        dr.DeepInvPrior("TV")  # type: ignore[arg-type]


def lambda_energy() -> torch.nn.Module:
    class Square(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.square().flatten(1).sum(1)

    return Square()


@pytest.mark.parametrize("algorithm", ["PGD", "FISTA", "DRS", "ADMM"])
def test_their_algorithms_find_our_minimum(algorithm: str) -> None:
    A = dr.SRM((1, 8, 8), 0.5)
    x = images(2, 1, 8, 8)
    physics, reg, mu = dr.to_deepinv(A), dr.TV(0.1), 0.05
    y = physics(x)
    options = dr.PGDOptions(5000, 1e-9, acceleration="anderson")
    ours = dr.recover(A.A(x), A, reg, mu, options=options).x
    first = algorithm in ("PGD", "FISTA")
    model = getattr(deepinv.optim, algorithm)(
        data_fidelity=deepinv.optim.L2(),
        prior=dr.DeepInvPrior(reg, dr.PGDOptions(500, 1e-5, acceleration="anderson")),
        stepsize=0.5 if first else 10.0,
        lambda_reg=mu,
        max_iter=400 if first else 60,
        crit_conv="residual",
        thres_conv=1e-6,
        early_stop=True,
        **({"g_first": True} if first else {}),
    )
    theirs = model(y, physics)
    assert norm(theirs - ours) <= 1e-3 * norm(ours)


def test_the_model_and_its_gradients() -> None:
    A = dr.SRM((1, 6, 6), 0.6)
    physics, x = dr.to_deepinv(A), images(2, 1, 6, 6)
    reg = random_red(0, alpha=1.0)
    options, adjoint = (
        dr.PGDOptions(4000, 1e-12, acceleration="anderson"),
        dr.ImplicitAdjoint(dr.CGOptions(400, 1e-11)),
    )
    model = dr.RecoverModel(reg, 0.1, options, adjoint).double()
    y = physics(x).requires_grad_()
    loss = (model(y, physics, extra=1) - x).square().sum()
    loss.backward()
    assert y.grad is not None and y.grad.shape == y.shape
    h = 1e-5
    with torch.no_grad():
        values = []
        for step in (h, -2 * h):
            model.log_mu += step
            values.append(float((model(y, physics) - x).square().sum()))
    assert float(model.log_mu.grad) == pytest.approx((values[0] - values[1]) / (2 * h), rel=1e-4)  # type: ignore[arg-type]
    assert all(p.grad is not None for p in reg.parameters())
    sol = dr.recover(A.A(x), A, reg, model.mu.item(), options=options)
    torch.testing.assert_close(sol.x, model(y, physics).detach())
    fixed = dr.RecoverModel(reg, 0.1, trainable_mu=False)
    assert "log_mu" not in dict(fixed.named_parameters()) and float(fixed.mu) == pytest.approx(0.1)
    assert pickle.loads(pickle.dumps(model)).mu.item() == model.mu.item()
    with pytest.raises(InputError, match="mu"):
        dr.RecoverModel(reg, 0.0)
    with pytest.raises(InputError, match="LinearPhysics"):
        model(y, torch.nn.Identity())


def test_the_model_keeps_the_operator_until_the_physics_changes() -> None:
    physics = P.Inpainting((1, 8, 8), mask=mask(1, 8, 8).float())
    x = images(2, 1, 8, 8, dtype=torch.float32)
    model = dr.RecoverModel(dr.TV(0.1), 0.01)
    y = physics(x)
    first = model._operator(y, physics)
    assert model._operator(y, physics) is first
    physics.update(mask=mask(1, 8, 8, seed=3).float())
    second = model._operator(y, physics)
    assert second is not first and torch.equal(second.mask, mask(1, 8, 8, seed=3))  # type: ignore[attr-defined]
    with torch.no_grad():
        physics.mask[..., 1, 1] = 1 - physics.mask[..., 1, 1]
    assert model._operator(y, physics) is not second


@pytest.mark.parametrize("name", ["blur", "MRI", "stack"])
def test_the_model_recovers_from_their_measurements(name: str) -> None:
    physics, size = CASES["fftdeblur" if name == "blur" else name]()
    x = images(2, *size, dtype=torch.float32)
    y = physics(x)
    model = dr.RecoverModel(dr.TV(0.1), 1e-3, dr.PGDOptions(20))
    with torch.no_grad():
        xhat = model(y, physics)
    A = dr.from_deepinv(physics, size)
    own = package.flatten(y).reshape(2, *A.measurement_shape)
    assert norm(A.A(xhat) - own) < 0.2 * norm(own) and xhat.shape == x.shape


def test_a_step_of_sure_and_their_trainer(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sigma = 0.1
    physics = dr.to_deepinv(dr.SRM((1, 12, 12), ratio=1.0), noise_sigma=sigma)
    x = images(4, 1, 12, 12, dtype=torch.float32)
    x = torch.nn.functional.avg_pool2d(x, 3, 1, 1)
    y = physics(x)
    model = dr.RecoverModel(dr.RED(channels=4, head="residual", seed=0), 0.01)
    loss = deepinv.loss.SureGaussianLoss(sigma=sigma)
    before = float(model.mu)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    value = loss(y=y, x_net=model(y, physics), physics=physics, model=model).mean()
    value.backward()
    optimizer.step()
    assert bool(torch.isfinite(value)) and float(model.mu) != before
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = deepinv.Trainer(
            model=model,
            physics=physics,
            train_dataloader=data,
            optimizer=optimizer,
            losses=deepinv.loss.SupLoss(),
            epochs=1,
            save_path=str(tmp_path),
            show_progress_bar=False,
            verbose=False,
            device="cpu",
        )
        middle = float(model.mu)
        trainer.train()
    assert float(model.mu) != middle


def test_without_deepinv_one_sentence_says_how_to_get_it() -> None:
    code = """
import sys
sys.modules["deepinv"] = None
import deepreg_fast as dr
assert "deepreg_fast.adapters" not in sys.modules
from deepreg_fast import *
calls = (lambda: dr.from_deepinv(None, (1, 8, 8)), lambda: dr.to_deepinv(dr.SRM((1, 8, 8))),
         lambda: dr.DeepInvPrior(dr.TV()), lambda: dr.RecoverModel(dr.TV(), 0.1))
for call in calls:
    try:
        call()
    except dr.errors.InputError as error:
        print("pip install deepinv" in str(error))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True"] * 4
