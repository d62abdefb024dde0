"""What a reproduction is made of: a problem and rows, as data that can be written down and compared."""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from .. import checks
from ..errors import InputError
from ..evaluation.compare import Problem
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
TRAINED: dict[str, tuple[type[Trainer], type[TrainConfig]]] = {
    "bilevel": (BilevelTrainer, BilevelConfig),
    "denoiser": (DenoiserTrainer, BaselineConfig),
    "gradient_step": (GradientStepTrainer, BaselineConfig),
    "adversarial": (AdversarialTrainer, BaselineConfig),
}
METHODS = ("adjoint", "minimum_norm", "tv", *TRAINED)
GROUPS = ("paper", "beyond", "ledger")

# What of a training's config belongs to the machine or to the runner.
OF_MACHINE = ("out", "data", "init", "device", "device_budget_mb", "threads", "checkpoint_seconds")
# These describe a row and change nothing in it.
TEXTS = ("label", "group", "compare", "setting", "value", "unstated")
_FREE = {*TEXTS, "poster", "problem.data", "memory_budget_mb"}


@dataclass(frozen=True)
class Stage:
    """One training: its folder below the row's, and all settings of its config but those of the machine."""

    folder: str
    config: dict[str, Any]

    @property
    def cost(self) -> float:
        """Roughly proportional to the time that it takes."""
        c = self.config
        layers = c["channels"] * (2 + c["channels"] * (c["depth"] - 2))
        return float(c["steps"] * c["batch"] * (c["crop"] or 180) ** 2 * layers)


@dataclass(frozen=True)
class Chain:
    """Stages that follow each other, each from the weights of the one before; `values` are what was chosen for it."""

    values: dict[str, Any]
    stages: tuple[Stage, ...]

    @property
    def last(self) -> Stage:
        """The stage whose weights the chain gives."""
        return self.stages[-1]


@dataclass(frozen=True)
class Row:
    """One row of the table. `chains` are its trainings: none, one, or one for each choice."""

    name: str
    method: str
    problem: Problem
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
        """The row that this one begins from, or an empty string."""
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
        """The same with other images."""
        return Settings(tuple(_with_data(r, data) for r in self.rows))

    def select(self, names: tuple[str, ...] = (), group: str = "") -> Settings:
        """These rows (by default all) of this group (by default any), and those that they begin from.

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
        wanted = {r.name for r in self.rows if (not names or r.name in names) and (not group or r.group == group)}
        if not wanted:
            raise InputError("The settings must have rows of that choice, but have none; look at --rows and --group.")
        for row in reversed(in_order(self.rows)):
            if row.name in wanted and row.source:
                wanted.add(row.source)
        return Settings(tuple(r for r in self.rows if r.name in wanted))

    def like(self, name: str) -> str:
        """The end of a sentence about a name that is none: the closest one, or all."""
        close = difflib.get_close_matches(name, [r.name for r in self.rows], 1)
        return f"; did you mean {close[0]!r}?" if close else f"; there are {', '.join(r.name for r in self.rows)}"

    def to_json(self) -> str:
        """The canonical text: everything that a result depends on, defaults filled in."""
        return json.dumps({"format": FORMAT, "rows": [dataclasses.asdict(r) for r in self.rows]}, indent=1)

    @classmethod
    def from_json(cls, text: str, where: str = "The settings") -> Settings:
        """Settings from `to_json`'s answer.

        Raises
        ------
        InputError
            If the text is of another version or damaged.
        """
        try:
            found = json.loads(text)
            if found["format"] != FORMAT:
                raise InputError(
                    f"{where} must be of the format {FORMAT!r}, but is of {found['format']!r}; go on with the version "
                    "of deepreg-fast that wrote it, or name another folder (nothing was changed)."
                )
            return cls(tuple(_row_from(r) for r in found["rows"]))
        except (ValueError, KeyError, TypeError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(
                f"{where} must be what a reproduction wrote, but cannot be read ({error!r}); restore it or name "
                "another folder (nothing was changed)."
            ) from error


def changes(old: Row, new: Row) -> list[str]:
    """What differs between two rows of one name and matters, as `key: old -> new`."""
    a, b = dict(_flat(dataclasses.asdict(old))), dict(_flat(dataclasses.asdict(new)))
    out = []
    for key in sorted({*a, *b}):
        if key.partition(".")[0] in _FREE or key in _FREE or key.rpartition(".")[2] in _FREE:
            continue
        # A setting that the older file does not know had the value that is now its default.
        before, after = (d.get(key, _default(new, key)) for d in (a, b))
        if before != after:
            out.append(f"{_told(new, key)}: {before!r} -> {after!r}")
    return out


def _told(row: Row, key: str) -> str:
    """A key as the file has it: without the chain and the stage where there is one."""
    found = re.fullmatch(r"chains\.(\d+)\.stages\.(\d+)\.config\.(\w+)", key)
    if found is None:
        return key
    parts = [f"choice {found[1]}"] if len(row.chains) > 1 else []
    parts += [f"stage {found[2]}"] if any(len(c.stages) > 1 for c in row.chains) else []
    return ": ".join([", ".join(parts), found[3]]) if parts else found[3]


def _flat(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of nested tables by dotted keys; chains and stages are told by number, from 1."""
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
    """Every row after the one that it begins from."""
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


def _row_from(found: dict[str, Any]) -> Row:
    """A row from its JSON."""
    chains = tuple(
        Chain(c["values"], tuple(Stage(s["folder"], s["config"]) for s in c["stages"])) for c in found["chains"]
    )
    return Row(**{**found, "problem": Problem(**found["problem"]), "chains": chains, "tune": tuple(found["tune"])})


def _with_data(row: Row, data: str) -> Row:
    return dataclasses.replace(row, problem=dataclasses.replace(row.problem, data=data))
