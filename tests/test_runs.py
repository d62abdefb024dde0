"""Runs in their folders: one at a time, interrupted anywhere, with disks that fill up."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import deepreg_fast as dr
from deepreg_fast.errors import InputError
from deepreg_fast.training import checkpoint, log
from deepreg_fast.training import folder as run_folder
from deepreg_fast.training.checkpoint import load_checkpoint

from .helpers import log_lines, small_config

STEPS = 6


def _config(folder: Path, out: Path, **changes: Any) -> dr.BilevelConfig:
    small = {"steps": STEPS, "inner_iterations": 4, "adjoint_iterations": 2, "validate_every": 3, "warmup": 0}
    return small_config(folder, out, **{**small, **changes})


@pytest.fixture(name="whole", scope="module")
def _whole(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    """Every array of the last checkpoint of a run that nothing disturbed."""
    out = tmp_path_factory.mktemp("whole")
    dr.BilevelTrainer(_config(folder, out), progress=False).fit()
    return _arrays(out)


def _arrays(out: Path) -> dict[str, np.ndarray]:
    return {k: np.array(v) for k, v in load_checkpoint(out / "last.safetensors")[0].items()}


def _assert_same(out: Path, whole: dict[str, np.ndarray]) -> None:
    found = _arrays(out)
    assert found.keys() == whole.keys()
    assert [k for k in whole if not np.array_equal(found[k], whole[k])] == []
    keys = [d["step"] for d in log_lines(out) if "loss" in d]
    assert keys == list(range(1, STEPS + 1))
    assert not [p.name for p in out.iterdir() if p.name.endswith(".tmp")]


def _interrupting(target: Any, name: str, count: int, monkeypatch: pytest.MonkeyPatch, late: bool) -> None:
    """Raise KeyboardInterrupt at the call number `count` of `target.name`, before it or after."""
    real, seen = getattr(target, name), [0]

    def call(*rest: Any, **more: Any) -> Any:
        seen[0] += 1
        if seen[0] == count and not late:
            raise KeyboardInterrupt
        answer = real(*rest, **more)
        if seen[0] == count:
            raise KeyboardInterrupt
        return answer

    monkeypatch.setattr(target, name, call)


@pytest.mark.parametrize("point", ["_step", "gradients", "after_update", "_validate", "save_checkpoint", "put"])
@pytest.mark.parametrize(("late", "seconds", "budget"), [(False, 60.0, 64), (True, 0.0, 0)])
def test_an_interrupted_trainer_goes_on_to_the_same_bits(
    folder: Path,
    tmp_path: Path,
    whole: dict[str, np.ndarray],
    monkeypatch: pytest.MonkeyPatch,
    point: str,
    late: bool,
    seconds: float,
    budget: int,
) -> None:
    """By resume() or fit() on the same object, from the checkpoint of step 0 or the newest, warm starts in memory or on
    disk, interrupted before or after each part of a step."""
    c = _config(folder, tmp_path, checkpoint_seconds=seconds, memory_budget_mb=budget)
    trainer = dr.BilevelTrainer(c, progress=False)
    with monkeypatch.context() as patch:
        count = {"save_checkpoint": 2, "_validate": 1, "put": 9}.get(point, 4)
        objective = trainer.objective
        target = {"put": objective.store, "after_update": objective}.get(point, trainer)
        _interrupting(target, point, count, patch, late)
        with pytest.raises(KeyboardInterrupt):
            trainer.fit()
    trainer.fit() if late else trainer.resume()
    _assert_same(tmp_path, whole)


def test_a_stop_is_heard_once(folder: Path, tmp_path: Path, whole: dict[str, np.ndarray]) -> None:
    trainer = dr.BilevelTrainer(_config(folder, tmp_path), progress=False)
    real = trainer.gradients

    def gradients(batch: Any) -> dict[str, Any]:
        trainer.stopping = trainer.step_done == 2
        return real(batch)

    trainer.gradients = gradients  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    assert load_checkpoint(tmp_path / "last.safetensors")[1]["step"] == 3
    trainer.gradients = real  # type: ignore[method-assign]
    trainer.resume()
    _assert_same(tmp_path, whole)


def test_adam_forgets_what_a_checkpoint_does_not_hold(folder: Path, tmp_path: Path) -> None:
    c = _config(folder, tmp_path)
    same = {k: getattr(c, k) for k in dr.BaselineConfig.__dataclass_fields__ if hasattr(c, k)}
    trainer = dr.DenoiserTrainer(dr.BaselineConfig(**same), progress=False)
    trainer.folder.mkdir(exist_ok=True)
    trainer.save_checkpoint()
    trainer._step()
    assert trainer.optimizer.state_dict()["state"]
    trainer.load_state()
    assert not trainer.optimizer.state_dict()["state"]


def test_the_count_of_idle_steps_goes_on(folder: Path, tmp_path: Path) -> None:
    trainer = dr.BilevelTrainer(_config(folder, tmp_path), progress=False)
    trainer.objective._idle = 7
    trainer.save_checkpoint()
    again = dr.BilevelTrainer(_config(folder, tmp_path), progress=False)
    again.load_state()
    assert again.objective._idle == 7


def test_two_runs_in_one_folder(folder: Path, tmp_path: Path, whole: dict[str, np.ndarray]) -> None:
    """While the first is at work a second one is refused, looks are not, and making a trainer touches nothing."""
    c = _config(folder, tmp_path, memory_budget_mb=0, checkpoint_seconds=0.0)
    first = dr.BilevelTrainer(c, progress=False)
    real, seen = first.gradients, []

    def gradients(batch: Any) -> dict[str, Any]:
        if first.step_done == 3:
            before = {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()}
            second = dr.BilevelTrainer(c, progress=False)
            for train in (second.fit, second.resume):
                with pytest.raises(InputError, match="one process at a time"):
                    train()
            second.load_state()
            warm = second.objective.store.state()["store.x"]
            assert second.step_done == 3 and np.abs(warm).max() > 0  # type: ignore[arg-type]
            assert {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()} == before
            seen.append(second)
        return real(batch)

    first.gradients = gradients  # type: ignore[method-assign]
    first.fit()
    assert seen
    _assert_same(tmp_path, whole)


def test_files_of_warm_starts_are_made_by_a_run_only(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    trainer = dr.BilevelTrainer(_config(folder, out, memory_budget_mb=0), progress=False)
    assert not out.exists()
    assert not trainer.objective.store.get("x", trainer.placement.rows(np.arange(2))).any()


def test_a_disk_that_fills_up_keeps_the_last_checkpoint(
    folder: Path, tmp_path: Path, whole: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = dr.BilevelTrainer(_config(folder, tmp_path, checkpoint_seconds=0.0), progress=False)
    real, writes = os.fsync, [0]

    def fsync(number: int) -> None:
        writes[0] += 1
        if writes[0] > 6:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(number)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(InputError, match="No space left.*unharmed"):
            trainer.fit()
    assert 0 < load_checkpoint(tmp_path / "last.safetensors")[1]["step"] < STEPS
    trainer.resume()
    _assert_same(tmp_path, whole)


class _Full:
    """A log file on a disk that takes a few bytes at a time, and none between two writes."""

    def __init__(self, file: Any, full: Callable[[int], bool]) -> None:
        self.file, self.full, self.calls = file, full, 0

    def write(self, data: bytes) -> int:
        self.calls += 1
        if self.full(self.calls):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.file.write(data[:100])

    def close(self) -> None:
        self.file.close()


def test_a_log_that_fails_costs_nothing_else(
    folder: Path,
    tmp_path: Path,
    whole: dict[str, np.ndarray],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Its lines are written when there is room again; TensorBoard's events end; each is told once."""
    made = log.RunLog

    def failing(*rest: Any) -> log.RunLog:
        answer = made(*rest)
        answer._file = _Full(answer._file, lambda n: 4 <= n < 8)  # type: ignore[assignment]
        assert answer._board is not None
        answer._board._file = _Full(answer._board._file, lambda n: n > 1)  # type: ignore[assignment]
        return answer

    monkeypatch.setattr(run_folder, "RunLog", failing)
    dr.BilevelTrainer(_config(folder, tmp_path), progress=False).fit()
    _assert_same(tmp_path, whole)
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 2 and all("No space left" in t and "the training goes on" in t for t in told)


def test_tensorboard_reads_the_events(folder: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = dr.BilevelTrainer(_config(folder, tmp_path), progress=False)
    trainer.fit()
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    logged = [(d["step"], d["loss"]) for d in log_lines(tmp_path) if "loss" in d]
    assert [(e.step, e.value) for e in board.Scalars("loss")] == [(s, pytest.approx(v, rel=1e-6)) for s, v in logged]


def test_a_run_without_tensorboard(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: Any) -> None:
        raise TypeError("Descriptors cannot be created directly")

    monkeypatch.setattr(log, "_Board", broken)
    dr.BilevelTrainer(_config(folder, tmp_path, steps=1), progress=False).fit()
    assert "Descriptors" in capsys.readouterr().err and (tmp_path / "weights.safetensors").exists()


def test_a_resumed_log_drops_later_and_broken_lines(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = ['{"step": 1, "loss": 1}', "[]", '{"step": 2, "loss": 1}', '{"step": 3, "loss": 1}', '{"step": 2, "lo']
    path.write_text("\n".join(lines))
    written = log.RunLog(tmp_path, 5, 2, False, tensorboard=False)
    written.write(3, {"loss": 2.0})
    written.close()
    assert [json.loads(t)["step"] for t in path.read_text().splitlines()] == [1, 2, 3]


def test_weights_that_a_run_begins_from_are_not_replaced(folder: Path, tmp_path: Path) -> None:
    dr.BilevelTrainer(_config(folder, tmp_path / "a", steps=1), progress=False).fit()
    start = tmp_path / "b" / "weights.safetensors"
    start.parent.mkdir()
    start.write_bytes((tmp_path / "a" / "weights.safetensors").read_bytes())
    before = start.read_bytes()
    trainer = dr.BilevelTrainer(_config(folder, start.parent, init=str(start)), progress=False)
    with pytest.raises(InputError, match="must not replace inputs"):
        trainer.fit()
    assert start.read_bytes() == before and os.listdir(start.parent) == ["weights.safetensors"]
    pictures = replace(trainer.config, out=str(folder), init="")
    with pytest.raises(InputError, match="out must be another folder than data"):
        dr.BilevelTrainer(pictures, progress=False)


def test_the_pieces_of_a_checkpoint_are_those_of_its_arrays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "_PIECE", 64)
    arrays = {"a": np.arange(100.0), "b": np.broadcast_to(np.float32(0), (3, 30))}
    checkpoint.save_checkpoint(tmp_path / "c", arrays, {"x": 1})
    found, state = load_checkpoint(tmp_path / "c")
    assert state == {"x": 1} and all(np.array_equal(found[k], arrays[k]) for k in arrays)
