"""Contents of a reproduction's folder. Missing or damaged files are listed instead of raising errors."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import InputError
from ...evaluation.compare import paired

GROUPS = {"paper": "The paper's methods", "beyond": "Beyond the paper", "ledger": "Ledger"}
DIRECT = ("adjoint", "minimum_norm")
"""Methods without iterations."""


class Row:
    """One row's `result.json`. A field that is missing or of another type is None, empty, or NaN in an array."""

    def __init__(self, data: dict[str, Any]) -> None:
        self.data = data
        self.name = self.text("name")
        # Keep "β = 10" on one line.
        self.label = (self.text("label") or self.name).replace(" = ", "\u00a0=\u00a0")
        self.group = self.text("group") or "paper"
        self.method = self.text("method")
        self.ratio = self.number("ratio")
        self.psnr = self.numbers("psnr")

    def get(self, *keys: str) -> Any:
        """The value under nested keys, or None."""
        value: Any = self.data
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        return value

    def number(self, *keys: str) -> float | None:
        """The finite number under nested keys, or None."""
        value = as_number(self.get(*keys))
        return value if math.isfinite(value) else None

    def numbers(self, *keys: str) -> np.ndarray:
        """The list of numbers under nested keys, float64, with NaN for other entries; empty if there is no list."""
        values = self.get(*keys)
        return np.array([as_number(v) for v in values] if isinstance(values, list) else [], float)

    def text(self, *keys: str) -> str:
        """The text under nested keys, or an empty one."""
        value = self.get(*keys)
        return value if isinstance(value, str) else ""

    def table(self, *keys: str) -> dict[str, Any]:
        """The dictionary under nested keys, or an empty one."""
        value = self.get(*keys)
        return value if isinstance(value, dict) else {}

    def curve(self, x: str, y: str, *keys: str) -> tuple[np.ndarray, np.ndarray]:
        """Two lists under `keys`, cut to the shorter one, without entries where either is not finite."""
        a, b = self.numbers(*keys, x), self.numbers(*keys, y)
        n = min(len(a), len(b))
        finite = np.isfinite(a[:n]) & np.isfinite(b[:n])
        return a[:n][finite], b[:n][finite]

    @property
    def config(self) -> dict[str, Any]:
        """Settings of the last stage of the training; empty if there is none."""
        stages = self.get("training", "stages")
        last = stages[-1] if isinstance(stages, list) and stages else None
        return last["config"] if isinstance(last, dict) and isinstance(last.get("config"), dict) else {}

    def against(self, other: Row | None) -> dict[str, Any] | None:
        """Paired PSNR differences to another row (`evaluation.compare.paired`), over images where both are finite."""
        if other is None or len(self.psnr) == 0 or len(self.psnr) != len(other.psnr):
            return None
        finite = np.isfinite(self.psnr) & np.isfinite(other.psnr)
        return paired(self.psnr[finite], other.psnr[finite]) if finite.any() else None


@dataclass
class Record:
    """A reproduction's folder: its finished rows in the order of the settings, and its missing files."""

    folder: Path
    rows: list[Row] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    """A phrase for each expected file that is missing or unreadable."""

    @property
    def declared(self) -> dict[str, dict[str, Any]]:
        """The settings of each row, by name."""
        rows = self.settings.get("rows")
        row_settings = [r for r in rows if isinstance(r, dict)] if isinstance(rows, list) else []
        return {str(r.get("name")): r for r in row_settings}

    @property
    def problem(self) -> dict[str, Any]:
        """The measurement problem: from the results, otherwise from the first row of the settings."""
        first = next(iter(self.declared.values()), {})
        return next((p for s in (self.results, first) if isinstance(p := s.get("problem"), dict)), {})

    @property
    def ratios(self) -> list[float]:
        """The rows' ratios of measurements to pixels, with the problem's ratio first."""
        problem_ratio = as_number(self.problem.get("ratio"))
        return sorted({r.ratio for r in self.rows if r.ratio is not None}, key=lambda v: (v != problem_ratio, v))

    def at(self, ratio: float, *groups: str) -> list[Row]:
        """The rows with this ratio, in these groups or in all."""
        return [r for r in self.rows if r.ratio == ratio and (not groups or r.group in groups)]

    def named(self, name: str) -> Row | None:
        """The row with this name, or None."""
        return next((r for r in self.rows if r.name == name), None)

    def tv(self, ratio: float | None) -> Row | None:
        """The total variation row with this ratio, or None."""
        return next((r for r in self.rows if r.method == "tv" and r.ratio == ratio), None)

    def alpha(self, row: Row) -> float | None:
        """alpha of a row's regularizer, from its training or from that of the row whose weights it uses."""
        seen: set[str] = set()
        current: Row | None = row
        while current is not None and current.name not in seen:
            value = as_number(current.config.get("alpha"))
            if math.isfinite(value):
                return value
            seen.add(current.name)
            current = self.named(str(self.declared.get(current.name, {}).get("weights")))
        return None

    def best_bilevel(self, *groups: str) -> Row | None:
        """The bi-level row with the best mean PSNR at the problem's ratio, in `groups` or in all except the ledger."""
        rows = self.at(self.ratios[0], *(groups or ("paper", "beyond"))) if self.ratios else []
        scored = [(v, r) for r in rows if r.method == "bilevel" and (v := r.number("psnr_mean")) is not None]
        return max(scored, key=lambda pair: pair[0])[1] if scored else None


def read(folder: Path) -> Record:
    """Read a folder of `deepreg-fast reproduce`.

    Raises
    ------
    InputError
        If it is not a folder, or contains neither settings nor rows.
    """
    if not folder.is_dir():
        raise InputError(f"A report needs the folder of a reproduction, but {folder} is none; check the path.")
    record = Record(folder)
    record.settings = _json(record, "settings.json")
    record.results = _json(record, "results.json")
    declared = list(record.declared)
    present = sorted(p.name for p in folder.glob("rows/*") if p.is_dir())
    if not declared and not present:
        raise InputError(
            f"A report needs settings.json or rows/ of a reproduction, but {folder} holds neither; "
            "name the folder that `deepreg-fast reproduce --out` wrote."
        )
    for name in [*declared, *(n for n in present if n not in declared)]:
        data = _json(record, f"rows/{name}/result.json")
        if data:
            record.rows.append(Row({"name": name, **data}))
    return record


def as_number(value: Any) -> float:
    """A number as float, anything else as NaN."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


def _json(record: Record, name: str) -> dict[str, Any]:
    try:
        value = json.loads((record.folder / name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        record.missing.append(f"{name} (not written yet)")
        return {}
    except (OSError, ValueError, RecursionError):
        record.missing.append(f"{name} (cannot be read)")
        return {}
    if not isinstance(value, dict):
        record.missing.append(f"{name} (not a JSON object)")
        return {}
    return value
