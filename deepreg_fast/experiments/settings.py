"""Settings of a reproduction: rows with their problems, as data that can be stored and compared."""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from .. import checks
from ..errors import InputError
from ..evaluation.compare import Experiment
from ..training import (
    AdversarialTrainer,
    BaselineConfig,
    BilevelConfig,
    BilevelTrainer,
    DenoiserTrainer,
    GradientStepTrainer,
    TrainConfig,
    Trainer,
)

FORMAT = "deepreg-fast-reproduction-1"
TRAINED: dict[str, tuple[Callable[..., Trainer], type[TrainConfig]]] = {
    "bilevel": (BilevelTrainer, BilevelConfig),
    "denoiser": (DenoiserTrainer, BaselineConfig),
    "gradient_step": (GradientStepTrainer, BaselineConfig),
    "adversarial": (AdversarialTrainer, BaselineConfig),
}
METHODS = ("adjoint", "minimum_norm", "tv", *TRAINED)
GROUPS = ("paper", "beyond", "ledger")

# Fields of a training's configuration that belong to the machine or to the runner.
OF_MACHINE = ("out", "data", "init", "device", "device_budget_mb", "threads", "checkpoint_seconds")
# Descriptive fields of a row, which do not change its result.
TEXTS = ("label", "group", "compare", "setting", "value", "unstated")
_FREE = {*TEXTS, "poster", "problem.data", "memory_budget_mb"}


@dataclass(frozen=True)
class Stage:
    """One training: its folder below the row's, and its configuration without the settings of the machine."""

    folder: str
    config: dict[str, Any]

    @property
    def cost(self) -> float:
        """Cost, roughly proportional to the time."""
        c = self.config
        layers = c["channels"] * (2 + c["channels"] * (c["depth"] - 2))
        return float(c["steps"] * c["batch"] * (c["crop"] or 180) ** 2 * layers)


@dataclass(frozen=True)
class Chain:
    """Consecutive stages, each from the weights of the previous one. `values` are its values of the swept settings."""

    values: dict[str, Any]
    stages: tuple[Stage, ...]

    @property
    def last(self) -> Stage:
        """The last stage, whose weights are the result of the chain."""
        return self.stages[-1]


@dataclass(frozen=True)
class Row:
    """One row of the table. `chains` are its trainings: none, one, or one per candidate of a sweep."""

    name: str
    method: str
    problem: Experiment
    label: str = ""
    group: str = "paper"
    poster: dict[str, float] | None = None
    chains: tuple[Chain, ...] = ()
    init: str = ""
    weights: str = ""
    tune: tuple[str, ...] = ()
    recovery: dict[str, Any] = field(default_factory=dict)
    compare: str = ""
    setting: str = ""
    value: Any = ""
    unstated: str = ""

    @property
    def source(self) -> str:
        """The row whose weights this row starts from, or an empty string."""
        return self.init or self.weights


@dataclass(frozen=True)
class Settings:
    """All rows, each with its own problem."""

    rows: tuple[Row, ...]

    def __getitem__(self, name: str) -> Row:
        return next(r for r in self.rows if r.name == name)

    def __contains__(self, name: object) -> bool:
        return any(r.name == name for r in self.rows)

    def with_data(self, data: str) -> Settings:
        """A copy with other images."""
        return Settings(tuple(_with_data(r, data) for r in self.rows))

    def select(self, names: tuple[str, ...] = (), group: str = "") -> Settings:
        """The rows `names` (by default all) of `group` (by default any), and the rows that they start from.

        Raises
        ------
        InputError
            If a name or a group is unknown.
        """
        for name in names:
            if name not in self:
                raise InputError(f"--rows must name rows of the settings, but there is no {name!r}{self.like(name)}.")
        if group:
            checks.choice(group, "--group", GROUPS)
        selected = {r.name for r in self.rows if (not names or r.name in names) and (not group or r.group == group)}
        if not selected:
            raise InputError("The settings must have rows of that choice, but have none; look at --rows and --group.")
        for row in reversed(in_order(self.rows)):
            if row.name in selected and row.source:
                selected.add(row.source)
        return Settings(tuple(r for r in self.rows if r.name in selected))

    def like(self, name: str) -> str:
        """Suffix for an "unknown name" error: the closest match, or all valid names."""
        close = difflib.get_close_matches(name, [r.name for r in self.rows], 1)
        return f"; did you mean {close[0]!r}?" if close else f"; there are {', '.join(r.name for r in self.rows)}"

    def to_json(self) -> str:
        """Canonical JSON of everything that a result depends on, including defaults."""
        return json.dumps({"format": FORMAT, "rows": [dataclasses.asdict(r) for r in self.rows]}, indent=1)

    @classmethod
    def from_json(cls, text: str, where: str = "The settings") -> Settings:
        """Settings from the output of `to_json`.

        Raises
        ------
        InputError
            If the text is damaged or from another version.
        """
        try:
            data = json.loads(text)
            if data["format"] != FORMAT:
                raise InputError(
                    f"{where} must be of the format {FORMAT!r}, but is of {data['format']!r}; go on with the version "
                    "of deepreg-fast that wrote it, or name another folder (nothing was changed)."
                )
            return cls(tuple(_row_from(r) for r in data["rows"]))
        except (ValueError, KeyError, TypeError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(
                f"{where} must be what a reproduction wrote, but cannot be read ({error!r}); restore it or name "
                "another folder (nothing was changed)."
            ) from error


def changes(old: Row, new: Row) -> list[str]:
    """Relevant differences between two rows of the same name, as `key: old -> new`."""
    a, b = dict(_flat(dataclasses.asdict(old))), dict(_flat(dataclasses.asdict(new)))
    differences = []
    for key in sorted({*a, *b}):
        if key.partition(".")[0] in _FREE or key in _FREE or key.rpartition(".")[2] in _FREE:
            continue
        # Settings that the older file does not contain take their default values.
        before, after = (d.get(key, _default(new, key)) for d in (a, b))
        if before != after:
            differences.append(f"{_place(new, key)}: {before!r} -> {after!r}")
    return differences


def _place(row: Row, key: str) -> str:
    """A key as in the settings file: without chain and stage if there is only one."""
    match = re.fullmatch(r"chains\.(\d+)\.stages\.(\d+)\.config\.(\w+)", key)
    if match is None:
        return key
    parts = [f"choice {match[1]}"] if len(row.chains) > 1 else []
    parts += [f"stage {match[2]}"] if any(len(c.stages) > 1 for c in row.chains) else []
    return ": ".join([", ".join(parts), match[3]]) if parts else match[3]


def _flat(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of nested tables by dotted keys; chains and stages are numbered from 1."""
    if isinstance(values, dict):
        for k, v in values.items():
            yield from _flat(v, f"{prefix}.{k}" if prefix else k)
    elif isinstance(values, (list, tuple)) and any(isinstance(v, dict) for v in values):
        for i, v in enumerate(values):
            yield from _flat(v, f"{prefix}.{i + 1}")
    else:
        yield prefix, list(values) if isinstance(values, tuple) else values


def _default(row: Row, key: str) -> Any:
    if row.method in TRAINED and ".config." in key:
        known = {f.name: f.default for f in dataclasses.fields(TRAINED[row.method][1])}
        return known.get(key.rpartition(".")[2])
    return None


def in_order(rows: tuple[Row, ...]) -> list[Row]:
    """The rows sorted so that each follows the row that it starts from."""
    by_name = {r.name: r for r in rows}
    done: dict[str, Row] = {}
    for row in rows:
        path: list[Row] = []
        while row.name not in done and row not in path:
            path.append(row)
            if not row.source:
                break
            row = by_name[row.source]
        else:
            if row.name not in done:
                circle = " -> ".join(r.name for r in [*path[path.index(row) :], row])
                raise InputError(
                    f"Rows must not begin from each other in a circle, but {circle}; remove one init or weights."
                )
        done.update((r.name, r) for r in reversed(path))
    return list(done.values())


def _row_from(stored: dict[str, Any]) -> Row:
    """A row from its JSON object."""
    chains = tuple(
        Chain(c["values"], tuple(Stage(s["folder"], s["config"]) for s in c["stages"])) for c in stored["chains"]
    )
    return Row(
        **{**stored, "problem": Experiment(**stored["problem"]), "chains": chains, "tune": tuple(stored["tune"])}
    )


def _with_data(row: Row, data: str) -> Row:
    return dataclasses.replace(row, problem=dataclasses.replace(row.problem, data=data))
