"""Settings of files and of Python: each is checked by its type, and one sentence names it."""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import deepreg_fast as dr
from deepreg_fast.errors import InputError
from deepreg_fast.evaluation.compare import Experiment
from deepreg_fast.experiments import parse
from deepreg_fast.training import BaselineConfig, BilevelConfig, TrainConfig

from .test_cli import Run, _run

__all__ = ["_run"]

WRONG = [None, True, "false", "60", 5, 0.5, [], [1], {}, {"a": 1}, math.nan, math.inf, -1, "a\0b"]
FIELDS = [
    (c, f.name) for c in (BilevelConfig, BaselineConfig, Experiment, dr.PGDOptions) for f in dataclasses.fields(c)
]


@pytest.mark.parametrize(("cls", "name"), FIELDS)
def test_a_setting_is_of_its_type_or_named(cls: type, name: str) -> None:
    """Of each setting's wrong values some are right for it; those that are taken have the type of the default."""
    default = next(f for f in dataclasses.fields(cls) if f.name == name)
    kind = str(default.type)
    for value in WRONG:
        try:
            made = cls(**{name: value})
        except InputError as error:
            assert name in str(error)
        else:
            taken = getattr(made, name)
            assert (type(taken).__name__ if taken is not None else "None") in kind or (
                kind == "float" and type(taken) is int
            ), (name, value)
            assert not (isinstance(taken, float) and not math.isfinite(taken))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(), inner, max_size=2),
    max_leaves=4,
)


@given(st.sampled_from([BilevelConfig, BaselineConfig]), st.data())
def test_any_json_gives_settings_or_a_sentence(cls: type[TrainConfig], data: st.DataObject) -> None:
    names = st.sampled_from([f.name for f in dataclasses.fields(cls)])
    values = data.draw(JSON | st.dictionaries(names, JSON, max_size=3))
    try:
        made = cls.from_json(json.dumps(values))
    except InputError:
        return
    assert cls.from_json(made.to_json()) == made


@given(st.data())
def test_any_table_gives_rows_or_a_sentence(data: st.DataObject) -> None:
    row = {
        **{"name": "a", "method": "bilevel", "label": "A", "group": "paper", "value": 1, "tune": ["mu"]},
        **{"poster": {"psnr": 1.0}, "train": {"steps": 3}, "stages": [{}], "choose": {"beta": [1.0]}},
        **{"recovery": {"tolerance": 1e-3}, "compare": "", "setting": "", "unstated": "", "init": "", "ratio": 0.5},
    }
    whole: dict[str, Any] = {"problem": {"data": "x"}, "defaults": {"bilevel": {"crop": 16}}, "row": [row]}
    dates = st.just(datetime.date(2020, 1, 1))
    place = data.draw(st.sampled_from([*row, "problem.data", "problem.ratio", "problem", "defaults", "row"]))
    wrong = data.draw(JSON | dates | st.lists(dates, max_size=1))
    if place in row:
        row[place] = wrong
    elif "." in place:
        whole["problem"][place.partition(".")[2]] = wrong
    else:
        whole[place] = wrong
    try:
        settings = parse(whole)
    except InputError:
        return
    assert type(settings).from_json(settings.to_json()) == settings


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("[]", "object of names and values"),
        ("null", "object of names and values"),
        ("[" * 100_000, "cannot be read"),
        ("{", "JSON"),
        ('{"augment": "false"}', "augment must be true or false, but is 'false'"),
        ('{"checkpoint_seconds": NaN}', "checkpoint_seconds must be a number, but is nan"),
        ('{"keep_dc": "no"}', "keep_dc must be true or false or none"),
        ('{"data": 5}', "data must be a text"),
    ],
)
def test_a_wrong_file_of_settings_is_one_sentence(run: Run, tmp_path: Path, text: str, word: str) -> None:
    (tmp_path / "c.json").write_text(text)
    answer = run("train", "bilevel", "--config", tmp_path / "c.json", "--out", tmp_path / "r", "--crop", 16)
    assert answer.code == 2 and word in answer.err and answer.err.count("\n") == 1 and not (tmp_path / "r").exists()
    answer = run("train", "bilevel", "--config", tmp_path)
    assert answer.code == 2 and "cannot be read" in answer.err


def test_settings_are_not_written_over(run: Run, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"out": str(tmp_path)}))
    answer = run("train", "bilevel", "--config", tmp_path / "config.json", "--crop", 16)
    assert answer.code == 2 and "must not replace inputs" in answer.err and len(list(tmp_path.iterdir())) == 1
