"""CG, MINRES and Lanczos against dense float64 matrices: no false "converged", one image never changes another."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from deepreg_fast.batched.linalg import dot, exp2_int, norm, select
from deepreg_fast.errors import InputError
from deepreg_fast.solvers import CGOptions, MinresOptions, cg, extreme_eigenvalues, minres
from deepreg_fast.status import Status

KINDS = ("definite", "indefinite", "consistent", "inconsistent", "clustered")
SIZES = (5, 12, 40, 90, 200)
BATCH = 10


def matrices(rng: np.random.Generator, kind: str, n: int, conditions: np.ndarray) -> np.ndarray:
    """Symmetric matrices of norm 1 with these condition numbers; the singular kinds lose a third of their rank."""
    out = []
    for cond in conditions:
        q = np.linalg.qr(rng.standard_normal((n, n)))[0]
        values = np.logspace(0, -np.log10(cond), n)
        if kind == "indefinite":
            values = values * np.where(np.arange(n) % 3 == 1, -1.0, 1.0)
        if kind in ("consistent", "inconsistent"):
            values[-max(1, n // 3) :] = 0.0
        if kind == "clustered":
            values = np.where(np.arange(n) < n // 2, 1.0, 1.0 / cond)
        a = (q * values) @ q.T
        out.append((a + a.T) / 2)
    return np.array(out)


def dense(a: torch.Tensor):
    return lambda v: (a @ v[..., None])[..., 0]


def random_systems(seed: int, kind: str, n: int, dtype: torch.dtype):
    """`A`, `b` (scaled by 1e-12 to 1e12) and an SPD preconditioner, `BATCH` systems of one size."""
    rng = np.random.default_rng(seed)
    a = torch.tensor(matrices(rng, kind, n, 10.0 ** rng.uniform(0, 8, BATCH))).to(dtype)
    b = torch.tensor(rng.standard_normal((BATCH, n)))
    if kind == "consistent":
        b = dense(a.double())(b)
    b = (b * torch.tensor(10.0 ** rng.uniform(-12, 12, (BATCH, 1)))).to(dtype)
    m = torch.linalg.inv(a.double() @ a.double() + 0.05 * torch.eye(n, dtype=torch.float64)).to(dtype)
    return a, b, dense((m + m.mT) / 2)


def true_residual(a: torch.Tensor, x: torch.Tensor, b: torch.Tensor) -> np.ndarray:
    """In extended precision: in float64 its own rounding, `eps ||A|| ||x|| / ||b||`, can exceed a tolerance of 1e-9."""
    wide_a, wide_x, wide_b = (t.double().numpy().astype(np.longdouble) for t in (a, x, b))
    r = (wide_b - (wide_a @ wide_x[..., None])[..., 0]).astype(np.float64)
    return np.linalg.norm(r, axis=1) / np.linalg.norm(b.double().numpy(), axis=1)


def solve_both(a, b, tolerance, steps, preconditioner=None):
    yield "cg", cg(dense(a), b, CGOptions(steps, tolerance), preconditioner=preconditioner)
    yield "minres", minres(dense(a), b, MinresOptions(steps, tolerance), preconditioner=preconditioner)


# How many of a kind converge at least: definite, clustered, indefinite, consistent.
@pytest.mark.parametrize(
    ("sizes", "least"),
    [(SIZES[:3], (27, 30, 25, 40)), pytest.param(SIZES, (35, 40, 30, 30), marks=pytest.mark.long)],
    ids=("300", "500"),
)
def test_no_false_converged_on_systems_of_all_kinds(sizes, least):
    converged = {("cg", k): 0 for k in KINDS} | {("minres", k): 0 for k in KINDS}
    total = 0
    groups = [(k, n, d) for k in KINDS for n in sizes for d in (torch.float32, torch.float64)]
    for seed, (kind, n, dtype) in enumerate(groups):
        a, b, m = random_systems(seed, kind, n, dtype)
        total += len(b)
        tolerance = (1e-6, 1e-4, 1e-9)[seed % 3]
        for name, s in solve_both(a, b, tolerance, 120, m if seed % 2 else None):
            good = (s.status == int(Status.CONVERGED)).numpy()
            exact = true_residual(a, s.x, b)
            # "converged" counts the rounding of the product, so no margin.
            assert (exact[good] <= tolerance).all(), (name, kind, n, dtype, exact[good].max())
            assert bool(torch.isfinite(s.x).all()) and (s.iterations <= 120).all()
            reported = s.residual.numpy()
            slack = 4 * torch.finfo(dtype).eps * (s.x.double().norm(dim=1) / b.double().norm(dim=1)).numpy()
            assert (np.abs(reported - exact) <= slack + 1e-6 * exact).all(), (name, kind, n, dtype)
            converged[name, kind] += int(good.sum())
    assert total == 100 * len(sizes)
    print(converged)
    definite, clustered, indefinite, consistent = least
    assert min(converged["cg", "definite"], converged["minres", "definite"]) >= definite, converged
    assert min(converged["cg", "clustered"], converged["minres", "clustered"]) >= clustered, converged
    assert converged["minres", "indefinite"] >= indefinite, converged
    assert converged["minres", "consistent"] >= consistent, converged
    assert converged["cg", "inconsistent"] == 0 and converged["minres", "inconsistent"] == 0, converged


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1.0, 1e12, 1e30])
def test_easy_systems_converge_at_every_scale(dtype, scale):
    rng = np.random.default_rng(3)
    a = torch.tensor(matrices(rng, "definite", 40, np.full(6, 10.0))).to(dtype)
    b = (torch.tensor(rng.standard_normal((6, 40))) * scale).to(dtype)
    for name, s in solve_both(a, b, 1e-5, 60):
        assert (s.status == int(Status.CONVERGED)).all(), name
        assert (true_residual(a, s.x, b) <= 1e-5).all()
        assert (s.iterations < 30).all()


def test_powers_of_two_of_the_right_hand_side_give_the_same_bits():
    a, b, m = random_systems(7, "definite", 12, torch.float32)
    b = b / b.norm(dim=1, keepdim=True)
    for (_, s), (_, t) in zip(solve_both(a, b, 1e-5, 50, m), solve_both(a, b * 2.0**60, 1e-5, 50, m), strict=True):
        assert torch.equal(s.x * 2.0**60, t.x) and torch.equal(s.residual, t.residual)


def test_zero_right_hand_side_is_solved_by_zero():
    b = torch.zeros(2, 3, 4)
    for solver in (cg, minres):
        s = solver(lambda v: 2 * v, b, x0=torch.ones_like(b))
        assert s.status.tolist() == [0, 0] and torch.equal(s.x, b) and s.residual.tolist() == [0.0, 0.0]
        assert s.iterations.tolist() == [0, 0]


def test_negative_curvature_keeps_the_truncated_iterate():
    d = torch.tensor([[4.0, 3.0, -1.0], [-1.0, -1.0, -1.0]], dtype=torch.float64)
    b = torch.tensor([[1.0, 1.0, 0.1], [1.0, 2.0, 3.0]], dtype=torch.float64)
    s = cg(lambda v: d * v, b)
    assert s.status.tolist() == [Status.NEGATIVE_CURVATURE] * 2
    assert bool((s.x[0] != 0).any()) and bool((s.x[1] == 0).all())
    t = cg(lambda v: d * v, b, CGOptions(truncated_fallback=True), preconditioner=lambda v: 0.25 * v)
    assert torch.equal(t.x[1], 0.25 * b[1]) and t.status.tolist() == [Status.NEGATIVE_CURVATURE] * 2
    np.testing.assert_allclose(t.residual[1], torch.linalg.norm(b[1] + t.x[1]) / torch.linalg.norm(b[1]), rtol=1e-12)
    u = minres(lambda v: d * v, b)
    assert u.status.tolist() == [0, 0]
    torch.testing.assert_close(u.x, b / d, rtol=1e-5, atol=0)


def test_singular_systems_stagnate_at_the_least_squares_residual():
    d = torch.tensor([[2.0, 1.0, 0.0, 0.5]], dtype=torch.float64)
    b = torch.ones_like(d)
    s = minres(lambda v: d * v, b)
    assert s.status.tolist() == [Status.STAGNATED]
    np.testing.assert_allclose(s.residual.item(), 0.5, rtol=1e-9)
    assert cg(lambda v: d * v, b).status.item() != Status.CONVERGED
    assert minres(lambda v: 0 * v, b).status.tolist() == [Status.STAGNATED]
    assert cg(lambda v: 0 * v, b).status.tolist() == [Status.STAGNATED]


def test_unreachable_tolerance_is_not_called_converged():
    a, b, _ = random_systems(11, "definite", 90, torch.float32)
    for _, s in solve_both(a, b, 0.0, 120):
        assert (s.status != int(Status.CONVERGED)).all()
    for _, s in solve_both(a, b, 1e-7, 400):
        assert (s.status != int(Status.CONVERGED)).any()
        good = (s.status == int(Status.CONVERGED)).numpy()
        assert (true_residual(a, s.x, b)[good] <= 1.01e-7).all()


def test_max_iterations_is_said_and_obeyed():
    a, b, _ = random_systems(13, "definite", 90, torch.float64)
    for _, s in solve_both(a, b, 1e-12, 3):
        assert (s.iterations <= 3).all() and (s.status == int(Status.MAX_ITERATIONS)).any()


def test_warm_start_saves_steps_and_a_bad_one_is_dropped():
    a, b, m = random_systems(17, "definite", 40, torch.float64)
    for solver, options in ((cg, CGOptions(200, 1e-8)), (minres, MinresOptions(200, 1e-8))):
        cold = solver(dense(a), b, options, preconditioner=m)
        warm = solver(dense(a), b, options, x0=cold.x, preconditioner=m)
        good = cold.status == int(Status.CONVERGED)
        assert int(good.sum()) >= 3
        assert (warm.iterations[good] == 0).all() and torch.equal(warm.x[good], cold.x[good])
        for bad in (torch.full_like(b, torch.nan), -1e3 * cold.x):
            s = solver(dense(a), b, options, x0=bad, preconditioner=m)
            assert torch.equal(s.x, cold.x) and torch.equal(s.status, cold.status)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_neighbours_do_not_change_a_bit(dtype, poison):
    a, b, _ = random_systems(19, "indefinite", 20, dtype)
    a[::2] = random_systems(20, "definite", 20, dtype)[0][::2]

    def products(matrix):
        # Elementwise and row by row, so that the product itself does not depend on the batch either.
        return lambda v: torch.stack([(row * v).sum(1) for row in matrix.unbind(1)], 1)

    bad_b, bad_a = b.clone(), a.clone()
    bad_b[3, 5] = poison
    bad_a[6] = poison
    for solver in (cg, minres):
        alone = [solver(products(a[i : i + 1]), b[i : i + 1]) for i in range(BATCH)]
        for matrix, rhs, lost in ((a, b, ()), (a, bad_b, (3,)), (bad_a, b, (6,))):
            s = solver(products(matrix), rhs)
            for i in range(BATCH):
                if i in lost:
                    assert s.status[i] == Status.NON_FINITE and bool(torch.isfinite(s.x[i]).all())
                    assert torch.isinf(s.residual[i])
                    continue
                for name in (f.name for f in dataclasses.fields(s)):
                    assert torch.equal(getattr(s, name)[i], getattr(alone[i], name)[0]), (solver, i, name)


def test_ended_images_get_zeros():
    seen = []
    d = torch.tensor([[1.0, 1.0], [1.0, 2.0]], dtype=torch.float64)

    def matvec(v):
        seen.append(v.clone())
        return d * v

    s = cg(matvec, torch.ones(2, 2, dtype=torch.float64))
    assert s.iterations.tolist() == [1, 2] and bool((seen[1][0] == 0).all())


def test_an_indefinite_preconditioner_is_noticed():
    b = torch.ones(1, 4, dtype=torch.float64)
    for solver in (cg, minres):
        s = solver(lambda v: 2 * v, b, preconditioner=lambda v: -v)
        assert s.status.tolist() == [Status.NEGATIVE_CURVATURE] and bool((s.x == 0).all())


def test_shapes_and_bad_input():
    b = torch.ones(2, 1, 3, 4)
    for solver in (cg, minres):
        s = solver(lambda v: 3 * v, b)
        assert s.x.shape == b.shape and s.status.tolist() == [0, 0]
        assert solver(lambda v: v, b[:0]).x.shape == b[:0].shape
        with pytest.raises(InputError, match="matvec must return"):
            solver(lambda v: v[:, :, :2], b)
        with pytest.raises(InputError, match="b must be"):
            solver(lambda v: v, b.long())
        with pytest.raises(InputError, match="x0 must have the shape"):
            solver(lambda v: v, b, x0=b[:1])
        with pytest.raises(InputError, match="x0 and b"):
            solver(lambda v: v, b, x0=b.double())
    for bad in ({"max_iterations": 0}, {"tolerance": -1.0}, {"tolerance": float("nan")}):
        with pytest.raises(InputError):
            CGOptions(**bad)
        with pytest.raises(InputError):
            MinresOptions(**bad)
    with pytest.raises(InputError, match="truncated_fallback"):
        CGOptions(truncated_fallback="yes")  # type: ignore[arg-type]


def test_underflow_on_the_way_back_is_not_called_converged():
    d = torch.full((1, 8), 1e20)
    b = torch.full((1, 8), 3e-30)
    for solver in (cg, minres):
        s = solver(lambda v: d * v, b)
        assert s.status.item() == Status.STAGNATED and s.residual.item() == 1.0


def test_lanczos_against_dense_eigenvalues():
    rng = np.random.default_rng(23)
    a = matrices(rng, "indefinite", 30, np.full(5, 100.0))
    exact = np.linalg.eigvalsh(a)
    v0 = torch.tensor(rng.standard_normal((5, 30)))
    for dtype, tol in ((torch.float64, 1e-12), (torch.float32, 2e-6)):
        low, high = extreme_eigenvalues(dense(torch.tensor(a).to(dtype)), v0.to(dtype), 30)
        np.testing.assert_allclose(low, exact[:, 0], atol=tol)
        np.testing.assert_allclose(high, exact[:, -1], atol=tol)
    low, high = extreme_eigenvalues(dense(torch.tensor(a)), v0, 6)
    assert (low.numpy() >= exact[:, 0] - 1e-14).all() and (high.numpy() <= exact[:, -1] + 1e-14).all()
    assert (high > low).all()
    scaled = extreme_eigenvalues(dense(torch.tensor(a)), v0 * 1e-200, 6)
    np.testing.assert_allclose(scaled[0], low, rtol=1e-12)


def test_lanczos_breakdown_and_poison():
    d = torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 5.0, 5.0, 5.0], [1.0, torch.nan, 1.0, 1.0], [-2.0, 1.0, 0.0, 7.0]])
    v0 = torch.ones(4, 4)
    v0[3] = torch.tensor([1.0, 0.0, 0.0, 1.0])
    low, high = extreme_eigenvalues(lambda v: d * v, v0, 10)
    np.testing.assert_allclose(low[[0, 1, 3]], [1.0, 5.0, -2.0], rtol=1e-5)
    np.testing.assert_allclose(high[[0, 1, 3]], [4.0, 5.0, 7.0], rtol=1e-5)
    assert torch.isnan(low[2]) and torch.isnan(high[2])
    alone = extreme_eigenvalues(lambda v: d[3:] * v, v0[3:], 10)
    assert torch.equal(low[3:], alone[0]) and torch.equal(high[3:], alone[1])
    assert torch.isnan(extreme_eigenvalues(lambda v: v, torch.zeros(1, 4))[0]).all()
    one = extreme_eigenvalues(lambda v: d[:1] * v, v0[:1], 1)
    assert one[0].item() == one[1].item() == 2.5
    with pytest.raises(InputError):
        extreme_eigenvalues(lambda v: v, v0, 0)
    with pytest.raises(InputError):
        extreme_eigenvalues(lambda v: v, v0.long())


def test_batch_helpers():
    g = torch.Generator().manual_seed(0)
    for n in (1, 7, 100, 1037):
        a, b = torch.randn(2, 9, n, generator=g)
        whole = dot(a, b)
        np.testing.assert_allclose(whole, (a.double() * b.double()).sum(1), rtol=0, atol=1e-12 * n)
        assert torch.equal(whole[4:5], dot(a[4:5], b[4:5]))
        assert torch.equal(norm(a), torch.sqrt(dot(a, a)))
    exponents = torch.tensor([-1022, -3, 0, 10, 1023])
    assert exp2_int(exponents).tolist() == [2.0**e for e in exponents.tolist()]
    kept = select(torch.tensor([True, False]), torch.ones(2, 2), torch.tensor([[torch.nan], [3.0]]).expand(2, 2))
    assert kept.tolist() == [[1.0, 1.0], [3.0, 3.0]]
