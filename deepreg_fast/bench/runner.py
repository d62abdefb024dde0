"""Benchmark runner: checks, timings and output."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch

from .cases import CASES, one_line
from .ceilings import Ceilings
from .cuda_cases import CUDA_CASES
from .machine import Bounds
from .target import Target
from .timing import CONTROL, PLANTED, Ratio, Timing, cold, interleave
from .workload import Case, Workload, flat

EPS = 2.0**-23
Table = Mapping[str, Callable[[Workload], Iterator[Case]]]


@dataclass
class Row:
    """One candidate of one case."""

    case: str
    name: str
    milliseconds: float
    spread: float
    ratio: Ratio
    """Time relative to ours."""
    error: float
    """Error against float64: relative, or the case's measure (`cg`: the residual)."""
    cold: float | None = None
    """Milliseconds with a cold L2 cache, if the target's clock measures them."""
    peak: int | None = None
    """Peak bytes of a call, if the target's allocator reports them."""


@dataclass
class Result:
    """A case's rows, ours first. `void` is the reason why its times are not valid, `wrong` why its results are not."""

    case: Case
    rows: list[Row] = field(default_factory=list)
    timing: Timing | None = None
    void: str | None = None
    wrong: str | None = None


def _errors(case: Case) -> dict[str, float]:
    """The largest error of each candidate over the inputs. Memory of the results' size is filled with NaN before."""
    error_of = {}
    for name, f in case.candidates.items():
        errors = []
        for k in range(len(case.exact)):
            exact = case.others.get(name, case.exact)[k].flatten()
            poison = [
                torch.full((exact.numel(),), torch.nan, dtype=torch.float32, device=exact.device) for _ in range(2)
            ]
            del poison
            answer = flat(f(k)).reshape(-1).to(exact.device)
            if answer.numel() != exact.numel():
                errors.append(float("inf"))
            elif case.measure is not None and name not in case.others:
                errors.append(case.measure(answer, k))
            else:
                errors.append(float((answer - exact).norm() / exact.norm()))
        # A NaN counts as an infinite error, because comparisons would ignore it.
        error_of[name] = max(e if e == e else float("inf") for e in errors)
    return error_of


def _judge(case: Case, errors: dict[str, float]) -> str | None:
    limit = case.tolerance if case.tolerance is not None else max(2.0 * errors[case.judge], 4 * EPS)
    if not errors["ours"] <= limit:
        return f"ours has an error of {errors['ours']:.1e} against float64, more than {limit:.1e}"
    wrong = [n for n, e in errors.items() if not e <= case.allowed.get(n, case.tolerance or 1e-3)]
    return f"{wrong[0]} has an error of {errors[wrong[0]]:.1e} against float64" if wrong else None


def cases_of(target: Target) -> Table:
    """The table of cases for a target."""
    return CUDA_CASES if target.device.type == "cuda" else CASES


def run(
    problem: Workload,
    names: Iterable[str] | None = None,
    rounds: int = 21,
    say: Callable[[str], None] = lambda _: None,
    table: Table | None = None,
) -> list[Result]:
    """Run each case of the target's table: check every candidate, time them alternately, check them again."""
    table = table or cases_of(problem.target)
    results = []
    for name in table if names is None else names:
        for case in table[name](problem):
            say(case.name)
            results.append(measure(case, problem.target, rounds))
            case.release()
    return results


def measure(case: Case, target: Target, rounds: int) -> Result:
    """Check, time, and check again one case."""
    result, errors = check(case)
    if result.wrong:
        return result
    time_candidates(result, target, rounds, errors)
    result.wrong = _judge(case, _errors(case))
    return result


def check(case: Case) -> tuple[Result, dict[str, float]]:
    """Compare every candidate with the float64 results. Candidates that cannot run here are moved to `missing`."""
    result = Result(case)
    _drop_broken(case)
    errors = _errors(case)
    result.wrong = _judge(case, errors)
    return result, errors


def time_candidates(result: Result, target: Target, rounds: int, errors: dict[str, float]) -> None:
    """Time the candidates alternately and add their rows to `result`."""
    case = result.case
    result.timing = timing = interleave(case.candidates, rounds, clock=target.clock)
    cold_seconds = cold(case.candidates, min(rounds, 9), target.clock)
    peaks = {n: target.peak(f) for n, f in case.candidates.items()}
    result.void = timing.void
    for n in (*case.candidates, CONTROL, PLANTED):
        row = Row(case.name, n, 1e3 * timing.median(n), timing.spread(n), timing.ratio(n), errors.get(n, 0.0))
        row.cold = 1e3 * cold_seconds[n] if n in cold_seconds else None
        row.peak = peaks.get(n)
        result.rows.append(row)


def _drop_broken(case: Case) -> None:
    """Move peers that cannot run here to `missing`."""
    for name, f in list(case.candidates.items()):
        if name not in ("ours", case.judge):
            try:
                f(0)
            except Exception as error:
                del case.candidates[name]
                case.missing[name] = one_line(error)


def to_csv(results: Iterable[Result]) -> str:
    """CSV with one line per candidate."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    head = ("case", "candidate", "milliseconds", "spread", "ratio", "low", "high", "error", "void", "cold", "peak")
    writer.writerow(head)
    for result in results:
        for r in result.rows:
            numbers = (r.milliseconds, r.spread, r.ratio.median, r.ratio.low, r.ratio.high, r.error)
            writer.writerow(
                (r.case, r.name, *(f"{v:.4g}" for v in numbers), result.void or "", *_blank(r.cold, r.peak))
            )
    return out.getvalue()


def _blank(*values: float | None) -> list[str]:
    return ["" if v is None else f"{v:.4g}" for v in values]


def to_json(
    results: Iterable[Result], problem: Workload, bounds: Bounds | Ceilings, machine: dict[str, object]
) -> dict[str, object]:
    """All results as JSON values."""
    return {
        "machine": machine,
        "problem": {n: v for n, v in vars(problem).items() if n not in ("learned_regularizers", "target")},
        "device": problem.target.device.type,
        "bounds": vars(bounds),
        "cases": {
            r.case.name: {
                "void": r.void,
                "wrong": r.wrong,
                "missing": r.case.missing,
                "notes": r.case.notes,
                "flops": r.case.flops,
                "bytes": r.case.bytes,
                "least_bytes": r.case.least or r.case.bytes,
                "roofline": bounds.roofline(r.case.flops, r.case.bytes, r.rows[0].milliseconds) if r.rows else None,
                "gflops": r.case.flops / r.rows[0].milliseconds / 1e6 if r.rows else None,
                "candidates": {
                    row.name: {
                        "milliseconds": row.milliseconds,
                        "spread": row.spread,
                        "ratio": [row.ratio.median, row.ratio.low, row.ratio.high],
                        "error": row.error,
                        "cold_milliseconds": row.cold,
                        "peak_bytes": row.peak,
                    }
                    for row in r.rows
                },
            }
            for r in results
        },
    }
