"""The search of a weight mu: fewer values than all, the same choice."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import deepreg_fast as dr
from deepreg_fast.data import embedded_images
from deepreg_fast.errors import InputError
from deepreg_fast.evaluation import tuning
from deepreg_fast.evaluation.compare import Method, run
from deepreg_fast.evaluation.tuning import Tuner, bracketed, tuned_tv
from deepreg_fast.solvers import Solution

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


def _photographs() -> tuple[torch.Tensor, torch.Tensor, dr.SRM]:
    x = embedded_images(24).train.x[::36]
    A = dr.SRM((1, 24, 24), 0.3)
    return x, A.A(x), A


_TV = Method("tv", dr.TV(1e-2), options=dr.PGDOptions(800, 1e-3, acceleration="anderson", tau=2.5e-3))


def test_warm_starts_take_fewer_gradients_to_as_good_a_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    problem, gradients = _photographs(), [0]

    def counted(*arguments: Any, **named: Any) -> Any:
        found = run(*arguments, **named)
        assert isinstance(found, Solution) and bool((found.status == int(dr.Status.CONVERGED)).all())
        gradients[0] += int(found.gradients.sum())
        return found

    monkeypatch.setattr(tuning, "run", counted)
    chosen, spent = {}, {}
    cold = Tuner(*problem)
    for warm in (False, True):
        gradients[0] = 0
        tuner = Tuner(*problem, warm=True) if warm else cold
        chosen[warm] = tuner.mu(_TV, 1e-4, 1.0)
        spent[warm] = gradients[0] / len(tuner.scores)
    assert spent[True] < 0.7 * spent[False]
    assert cold.score(chosen[True]) == pytest.approx(cold.score(chosen[False]), abs=0.03)


def test_kept_scores_do_not_depend_on_the_search() -> None:
    problem, scores = _photographs(), {}
    tuned_tv(*problem, eps=1e-2, scores=scores)
    assert len(scores) > 3
    for key in list(scores)[:3]:
        alone = Tuner(*problem).score(replace(_TV, mu=float(key.split()[0].removeprefix("mu="))))
        assert alone == scores[key]


def test_the_nearest_solution_is_one_of_the_same_scale() -> None:
    tuner = Tuner(*_photographs(), warm=True)
    method = replace(_TV, options=dr.PGDOptions(2))
    assert tuner._near(replace(method, mu=1.0)) is None
    solved = {}
    for mu, scale in ((1e-3, 1.0), (1e-1, 1.0), (2e-2, 2.0)):
        tuner.score(at := replace(method, mu=mu, scale=scale))
        solved[mu] = tuner._near(at)
    assert tuner._near(replace(method, mu=2e-2)) is solved[1e-1] is not None
    assert tuner._near(replace(method, mu=1e-4)) is solved[1e-3]
    assert tuner._near(replace(method, mu=1e-4, scale=2.0)) is solved[2e-2]


def test_a_tuner_is_for_one_regularizer() -> None:
    """Its scores are named by mu and scale alone."""
    tuner = Tuner(*_photographs())
    tuner.score(replace(_TV, mu=0.1))
    with pytest.raises(InputError, match="make a Tuner for each"):
        tuner.score(Method("other", dr.TV(2e-2), 0.1))
