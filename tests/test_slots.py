"""Continuous batching: every image has the bits of its recovery alone, whatever enters and leaves beside it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import deepreg_fast as dr
from deepreg_fast.batched.loop import simulate_device
from deepreg_fast.inverse.data_term import initial_point
from deepreg_fast.solvers import Slots

from .helpers import images, random_red

FIELDS = ("x", "status", "iterations", "gradients", "residual", "tau")


def stream(
    y: torch.Tensor, A: dr.LinearOperator, reg: dr.Regularizer, mu: torch.Tensor, options: dr.PGDOptions, size: int
) -> dict[str, list[torch.Tensor]]:
    """All images through `size` slots. One or two enter at a time, so that all enter beside images that are active."""
    x0 = initial_point(torch.nan_to_num(y), A, reg)
    slots = Slots(A, reg, options, y, x0, size)
    image_of: dict[int, int] = {}
    results: dict[int, dict[str, torch.Tensor]] = {}
    following, beside = 0, 0
    while len(results) < len(y):
        rows = slots.free()[: min(len(y) - following, 1 + following % 2)]
        if rows:
            chosen = list(range(following, following + len(rows)))
            following += len(rows)
            slots.refill(rows, y[chosen], mu[chosen], x0[chosen])
            image_of.update(zip(rows, chosen, strict=True))
            beside += len(image_of) > len(rows)
        slots.round()
        if rows := slots.ended():
            solution = slots.take(rows)
            for k, row in enumerate(rows):
                results[image_of.pop(row)] = {f: getattr(solution, f)[k] for f in FIELDS}
    assert beside > 2
    return {f: [results[i][f] for i in range(len(y))] for f in FIELDS}


def mixed(A: dr.LinearOperator, dtype: torch.dtype, count: int = 9) -> torch.Tensor:
    """Measurements whose recoveries take different numbers of rounds; one is not finite."""
    _, h, w = A.image_shape
    x = images(count, 1, h, w, dtype=dtype)
    flat = torch.linspace(0.0, 1.0, count, dtype=dtype).reshape(-1, 1, 1, 1)
    y = A.A(flat * x + (1 - flat) * 0.4)
    y[3] = float("nan")
    return y


PROBLEMS: dict[str, tuple[Callable[[], dr.LinearOperator], Callable[[], dr.Regularizer], int]] = {
    "network": (
        lambda: dr.SRM((1, 16, 12), 0.4),
        lambda: random_red(scale=0.3, double=False, channels=4),
        40,
    ),
    "tv": (lambda: dr.SRM((1, 16, 12), 0.4), lambda: dr.TV(0.05), 40),
    "transformed measurements": (lambda: dr.Blur((1, 16, 12), torch.ones(3, 3) / 9), lambda: dr.TV(0.05), 40),
    "prox by CG": (lambda: dr.Blur((1, 16, 12), torch.ones(3, 3) / 9, boundary="valid"), lambda: dr.TV(0.05), 24),
}


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("acceleration", ["none", "fista", "anderson"])
def test_each_image_has_the_bits_of_its_recovery_alone(acceleration: str, problem: str) -> None:
    A, reg = PROBLEMS[problem][0](), PROBLEMS[problem][1]()
    y = mixed(A, torch.float32, 9 if A.has_shifted_inverse else 6)
    mu = torch.logspace(-3, -1, len(y))
    options = dr.PGDOptions(PROBLEMS[problem][2], 1e-3, acceleration)
    assert reg.backend_for(torch.zeros(1, *A.image_shape)).name == "cpu"
    got = stream(y, A, reg, mu, options, 3)
    rounds = set()
    for i in range(len(y)):
        if i == 3:
            assert int(got["status"][i]) == int(dr.Status.NON_FINITE)
            continue
        alone = dr.recover(y[i : i + 1], A, reg, mu[i : i + 1], options=options)
        rounds.add(int(alone.gradients))
        assert all(torch.equal(got[f][i], getattr(alone, f)[0]) for f in FIELDS), i
    assert len(rounds) > 1, "the images must end at different rounds"


@pytest.mark.parametrize("acceleration", ["none", "fista", "anderson"])
def test_on_the_reference_backend_the_bits_are_those_of_a_batch(acceleration: str) -> None:
    """PyTorch computes a lone image in another order, so the comparison is with one batch of all."""
    A, reg = dr.SRM((1, 16, 12), 0.4), random_red(scale=0.3, channels=4)
    y = mixed(A, torch.float64)
    mu = torch.full((len(y),), 0.05, dtype=torch.float64)
    options = dr.PGDOptions(60, 1e-6, acceleration)
    batch = dr.recover(y, A, reg, mu, options=options)
    got = stream(y, A, reg, mu, options, 3)
    for i in set(range(len(y))) - {3}:
        assert all(torch.equal(got[f][i], getattr(batch, f)[i]) for f in FIELDS), i


@pytest.mark.parametrize("acceleration", ["none", "fista", "anderson"])
def test_under_the_mask_of_a_device(acceleration: str) -> None:
    A, reg = dr.SRM((1, 16, 12), 0.4), random_red(scale=0.06, double=False, channels=4)
    y = mixed(A, torch.float32)
    mu = torch.full((len(y),), 0.05)
    options = dr.PGDOptions(60, 1e-4, acceleration)
    with simulate_device():
        batch = dr.recover(y, A, reg, mu, options=options)
        got = stream(y, A, reg, mu, options, 3)
    for i in set(range(len(y))) - {3}:
        assert all(torch.equal(got[f][i], getattr(batch, f)[i]) for f in FIELDS), i


def test_arguments_are_not_changed() -> None:
    A, reg = dr.SRM((1, 16, 12), 0.4), random_red(scale=0.06, double=False, channels=4)
    y, mu = mixed(A, torch.float32), torch.full((9,), 0.05)
    before = y.clone(), mu.clone()
    stream(y, A, reg, mu, dr.PGDOptions(10), 3)
    assert torch.equal(y.nan_to_num(), before[0].nan_to_num()) and torch.equal(mu, before[1])
    with pytest.raises(dr.errors.InputError, match="record"):
        Slots(A, reg, dr.PGDOptions(record=True), y, torch.zeros(1, 1, 16, 12), 2)
