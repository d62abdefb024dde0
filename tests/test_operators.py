"""Operators: SRM against explicit matrices, the closed forms, the CG fall-back, states and descriptions."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
import scipy.fft
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st

import deepreg_fast as dr
from deepreg_fast import operators
from deepreg_fast.errors import InputError, OperatorMismatch
from deepreg_fast.functional import hadamard
from deepreg_fast.operators.base import LinearOperator

EPS32 = 2.0**-23


@st.composite
def srms(draw: st.DrawFn) -> dr.SRM:
    """Any SRM of at most a few hundred pixels: primes, single rows and columns, up to three channels."""
    transform = draw(st.sampled_from(("dct", "hadamard", "walsh")))
    sides = (1, 2, 4, 8, 12, 16, 20) if transform == "hadamard" else (1, 2, 3, 5, 7, 8, 11, 13, 17, 20)
    shape = (draw(st.integers(1, 3)), draw(st.sampled_from(sides)), draw(st.sampled_from(sides)))
    return dr.SRM(
        shape,
        measurements=draw(st.integers(1, int(np.prod(shape)))),
        transform=transform,
        randomizer=draw(st.sampled_from(("sign", "permutation", "both"))),
        seed=draw(st.integers(0, 2**64)),
        keep_dc=draw(st.sampled_from((None, True, False))),
    )


def transform_matrix(A: dr.SRM) -> np.ndarray:
    """`F` `[d, d]` of scipy's DCT and Hadamard matrices (of this package's, proved by test_transforms, beyond 2^k)."""
    c, h, w = A.image_shape
    d = c * h * w
    if A.transform == "dct":
        unit = np.eye(d).reshape(d, c, h, w)
        return scipy.fft.dctn(unit, axes=(2, 3), norm="ortho").reshape(d, d).T
    if A.transform == "hadamard":
        one = [scipy.linalg.hadamard(n) if n & (n - 1) == 0 else hadamard.hadamard(n) for n in (h, w)]
        return np.kron(np.eye(c), np.kron(one[0].astype(float), one[1].astype(float)) / np.sqrt(h * w))
    assert A.block is not None
    return np.kron(np.eye(d // A.block), scipy.linalg.hadamard(A.block) / np.sqrt(A.block))


def dense(A: dr.SRM) -> torch.Tensor:
    """`A = D F R` as a float64 matrix `[m, d]`."""
    r = np.eye(int(np.prod(A.image_shape)))
    if A.perm is not None:
        r = r[A.perm.numpy()]
    if A.signs is not None:
        r = A.signs.numpy()[:, None] * r
    return torch.from_numpy((transform_matrix(A) @ r)[A.rows.numpy()])


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(srms())
def test_srm_is_the_explicit_matrix(A: dr.SRM) -> None:
    M, d = dense(A), int(np.prod(A.image_shape))
    unit = torch.eye(d, dtype=torch.float64).reshape(d, *A.image_shape)
    # Entries below one, summed in float64 over at most 2 * 20 (or log2 of the block) terms.
    torch.testing.assert_close(A.A(unit).T, M, rtol=0, atol=1e-14)
    torch.testing.assert_close(A.A_adjoint(torch.eye(len(M), dtype=torch.float64)).flatten(1), M, rtol=0, atol=1e-14)
    assert A.rows.tolist() == sorted(set(A.rows.tolist())) and len(A.rows) == A.measurements


@given(srms())
def test_float32_errs_at_most_twice_as_much_as_torchs_dense_product(A: dr.SRM) -> None:
    M = dense(A)
    M32 = M.float()
    x32, y32 = random(16, M.shape[1], seed=1).float(), random(16, M.shape[0], seed=2).float()
    x, y = x32.double(), y32.double()
    images = x32.reshape(-1, *A.image_shape)
    pairs = {
        "A x": (2, A.A(images), x32 @ M32.T, x @ M.T),
        "A^T y": (2, A.A_adjoint(y32).flatten(1), y32 @ M32, y @ M),
        "A A^T y = y": (4, A.A(A.A_adjoint(y32)), (y32 @ M32) @ M32.T, y),
    }
    for name, (stages, ours, theirs, exact) in pairs.items():
        assert ours.dtype == torch.float32
        error, own = (float((t.double() - exact).norm() / exact.norm().clamp_min(1e-30)) for t in (ours, theirs))
        # A permutation matrix, or one whose entries are powers of two, has no error at all; the columns and the rows
        # are transformed one after the other, and each stage rounds its stored matrix and its result by EPS32 / 2.
        assert error <= max(2 * own, stages * EPS32), (name, error / EPS32, own / EPS32)


@given(srms(), st.floats(0.0, 1e4), st.integers(0, 3))
def test_closed_forms(A: dr.SRM, gamma: float, batch: int) -> None:
    z, y = random(batch, *A.image_shape, seed=3), random(batch, A.measurements, seed=4)
    p = A.prox_l2(z, y, gamma)
    # The optimality condition p - z + gamma A^T (A p - y) = 0; the terms are up to gamma times numbers of size one.
    torch.testing.assert_close(
        p - z + gamma * A.A_adjoint(A.A(p) - y), torch.zeros_like(z), rtol=0, atol=1e-13 * (1 + gamma)
    )
    torch.testing.assert_close(A.A(A.A_dagger(y)), y, rtol=0, atol=1e-13)
    torch.testing.assert_close(A.normal(z), A.A_adjoint(A.A(z)), rtol=0, atol=0)
    c = torch.logspace(-3, 2, batch, dtype=torch.float64)
    u = A.shifted_inverse(z, c)
    # (v - P v) / c cancels up to 1/c = 1e3 times rounding.
    torch.testing.assert_close(A.normal(u) + c.reshape(-1, 1, 1, 1) * u, z, rtol=0, atol=1e-11)


def test_gamma_per_image() -> None:
    A = dr.SRM((1, 6, 5), ratio=0.5)
    z, y = random(3, 1, 6, 5), random(3, A.measurements, seed=5)
    gamma = torch.tensor([0.0, 2.0, 50.0])
    whole = A.prox_l2(z.float(), y.float(), gamma.double())
    assert whole.dtype == torch.float32 and torch.equal(whole[0], z[0].float())
    for i in range(3):
        assert torch.equal(whole[i : i + 1], A.prox_l2(z[i : i + 1].float(), y[i : i + 1].float(), float(gamma[i])))


@pytest.mark.parametrize("transform", ["dct", "hadamard", "walsh"])
def test_a_poisoned_image_leaves_its_neighbours_bits(transform: str) -> None:
    A = dr.SRM((2, 12, 20), transform=transform, randomizer="both")
    x = random(4, 2, 12, 20).float()
    bad = x.clone()
    bad[1, 0, 3, 3], bad[2] = float("nan"), float("inf")
    for f in (A.A, A.normal, lambda t: A.prox_l2(t, A.A(t), 3.0)):
        good, poisoned = f(x), f(bad)
        assert torch.equal(good[[0, 3]], poisoned[[0, 3]]) and not torch.isfinite(poisoned[1:3]).all()
        assert torch.equal(good[2:3], f(x[2:3]))


# SHA-256 of the description and the drawn buffers: another value on any platform or release means another operator.
GOLDEN = [
    ({"image_shape": (1, 180, 180)}, "757d10f25a92aaec217e9dc2a044b0b1687e6e14e6d3eb983807457fc33e9f5a"),
    (
        {"image_shape": (1, 180, 180), "transform": "hadamard", "randomizer": "permutation", "seed": 1},
        "bed25055fd98a7d1bfd2b56fd76d842dc1ba73db3d3740a93a08b30ba9322aef",
    ),
    (
        {"image_shape": (3, 16, 12), "measurements": 5, "transform": "walsh", "randomizer": "both", "seed": 2**40},
        "6e1b2334af5a1d0dc5f90eac0ecd820397d7da55fdb43c70854a844ee97601b7",
    ),
]


@pytest.mark.parametrize(("arguments", "sha"), GOLDEN)
def test_golden_fingerprints(arguments: dict[str, object], sha: str) -> None:
    assert dr.SRM(**arguments).fingerprint() == sha  # type: ignore[arg-type]


def test_the_default_takes_a_fifth() -> None:
    A = dr.SRM((1, 180, 180))
    assert A.measurements == 6480 and A.rows.dtype == A.rows.long().dtype and A.signs is not None
    assert A.signs.dtype == torch.int8 and abs(int(A.signs.sum())) < 4 * 180  # four standard deviations
    assert dr.SRM((1, 3, 3), ratio=1e-9).measurements == 1 and dr.SRM((1, 3, 3), ratio=1.0).measurements == 9
    assert not torch.equal(A.rows, dr.SRM((1, 180, 180), seed=1).rows)


def test_kept_means() -> None:
    assert 0 in dr.SRM((1, 12, 12), measurements=1, randomizer="permutation").rows
    assert dr.SRM((3, 4, 5), measurements=3, keep_dc=True).rows.tolist() == [0, 20, 40]
    A = dr.SRM((1, 8, 12), measurements=2, transform="walsh", block=8, keep_dc=True)
    assert 0 in A.rows and (A.rows % 8 == 0).all()
    assert any(0 not in dr.SRM((1, 12, 12), measurements=1, seed=s).rows for s in range(3))
    for transform, side in (("dct", 7), ("hadamard", 28)):  # 28 is of a prime power
        A = dr.SRM((1, side, side), measurements=1, transform=transform, randomizer="permutation")
        x = random(1, 1, side, side)
        torch.testing.assert_close(A.A(x)[0, 0], x.sum() / side, rtol=1e-12, atol=1e-12)


@given(srms())
def test_descriptions_rebuild_the_operator(A: dr.SRM) -> None:
    B = operators.from_description(json.loads(json.dumps(A.describe())))
    assert B.fingerprint() == A.fingerprint()


def test_a_state_reproduces_another_seeds_operator() -> None:
    A, B = (dr.SRM((1, 12, 10), randomizer="both", seed=s) for s in (7, 8))
    file = io.BytesIO()
    torch.save(A.state_dict(), file)
    file.seek(0)
    x = random(2, 1, 12, 10)
    assert not torch.equal(A.A(x), B.A(x))
    B.load_state_dict(torch.load(file, weights_only=True))
    assert B.fingerprint() == A.fingerprint() and torch.equal(A.A(x), B.A(x)) and B.seed == 7


@pytest.mark.parametrize(
    "other",
    [
        {"image_shape": (1, 10, 12)},
        {"measurements": 23},
        {"transform": "walsh"},
        {"randomizer": "sign"},
        {"randomizer": "permutation"},
    ],
)
def test_a_foreign_state_is_refused_and_changes_nothing(other: dict[str, object]) -> None:
    mine: dict[str, object] = {"image_shape": (1, 12, 10), "measurements": 24, "randomizer": "both", "seed": 3}
    A = dr.SRM(**mine)  # type: ignore[arg-type]
    before = A.fingerprint()
    with pytest.raises(OperatorMismatch, match="same kind"):
        A.load_state_dict(dr.SRM(**{**mine, "seed": 4, **other}).state_dict())  # type: ignore[arg-type]
    assert A.fingerprint() == before


def test_a_damaged_state_is_refused() -> None:
    A = dr.SRM((1, 12, 10))
    state = A.state_dict()
    state["signs"] = -state["signs"]
    with pytest.raises(OperatorMismatch, match="signs must be those drawn from its seed 0"):
        dr.SRM((1, 12, 10), seed=5).load_state_dict(state)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"image_shape": (180, 180)}, r"must be \(C, H, W\)"),
        ({"image_shape": 5}, r"must be \(C, H, W\)"),
        ({"image_shape": (1, 0, 4)}, "at least 1"),
        ({"image_shape": (1, 4.0, 4)}, "must be an integer"),
        ({"ratio": 0.0}, r"ratio must be a number in \(0, 1\]"),
        ({"ratio": 1.5}, r"ratio must be a number in \(0, 1\]"),
        ({"ratio": float("nan")}, "ratio must be"),
        ({"measurements": 17}, "between 1 and 16"),
        ({"measurements": 0}, "between 1 and 16"),
        ({"measurements": 4, "ratio": 0.5}, "not both"),
        ({"transform": "fft"}, "transform must be one of"),
        ({"randomizer": "none"}, "randomizer must be one of"),
        ({"seed": -1}, "seed must be an integer"),
        ({"transform": "walsh", "block": 3}, "power of two"),
        ({"transform": "hadamard", "image_shape": (1, 4, 92)}, "is 92; crop to 88"),
    ],
)
def test_bad_arguments_get_one_sentence(arguments: dict[str, object], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        dr.SRM(**{"image_shape": (1, 4, 4), **arguments})  # type: ignore[arg-type]


def test_bad_tensors_get_one_sentence() -> None:
    A = dr.SRM((1, 4, 4), ratio=0.5)
    z, y = torch.zeros(2, 1, 4, 4), torch.zeros(2, 8)
    cases = [
        (lambda: A.A(torch.zeros(2, 1, 4, 5)), r"shape \[1, 4, 4\]"),
        (lambda: A.A(torch.zeros(1, 4, 4)), r"tensor \[B, C, H, W\]"),
        (lambda: A.A(z.half()), "float32 or float64"),
        (lambda: A.A(z.to("meta")), "on the operator's device cpu, but is on meta"),
        (lambda: A.A_adjoint(torch.zeros(2, 9)), "another operator"),
        (lambda: A.A_adjoint(y.to("meta")), "device cpu"),
        (lambda: A.prox_l2(z, y.double(), 1.0), "one dtype"),
        (lambda: A.prox_l2(z, y[:1], 1.0), "2 images and 1 measurements"),
        (lambda: A.prox_l2(z, y, -1.0), "gamma must be a number"),
        (lambda: A.prox_l2(z, y, float("inf")), "gamma must be a number"),
        (lambda: A.prox_l2(z, y, torch.ones(3)), "gamma must be one number or one for each of the 2 images"),
        (lambda: A.shifted_inverse(z, 0.0), "c must be a number"),
        (lambda: operators.from_description({"kind": "radon"}), "kind must be one of"),
        (lambda: operators.from_description([]), "kind must be one of"),  # type: ignore[arg-type]
        (lambda: operators.from_description({"kind": "srm", "image_shape": [1, 4, 4], "x": 1}), "does not fit"),
    ]
    for call, sentence in cases:
        with pytest.raises(InputError, match=sentence):
            call()


def test_identity() -> None:
    A = dr.Identity((2, 3, 4))
    x, y = random(2, 2, 3, 4), random(2, 24, seed=1)
    assert A.measurements == 24 and torch.equal(A.A_adjoint(A.A(x)), x) and torch.equal(A(x), x.flatten(1))
    torch.testing.assert_close(A.prox_l2(x, y, 3.0), (x + 3.0 * y.reshape(x.shape)) / 4.0)
    torch.testing.assert_close(A.shifted_inverse(x, 3.0), x / 4.0)
    assert operators.from_description(A.describe()).fingerprint() == A.fingerprint()


class Dense(LinearOperator):
    """A matrix without any structure to declare."""

    def __init__(self, matrix: torch.Tensor) -> None:
        super().__init__((1, 4, 5), len(matrix))
        self.register_buffer("matrix", matrix)
        self.matrix: torch.Tensor

    def _forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1) @ self.matrix.T

    def _adjoint(self, y: torch.Tensor) -> torch.Tensor:
        return (y @ self.matrix).reshape(-1, *self.image_shape)


def test_without_a_closed_form_the_prox_is_solved_by_cg() -> None:
    M = random(9, 20, seed=6) / 6
    A, z, y = Dense(M), random(3, 1, 4, 5), random(3, 9, seed=7)
    gamma = torch.tensor([0.1, 1.0, 30.0], dtype=torch.float64)
    for i, p in enumerate(A.prox_l2(z, y, gamma)):
        want = torch.linalg.solve(
            torch.eye(20, dtype=torch.float64) + gamma[i] * M.T @ M, z[i].flatten() + gamma[i] * M.T @ y[i]
        )
        torch.testing.assert_close(p.flatten(), want, rtol=0, atol=1e-8)  # CG to 1e-10 times the condition number
    assert not A.has_shifted_inverse
    c = torch.tensor([0.1, 1.0, 3.0], dtype=torch.float64)
    for i in range(3):
        inverse = torch.linalg.inv(c[i] * torch.eye(20, dtype=torch.float64) + M.T @ M)
        torch.testing.assert_close(A.shifted_inverse(z, c)[i].flatten(), inverse @ z[i].flatten(), rtol=0, atol=1e-10)
        gram = c[i] * torch.eye(9, dtype=torch.float64) + M @ M.T
        torch.testing.assert_close(A.gram_solve(y, c)[i], torch.linalg.solve(gram, y[i]), rtol=0, atol=1e-10)
    torch.testing.assert_close(A.A_dagger(y).flatten(1), y @ torch.linalg.pinv(M).T, rtol=0, atol=1e-5)
    p32 = A.float().prox_l2(z.float(), y.float(), gamma)
    torch.testing.assert_close(p32.double(), Dense(M).prox_l2(z, y, gamma), rtol=0, atol=1e-4)
    for call in (A.describe, A.fingerprint):
        with pytest.raises(InputError, match="Dense"):
            call()


def test_a_multiple_of_a_projection_has_closed_forms() -> None:
    """`A A^T = 2 P`, with 9 rows of rank 6: the closed forms equal CG's solutions."""
    rows = torch.linalg.qr(random(9, 6))[0]
    columns = torch.linalg.qr(random(20, 6))[0]
    A, by_cg = Dense(2**0.5 * rows @ columns.T), Dense(2**0.5 * rows @ columns.T)
    A.projection_scale = 2.0
    assert A.has_shifted_inverse and A.preconditioned and not by_cg.has_shifted_inverse
    z, y = random(3, 1, 4, 5), random(3, 9)
    c = torch.tensor([0.1, 1.0, 3.0], dtype=torch.float64)
    for call in (
        lambda op: op.gram_solve(y, c),
        lambda op: op.shifted_inverse(z, c),
        lambda op: op.prox_l2(z, y, c),
        lambda op: op.prox_l2(z, y, 0.7),
        lambda op: op.sqnorms(),
    ):
        torch.testing.assert_close(call(A), call(by_cg), rtol=0, atol=1e-10)
    torch.testing.assert_close(A.A_dagger(y).flatten(1), y @ torch.linalg.pinv(A.matrix).T, rtol=0, atol=1e-10)


def test_a_prox_that_cg_cannot_solve_is_not_passed_off() -> None:
    A = Dense(torch.diag(torch.logspace(0, 5, 20, dtype=torch.float64)).float())
    with pytest.raises(InputError, match="must be solved to 1e-3"):
        A.prox_l2(random(1, 1, 4, 5).float(), 1e3 * random(1, 20).float(), 1e4)


def test_a_class_that_defines_nothing_says_what_is_missing() -> None:
    bare = LinearOperator((1, 2, 2), 3)
    for call, name in (
        (lambda: bare.A(torch.zeros(1, 1, 2, 2)), "_forward"),
        (lambda: bare.A_adjoint(torch.zeros(1, 3)), "_adjoint"),
    ):
        with pytest.raises(NotImplementedError, match=name):
            call()
