"""The orthonormal transforms: DCT, Hadamard, Walsh-Hadamard."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.fft
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st

from deepreg_fast.errors import InputError
from deepreg_fast.functional import dct, hadamard, walsh

# The multiples of 4 up to 300 that Sylvester's, Paley's and Kronecker's constructions do not give (known from the
# literature: Hadamard 1893 to Baumert 1962 needed other constructions for 92, 116, 156, 172, 184, 188, ...).
WITHOUT = {92, 116, 156, 172, 184, 188, 232, 236, 260, 268, 292}


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 3), st.integers(1, 3))
def test_dct_is_scipys(h: int, w: int, batch: int, channels: int) -> None:
    x = torch.from_numpy(np.random.default_rng(h * 41 + w).standard_normal((batch, channels, h, w)))
    want = scipy.fft.dctn(x.numpy(), axes=(2, 3), norm="ortho") if batch else x.numpy()
    # Both sum up to 40 + 40 products of numbers of size one in float64: 80 roundings, 80 * 1.1e-16 * 4.
    np.testing.assert_allclose(dct.dct2(x).numpy(), want, rtol=0, atol=4e-14)
    np.testing.assert_allclose(dct.idct2(dct.dct2(x)).numpy(), x.numpy(), rtol=0, atol=4e-14)


@pytest.mark.parametrize("n", [180, 1021, 2048])
def test_dct_matrix_is_orthonormal_to_rounding(n: int) -> None:
    c = dct.dct_matrix(n, torch.float64, torch.device("cpu")).numpy()
    assert np.abs(c @ c.T - np.eye(n)).max() < 1e-14


def test_hadamard_matrices_of_every_order_they_exist_for() -> None:
    built = []
    for n in range(1, 301):
        try:
            h = hadamard.hadamard(n)
        except InputError:
            continue
        built.append(n)
        assert h.dtype == np.int8 and h.shape == (n, n) and (np.abs(h) == 1).all()
        assert (h.astype(np.int64) @ h.T.astype(np.int64) == n * np.eye(n, dtype=np.int64)).all()
        assert (h[0] == h[0, 0]).all(), "coefficient 0 must be the mean"
    assert set(built) == {1, 2, *range(4, 301, 4)} - WITHOUT


@pytest.mark.parametrize(
    ("n", "construction"),
    [(28, "27 = 3^3, Paley I"), (52, "25 = 5^2, Paley II"), (244, "243 = 3^5, Paley I"), (344, "343 = 7^3, Paley I")],
)
def test_hadamard_from_prime_powers(n: int, construction: str) -> None:
    h = hadamard.hadamard(n).astype(np.int64)
    assert (h @ h.T == n * np.eye(n, dtype=np.int64)).all(), construction


def test_hadamard_of_powers_of_two_is_sylvesters() -> None:
    for k in range(8):
        np.testing.assert_array_equal(hadamard.hadamard(2**k), scipy.linalg.hadamard(2**k))


def test_hadamard_180_is_exact_in_int64() -> None:
    h = hadamard.hadamard(180)
    x = np.random.default_rng(0).integers(0, 256, (180, 180))
    y = h.astype(np.int64) @ x @ h.T.astype(np.int64)
    got = hadamard.hadamard2(torch.from_numpy(x[None, None].astype(np.float64)))[0, 0].numpy()
    # 360 roundings of relative size 1.1e-16 on sums of at most 255 * 180.
    np.testing.assert_allclose(got, y / 180, rtol=0, atol=360 * 1.1e-16 * 255 * 180)


@pytest.mark.parametrize(("n", "nearest"), [(92, ("88", "96")), (3, ("2", "4")), (181, ("180", "192"))])
def test_a_missing_order_names_the_nearest_ones(n: int, nearest: tuple[str, str]) -> None:
    with pytest.raises(InputError, match=f"is {n};.* {nearest[0]} .* {nearest[1]} "):
        hadamard.hadamard(n)


def test_a_callers_change_does_not_reach_the_cache() -> None:
    hadamard.hadamard(4)[:] = 0
    assert (np.abs(hadamard.hadamard(4)) == 1).all()


@given(st.integers(0, 3), st.integers(0, 6), st.integers(1, 7))
def test_walsh_is_scipys_hadamard_in_blocks(batch: int, k: int, blocks: int) -> None:
    block = 2**k
    x = np.random.default_rng(k * 8 + blocks).standard_normal((batch, blocks * block))
    want = (x.reshape(batch, blocks, block) @ (scipy.linalg.hadamard(block) / np.sqrt(block))).reshape(x.shape)
    got = walsh.walsh_blocks(torch.from_numpy(x), block)
    np.testing.assert_allclose(got.numpy(), want, rtol=0, atol=1e-13)  # 64 terms of size one in float64
    np.testing.assert_allclose(walsh.walsh_blocks(got, block).numpy(), x, rtol=0, atol=1e-13)


def test_walsh_block_size() -> None:
    assert walsh.block_size(180 * 180) == 16
    assert walsh.block_size(7) == 1
    assert walsh.block_size(48, 4) == 4
    for bad in (3, 32, 0, -2, 4.0, True):
        with pytest.raises(InputError, match="power of two that divides d = 48"):
            walsh.block_size(48, bad)  # type: ignore[arg-type]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_bits_of_an_image_do_not_depend_on_its_batch(threads: int, dtype: torch.dtype) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for h, w in ((180, 180), (7, 13), (1, 12), (17, 1), (40, 40), (4, 20)):
            x = torch.rand(9, 1, h, w, generator=torch.Generator().manual_seed(0), dtype=dtype)
            transforms = [dct.dct2, dct.idct2]
            if hadamard.exists(h) and hadamard.exists(w):
                transforms += [hadamard.hadamard2, hadamard.ihadamard2]
            for f in transforms:
                whole = f(x)
                for i in (0, 5, 8):
                    assert torch.equal(whole[i : i + 1], f(x[i : i + 1])), (f.__name__, h, w, i)
            v = x.flatten(1)
            block = walsh.block_size(v.shape[1])
            assert torch.equal(walsh.walsh_blocks(v, block)[5:6], walsh.walsh_blocks(v[5:6], block))
    finally:
        torch.set_num_threads(before)
