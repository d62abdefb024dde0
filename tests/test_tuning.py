"""The search of a weight mu: fewer values than all, the same choice."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import deepreg_fast as dr
from deepreg_fast.evaluation import Method, Tuner, bracketed

from .helpers import images


def _exhaustive(tuner: Tuner, method: Method, low: float, high: float) -> float:
    """The best of all decades, then of all thirds around it."""

    def score(mu: float) -> float:
        return tuner.score(replace(method, mu=mu))

    decades = [10.0**e for e in range(round(math.log10(low)), round(math.log10(high)) + 1)]
    best = max(decades, key=score)
    return max([best, *(m for k in (-2, -1, 1, 2) if low <= (m := best * 10.0 ** (k / 3)) <= high)], key=score)


class _Peaked(Tuner):
    """Scores that fall off on both sides of a peak, steeper on one."""

    def __init__(self, peak: float, left: float, right: float) -> None:
        super().__init__(*(torch.empty(0),) * 2, A=None)  # type: ignore[arg-type]
        self.peak, self.left, self.right = peak, left, right

    def score(self, method: Method) -> float:
        assert method.mu is not None
        distance = math.log10(method.mu) - self.peak
        slope = self.left if distance < 0 else self.right
        return self.scores.setdefault(self.score_key(method), -slope * abs(distance))


@settings(deadline=None)
@given(peak=st.floats(-7, 2), left=st.floats(0.1, 10), right=st.floats(0.1, 10))
def test_the_same_choice_as_of_all_values(peak: float, left: float, right: float) -> None:
    some, every = _Peaked(peak, left, right), _Peaked(peak, left, right)
    assert some.mu(Method("tv"), 1e-5, 1.0).mu == pytest.approx(_exhaustive(every, Method("tv"), 1e-5, 1.0), rel=1e-12)
    assert len(some.scores) < len(every.scores)


def test_where_the_start_diverges_all_values_are_tried() -> None:
    scores = [3.0, 2.0, -math.inf, -math.inf]
    assert bracketed(range(4), lambda i: scores[int(i)], 2) == 0


def test_the_choice_for_tv_on_images() -> None:
    A = dr.SRM((1, 12, 12), 0.4)
    x = torch.zeros(2, 1, 12, 12)
    x[..., 3:9, 4:10] = 0.8
    x += 0.02 * images(2, 1, 12, 12, dtype=torch.float32)
    y = A.A(x)
    method = Method("tv", dr.TV(1e-2), options=dr.PGDOptions(40, 1e-3, acceleration="anderson", tau=2.5e-3))
    chosen = Tuner(x, y, A).mu(method, 1e-3, 1.0).mu
    assert chosen == pytest.approx(_exhaustive(Tuner(x, y, A), method, 1e-3, 1.0), rel=1e-12)
