"""MRI: conventions, closed form, coils, helpers, and deepinv's operators. The matrices are in test_inverse_problems."""

from __future__ import annotations

import pytest
import torch

import deepreg_fast as dr
from deepreg_fast.errors import InputError
from deepreg_fast.operators import cartesian_mask, simulate_coil_maps

from .helpers import images, normal

F64 = torch.float64


def centered(x: torch.Tensor) -> torch.Tensor:
    z = torch.fft.fft2(torch.fft.ifftshift(x, dim=(-2, -1)), norm="ortho")
    return torch.fft.fftshift(z, dim=(-2, -1))


def two(z: torch.Tensor) -> torch.Tensor:
    return torch.stack([z.real, z.imag], 1)


def test_it_is_the_centered_transform_of_each_coils_image() -> None:
    m, S = cartesian_mask((12, 16), 2.0, 0.25), simulate_coil_maps((12, 16), 3)
    x = images(2, 2, 12, 16)
    z = torch.complex(x[:, 0], x[:, 1])
    torch.testing.assert_close(dr.MRI(m).A(x), two(m * centered(z)), rtol=0, atol=1e-14)
    A = dr.MRI(m, S)
    torch.testing.assert_close(A.A(x), two(m * centered(S * z[:, None])), rtol=0, atol=1e-14)
    y = normal(2, *A.measurement_shape)
    assert float((A.A(x) * y).sum()) == pytest.approx(float((x * A.A_adjoint(y)).sum()), abs=1e-12)
    assert A.as_image(y).shape == (2, 1, 12, 16) and dr.MRI(m).as_image(y[:, :, 0]).shape == (2, 1, 12, 16)
    # Each coil's maps as real tensors, and files, give the same operator.
    assert dr.MRI(m, torch.stack([S.real, S.imag])).fingerprint() == A.fingerprint()


def test_the_preconditioner_is_the_nearest_circulant_matrix() -> None:
    A = dr.MRI(torch.rand(5, 6, generator=torch.Generator().manual_seed(0)) < 0.5, simulate_coil_maps((5, 6), 3))
    waves = two(torch.fft.fftshift(torch.fft.ifft2(torch.eye(30).reshape(30, 5, 6), norm="ortho"), dim=(1, 2))).double()
    # `<u, A^T A u>` of the waves, whose frequencies have the origin in the corner.
    diagonal = torch.fft.fftshift((waves * A.normal(waves)).sum((1, 2, 3)).reshape(5, 6))
    v = images(1, 2, 5, 6)
    expected = torch.fft.ifft2(
        torch.fft.ifftshift(centered(torch.complex(v[:, 0], v[:, 1])) / (diagonal + 0.1), dim=(1, 2)), norm="ortho"
    )
    expected = two(torch.fft.fftshift(expected, dim=(1, 2)))
    torch.testing.assert_close(A.precondition(v, 0.1), expected, rtol=0, atol=1e-6)


def test_helpers() -> None:
    m = cartesian_mask((20, 320), 4.0, 0.08)
    assert m.shape == (20, 320) and int(m[0].sum()) == 80 and bool((m == m[0]).all())
    assert bool(m[0, 160 - 13 : 160 + 13].all()) and not torch.equal(m, cartesian_mask((20, 320), seed=1))
    S = simulate_coil_maps((9, 12), 5)
    torch.testing.assert_close(S.abs().square().sum(0), torch.ones(9, 12, dtype=F64))
    assert dr.MRI(torch.ones(9, 12), S).sqnorm() == pytest.approx(1.0)


def test_least_squares_of_several_coils_recovers_the_image() -> None:
    x = images(2, 2, 16, 16)
    A = dr.MRI(cartesian_mask((16, 16), 2.0, 0.25), simulate_coil_maps((16, 16), 8))
    assert float((A.A_dagger(A.A(x)) - x).norm() / x.norm()) < 1e-3
    B = dr.MRI(torch.ones(16, 16))
    torch.testing.assert_close(B.A_dagger(B.A(x)), x)


def test_it_equals_deepinv() -> None:
    physics = pytest.importorskip("deepinv.physics", exc_type=(ImportError, RuntimeError))  # type: ignore[arg-type]
    m, S, x = (
        cartesian_mask((12, 16), 2.0, 0.25),
        simulate_coil_maps((12, 16), 3).to(torch.complex64),
        images(1, 2, 12, 16),
    )
    x = x.float()
    theirs = physics.MRI(mask=m.float()[None, None], img_size=(12, 16))
    torch.testing.assert_close(dr.MRI(m).A(x), theirs.A(x))
    coils = physics.MultiCoilMRI(mask=m.float()[None, None], coil_maps=S[None], img_size=(12, 16))
    torch.testing.assert_close(dr.MRI(m, S).A(x), coils.A(x))


def test_arguments_are_checked() -> None:
    S = simulate_coil_maps((4, 5), 2)
    with pytest.raises(InputError, match="for one per image"):
        dr.MRI(torch.ones(2, 4, 5))
    for wrong in (S[:, :3], S.real, "maps"):
        with pytest.raises(InputError, match="coil_maps must be complex"):
            dr.MRI(torch.ones(4, 5), wrong)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="one number of images"):
        dr.MRI(torch.ones(3, 1, 4, 5), S.expand(2, 2, 4, 5))
