"""Check, time, and report."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch

from .cases import CASES
from .machine import Bounds
from .problem import INPUTS, Case, Problem, flat
from .timing import CONTROL, PLANTED, Ratio, Timing, interleave

EPS = 2.0**-23


@dataclass
class Row:
    """One candidate of one case."""

    case: str
    name: str
    milliseconds: float
    spread: float
    ratio: Ratio
    """How many times longer than ours."""
    error: float
    """Against float64: relative, or what the case measures (`cg`: the residual)."""


@dataclass
class Result:
    """A case's rows, ours first; `void` says why its times may not be quoted; `wrong` why it was not timed."""

    case: Case
    rows: list[Row] = field(default_factory=list)
    timing: Timing | None = None
    void: str | None = None
    wrong: str | None = None


def _errors(case: Case) -> dict[str, float]:
    """The largest error of each candidate over the inputs. Memory of the answers' sizes is poisoned before."""
    found = {}
    for name, f in case.candidates.items():
        errors = []
        for k in range(INPUTS):
            exact = case.others.get(name, case.exact)[k].flatten()
            poison = [torch.full((exact.numel(),), torch.nan) for _ in range(2)]
            del poison
            answer = flat(f(k)).reshape(-1)
            if answer.numel() != exact.numel():
                errors.append(float("inf"))
            elif case.measure is not None:
                errors.append(case.measure(answer, k))
            else:
                errors.append(float((answer - exact).norm() / exact.norm()))
        # A NaN must not get lost in a comparison.
        found[name] = max(e if e == e else float("inf") for e in errors)
    return found


def _judge(case: Case, errors: dict[str, float]) -> str | None:
    limit = case.tolerance if case.tolerance is not None else max(2.0 * errors[case.judge], 4 * EPS)
    if not errors["ours"] <= limit:
        return f"ours has an error of {errors['ours']:.1e} against float64, more than {limit:.1e}"
    bad = [n for n, e in errors.items() if not e <= (case.tolerance or 1e-3)]
    return f"{bad[0]} has an error of {errors[bad[0]]:.1e} against float64" if bad else None


def run(
    problem: Problem, names: Iterable[str] = tuple(CASES), rounds: int = 21, say: Callable[[str], None] = lambda _: None
) -> list[Result]:
    """Each case: check every candidate, time them in turns, check them again."""
    results = []
    for name in names:
        for case in CASES[name](problem):
            say(case.name)
            result = Result(case)
            results.append(result)
            errors = _errors(case)
            result.wrong = _judge(case, errors)
            if result.wrong:
                continue
            result.timing = timing = interleave(case.candidates, rounds)
            result.void, result.wrong = timing.void, _judge(case, _errors(case))
            for n in (*case.candidates, CONTROL, PLANTED):
                row = Row(case.name, n, 1e3 * timing.median(n), timing.spread(n), timing.ratio(n), errors.get(n, 0.0))
                result.rows.append(row)
    return results


def to_csv(results: Iterable[Result]) -> str:
    """One line a candidate."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(("case", "candidate", "milliseconds", "spread", "ratio", "low", "high", "error", "void"))
    for result in results:
        for r in result.rows:
            numbers = (r.milliseconds, r.spread, r.ratio.median, r.ratio.low, r.ratio.high, r.error)
            writer.writerow((r.case, r.name, *(f"{v:.4g}" for v in numbers), result.void or ""))
    return out.getvalue()


def to_json(
    results: Iterable[Result], problem: Problem, bounds: Bounds, machine: dict[str, object]
) -> dict[str, object]:
    """Everything, as JSON values."""
    return {
        "machine": machine,
        "problem": {n: v for n, v in vars(problem).items() if n != "learned_regularizers"},
        "bounds": vars(bounds),
        "cases": {
            r.case.name: {
                "void": r.void,
                "wrong": r.wrong,
                "missing": r.case.missing,
                "notes": r.case.notes,
                "flops": r.case.flops,
                "bytes": r.case.bytes,
                "gflops": r.case.flops / r.rows[0].milliseconds / 1e6 if r.rows else None,
                "candidates": {
                    row.name: {
                        "milliseconds": row.milliseconds,
                        "spread": row.spread,
                        "ratio": [row.ratio.median, row.ratio.low, row.ratio.high],
                        "error": row.error,
                    }
                    for row in r.rows
                },
            }
            for r in results
        },
    }
