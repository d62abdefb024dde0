"""Parser of settings files. Every training's configuration is built and checked before anything runs."""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import re
import tomllib
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from .. import checks
from ..errors import InputError
from ..evaluation.compare import Experiment
from ..problem import FIELDS, SRM_OPTIONS
from ..solvers import PGDOptions
from .settings import GROUPS, METHODS, OF_MACHINE, TEXTS, TRAINED, Chain, Row, Settings, Stage, in_order

SHIPPED = ("bsd400", "quick", "ledger")
# Keys of a row that describe its training; those of its problem are `FIELDS`.
_TRAINING_KEYS = ("train", "stages", "init", "weights", "choose")


def load_settings(name: str | Path, problem: str = "", sigma: float | None = None) -> Settings:
    """Settings of a TOML file, or shipped ones by name: "bsd400", "quick", "ledger".

    Parameters
    ----------
    name : str or Path
    problem : str
        Replaces the problem of all rows. For a problem other than "cs", rows that vary the SRM are left out, with the
        rows that start from them, and so are the SRM's options elsewhere.
    sigma : float, optional
        Replaces the noise of [problem]. Rows that set their own keep it.

    Returns
    -------
    Settings

    Raises
    ------
    InputError
        If the file does not exist or is invalid; the message says why.
    """
    if str(name) in SHIPPED:
        text = resources.files("deepreg_fast.experiments").joinpath(f"{name}.toml").read_text(encoding="utf-8")
    else:
        try:
            text = Path(name).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(
                f"--settings must be one of {', '.join(SHIPPED)} or a TOML file, but {str(name)!r} cannot be read "
                f"({error})."
            ) from error
    try:
        return parse(_with_problem(tomllib.loads(text), problem, sigma))
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise InputError(f"{name} must be a TOML file, but is not one: {error}.") from error


def _with_problem(tables: dict[str, Any], problem: str, sigma: float | None) -> dict[str, Any]:
    """The tables with another problem (see `load_settings`). What is not a table is left to `parse`."""
    general, rows = tables.get("problem", {}), tables.get("row", [])
    if not isinstance(general, dict) or not isinstance(rows, list) or not all(isinstance(r, dict) for r in rows):
        return tables
    general = dict(general)
    if problem:
        general["problem"] = problem
        rows = [{k: v for k, v in r.items() if k != "problem"} for r in rows]
    if sigma is not None:
        general["sigma"] = sigma
    if problem not in ("", "cs"):
        general = {k: v for k, v in general.items() if k not in SRM_OPTIONS}
        dropped = {r.get("name") for r in rows if any(k in r for k in SRM_OPTIONS)}
        while more := {r.get("name") for r in rows if {r.get("init"), r.get("weights")} & dropped} - dropped:
            dropped |= more
        rows = [_without_srm(r, dropped) for r in rows if r.get("name") not in dropped]
    return {**tables, "problem": general, "row": rows}


def _without_srm(row: dict[str, Any], dropped: set[Any]) -> dict[str, Any]:
    """The row without options of the SRM in its stages, and without a comparison to a row that was left out."""
    row = {k: v for k, v in row.items() if k != "compare" or v not in dropped}
    if isinstance(row.get("stages"), list):
        row["stages"] = [
            {k: v for k, v in s.items() if k not in SRM_OPTIONS} if isinstance(s, dict) else s for s in row["stages"]
        ]
    return row


def parse(tables: Mapping[str, Any]) -> Settings:
    """Settings from the tables `problem`, `defaults` and `row` of a TOML file, with every configuration checked."""
    _only(tables, ("problem", "defaults", "row"), "The settings")
    problem = _made(Experiment, _table(tables.get("problem", {}), "[problem]"), "[problem]")
    defaults = _table(tables.get("defaults", {}), "[defaults]")
    _only(defaults, tuple(TRAINED), "[defaults]")
    for method, values in defaults.items():
        # Defaults of a method must be valid even if no row uses them.
        _config(method, problem, _table(values, f"[defaults.{method}]"), f"[defaults.{method}]")
    row_tables = tables.get("row", [])
    if not isinstance(row_tables, list) or not row_tables:
        raise InputError("The settings must have at least one [[row]], but have none; add one.")
    rows = tuple(_row(_table(r, "[[row]]"), problem, defaults) for r in row_tables)
    _check_names(rows)
    return Settings(rows)


def _table(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InputError(f"{where} must be a table of settings, but is {value!r}.")
    return value


def _only(settings: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
    for key in settings:
        if key not in known:
            close = difflib.get_close_matches(key, known, 1)
            raise InputError(
                f"{where} must have no setting {key!r}"
                + (f"; did you mean {close[0]!r}?" if close else f"; there are {', '.join(known)}.")
            )


def _made(cls: Any, values: dict[str, Any], where: str) -> Any:
    """`cls(**values)`; errors name their place in the file."""
    _only(values, tuple(f.name for f in dataclasses.fields(cls)), where)
    try:
        return cls(**values)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    except TypeError as error:
        raise InputError(f"{where} must hold numbers and texts of the right kind, but: {error}.") from error


def _config(method: str, problem: Experiment, values: dict[str, Any], where: str) -> dict[str, Any]:
    """All settings of a training except those of the machine, checked."""
    for key in values:
        if key in OF_MACHINE or key in (*FIELDS, "split"):
            raise InputError(
                f"{where} must not set {key!r}: the problem's settings belong in [problem], in the row or in a stage "
                "before its last, those of the machine on the command line."
            )
    cls = TRAINED[method][1]
    merged = {k: getattr(problem, k) for k in (*FIELDS, "split")} | {"validation": problem.tuning} | values
    config = dataclasses.asdict(_made(cls, merged, where))
    return {k: v for k, v in config.items() if k not in OF_MACHINE}


def _row(settings: dict[str, Any], problem: Experiment, defaults: dict[str, Any]) -> Row:
    """Parse one row."""
    name = settings.get("name")
    if not isinstance(name, str) or not re.fullmatch(r"[a-z0-9][a-z0-9-]*", name):
        raise InputError(f"A [[row]] must have a name of a-z, 0-9 and hyphens, but has {name!r}.")
    where = f"Row {name!r}"
    _only(settings, ("name", "method", "poster", "tune", "recovery", *TEXTS, *FIELDS, *_TRAINING_KEYS), where)
    method = settings.get("method")
    if method not in METHODS:
        raise InputError(f"{where}: method must be one of {', '.join(METHODS)}, but is {method!r}.")
    row_problem = _made(
        Experiment, {**dataclasses.asdict(problem), **{k: settings[k] for k in FIELDS if k in settings}}, where
    )
    chains = _chains(settings, method, row_problem, dict(defaults.get(method, {})), where)
    texts: dict[str, Any] = {k: settings[k] for k in TEXTS if k in settings}
    for key in (*TEXTS, "init", "weights"):
        value = settings.get(key, "")
        if not isinstance(value, str) and not (key == "value" and isinstance(value, (bool, int, float))):
            raise InputError(f"{where}: {key} must be a text, but is {value!r}.")
    checks.choice(texts.get("group", "paper"), f"{where}: group", GROUPS)
    return Row(
        name,
        method,
        row_problem,
        **{"label": name, **texts},
        poster=_poster(settings.get("poster"), where),
        chains=chains,
        init=settings.get("init", ""),
        weights=settings.get("weights", ""),
        tune=_tune(settings.get("tune"), method, where),
        recovery=_recovery(_table(settings.get("recovery", {}), f"{where}: recovery"), method, where),
    )


def _chains(
    settings: dict[str, Any], method: str, problem: Experiment, base: dict[str, Any], where: str
) -> tuple[Chain, ...]:
    """The trainings of a row."""
    keys = [k for k in _TRAINING_KEYS if k in settings]
    if method not in TRAINED:
        if keys:
            raise InputError(f"{where}: {method} has nothing to train, so it must not set {', '.join(keys)}.")
        return ()
    if "weights" in settings:
        if len(keys) > 1:
            raise InputError(
                f"{where} must either take the weights of a row or train, but sets {', '.join(keys)}; remove weights."
            )
        return ()
    train = {**base, **_table(settings.get("train", {}), f"{where}: train")}
    stages = settings.get("stages", [{}])
    if not isinstance(stages, list) or not stages:
        raise InputError(f"{where}: stages must be a list of tables, but is {stages!r}.")
    choose = _table(settings.get("choose", {}), f"{where}: choose")
    for key, values in choose.items():
        if not isinstance(values, list) or not values:
            raise InputError(f"{where}: choose.{key} must be a list of values, but is {values!r}.")
    chains = []
    for picked in itertools.product(*choose.values()):
        values = dict(zip(choose, picked, strict=True))
        folder = "_".join(f"{k}-{v}" for k, v in values.items()) or ("train" if len(stages) == 1 else "")
        parsed_stages = []
        for i, stage in enumerate(stages):
            part = str(i + 1) if len(stages) > 1 else ""
            stage_name = f"{where}, stage {i + 1}" if part else where
            stage_values = dict(_table(stage, stage_name))
            # The last stage trains for the row's problem; earlier stages may use easier ones.
            problem_values = {k: stage_values.pop(k) for k in FIELDS if k in stage_values and i + 1 < len(stages)}
            stage_problem = _made(Experiment, {**dataclasses.asdict(problem), **problem_values}, stage_name)
            config = _config(method, stage_problem, {**train, **stage_values, **values}, stage_name)
            parsed_stages.append(Stage("/".join(p for p in (folder, part) if p), config))
        chains.append(Chain(values, tuple(parsed_stages)))
    return tuple(chains)


def _poster(settings: Any, where: str) -> dict[str, float] | None:
    if settings is None:
        return None
    _only(_table(settings, f"{where}: poster"), ("psnr", "ssim"), f"{where}: poster")
    return {k: checks.number(v, f"{where}: poster.{k}", 0.0) for k, v in settings.items()}


def _tune(settings: Any, method: str, where: str) -> tuple[str, ...]:
    if settings is None:
        return () if method in ("bilevel", "adjoint", "minimum_norm") else ("mu",)
    if not isinstance(settings, list) or not all(t in ("mu", "scale") for t in settings):
        raise InputError(f"{where}: tune must be a list of 'mu' and 'scale', but is {settings!r}.")
    if method == "tv" and settings != ["mu"] or method in ("adjoint", "minimum_norm") and settings:
        raise InputError(f"{where}: {method} must not set tune; its tuning is fixed.")
    return tuple(settings)


def _recovery(settings: dict[str, Any], method: str, where: str) -> dict[str, Any]:
    if settings and method in ("adjoint", "minimum_norm"):
        raise InputError(f"{where}: {method} solves nothing, so it must not set recovery.")
    _only(settings, ("acceleration", "memory", "max_iterations", "tolerance"), f"{where}: recovery")
    options = {"acceleration": "fista", "max_iterations": 500, "tolerance": 1e-4} if method in TRAINED else {}
    options |= settings
    _made(PGDOptions, options, where)
    return options


def _check_names(rows: tuple[Row, ...]) -> None:
    """Check that names are unique and that references lead, without cycles, to rows of the same method with weights."""
    names = [r.name for r in rows]
    duplicates = sorted({n for n in names if names.count(n) > 1})
    if duplicates:
        raise InputError(
            f"Rows must have different names, but {', '.join(map(repr, duplicates))} comes twice; rename one."
        )
    settings = Settings(rows)
    for row in rows:
        for key in ("init", "weights", "compare"):
            name = getattr(row, key)
            if name and name not in settings:
                raise InputError(
                    f"Row {row.name!r}: {key} must name a row, but there is no {name!r}{settings.like(name)}."
                )
    in_order(rows)
    for row in rows:
        if row.source and settings[row.source].method != row.method:
            source = settings[row.source]
            raise InputError(
                f"Row {row.name!r} must begin from a row of its own method {row.method!r}, but {source.name!r} is "
                f"{source.method!r}."
            )
