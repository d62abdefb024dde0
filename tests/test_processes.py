"""A training that several processes share has the bits of one process alone, and ends as a whole."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import deepreg_fast as dr
from deepreg_fast.errors import InputError
from deepreg_fast.training import checkpoint
from deepreg_fast.training.checkpoint import load_checkpoint
from deepreg_fast.training.lanes import Lanes
from deepreg_fast.training.world import World

from .helpers import log_lines, small_config
from .processes import LOOPBACK, Processes

pytestmark = pytest.mark.skipif(
    not hasattr(os, "fork") or torch.cuda.is_available(), reason="no fork on this platform, or none beside CUDA"
)

BASE: dict[str, Any] = {"lanes": 4, "batch": 8, "validation": 3, "validate_every": 4, "steps": 8, "threads": 1}
BASE |= {"checkpoint_seconds": 0.0, "inner_iterations": 6, "adjoint_iterations": 4, "validation_crop": 16}


@pytest.fixture(name="warm", scope="module", autouse=True)
def _warm(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """One step before any fork, so that torch's optimizer and TensorBoard are imported once."""
    dr.BilevelTrainer(_config(folder, tmp_path_factory.mktemp("warm"), steps=1), progress=False).fit()


def _config(folder: Path, out: Path, **changes: Any) -> dr.BilevelConfig:
    return small_config(folder, out, **{**BASE, **changes})


def _train(c: dr.BilevelConfig, backend: str = "cpu") -> Callable[[int], Any]:
    def train(_: int) -> int:
        with dr.use_backend(backend):
            trainer = dr.BilevelTrainer(c, progress=False)
            trainer.resume() if trainer.checkpoint_path.exists() else trainer.fit()
        return trainer.step_done

    return train


def _run(size: int, tmp_path: Path, function: Callable[[int], Any]) -> list[dict[str, Any]]:
    return Processes(size, tmp_path / f"processes{len(list(tmp_path.iterdir()))}", function).answers()


def _hashes(out: Path) -> dict[str, str]:
    """Of all that a run leaves, without the times in its log."""
    names = ("last.safetensors", "weights.safetensors", "best.safetensors")
    found = {n: hashlib.sha256((out / n).read_bytes()).hexdigest() for n in names}
    lines = [{k: v for k, v in d.items() if k not in ("time", "seconds", "waiting")} for d in log_lines(out)]
    return found | {"log": json.dumps(lines)}


@pytest.mark.parametrize(
    ("backend", "sizes", "changes"),
    [
        ("cpu", (1, 2, 3, 4), {}),
        ("cpu", (1, 3), {"adjoint": "jfb", "sigma": 0.0, "memory_budget_mb": 0, "loss": "psnr", "steps": 5}),
        ("reference", (1, 2), {"loss": "sure", "problem": "denoise", "sigma": 0.05, "steps": 4}),
        *(
            pytest.param(backend, (1, 2, 3, 4), changes, marks=pytest.mark.long)
            for backend, changes in (
                ("cpu", {"adjoint": "unrolled", "adjoint_iterations": 3}),
                ("cpu", {"loss": "l1", "problem": "fourier"}),
                ("reference", {"beta": 0.1, "memory_budget_mb": 0, "steps": 20}),
                ("cpu", {"beta": 0.1, "steps": 20, "penalty": "curvature"}),
            )
        ),
    ],
)
def test_any_number_of_processes_gives_the_same_bits(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    backend: str,
    sizes: tuple[int, ...],
    changes: dict[str, Any],
) -> None:
    """Weights, checkpoints and log; 3 processes have unequal numbers of lanes."""
    hashes = []
    for size in sizes:
        place = tmp_path / str(size)
        place.mkdir()
        # The checkpoint records the folder's name, which must not differ.
        monkeypatch.chdir(place)
        c = _config(folder, Path("run"), **changes)
        answers = _run(size, tmp_path, _train(c, backend))
        assert [a.get("value") for a in answers] == [c.steps] * size, answers
        hashes.append(_hashes(place / "run"))
    assert all(h == hashes[0] for h in hashes[1:])


def test_each_process_keeps_the_rows_of_its_lanes(folder: Path, tmp_path: Path) -> None:
    def rows(_: int) -> list[int]:
        trainer = dr.BilevelTrainer(_config(folder, tmp_path / "run"), progress=False)
        return [len(trainer.objective.store.tables["x"].array()), len(trainer.lanes.owned)]

    count = len(dr.BilevelTrainer(_config(folder, tmp_path / "run"), progress=False).samples)
    assert [a["value"] for a in _run(2, tmp_path, rows)] == [[count // 2] * 2] * 2


def test_a_run_goes_on_with_other_processes(folder: Path, tmp_path: Path) -> None:
    """Two processes, then three, then one; warm starts on disk. Files of processes that are gone are removed."""
    c = _config(folder, tmp_path / "cut", memory_budget_mb=0)
    whole = replace(c, out=str(tmp_path / "whole"))

    def until(step: int) -> Callable[[int], Any]:
        def train(rank: int) -> None:
            trainer = dr.BilevelTrainer(c, progress=False)
            inner = trainer._step

            def counted() -> dict[str, Any]:
                # As a signal that reaches one process only.
                trainer.stopping = rank == 1 and trainer.step_done == step - 1
                return inner()

            trainer._step = counted  # type: ignore[method-assign]
            try:
                trainer.resume() if trainer.checkpoint_path.exists() else trainer.fit()
            except KeyboardInterrupt:
                return trainer.step_done
            return None

        return train

    assert [a["value"] for a in _run(2, tmp_path, until(3))] == [4, 4]
    assert (tmp_path / "cut/store_x.1.bin").exists()
    assert [a["value"] for a in _run(3, tmp_path, until(6))] == [7, 7, 7]
    assert _run(1, tmp_path, _train(c)) == [{"value": c.steps}]
    assert not list((tmp_path / "cut").glob("store_*.*.bin"))
    assert _run(1, tmp_path, _train(whole)) == [{"value": c.steps}]
    a, b = (load_checkpoint(tmp_path / n / "last.safetensors")[0] for n in ("cut", "whole"))
    assert a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


def test_what_cannot_be_computed_stays_with_its_image(folder: Path, tmp_path: Path) -> None:
    """NaN in one sample's measurements: one process recovers it, all count it, and the weights are those of one
    process alone."""

    def train(size: int) -> Callable[[int], Any]:
        def poisoned(_: int) -> list[Any]:
            c = _config(folder, tmp_path / f"nan{size}")
            trainer = dr.BilevelTrainer(c, progress=False)
            recover = trainer.objective.recover
            measure = recover.measure

            def poison(batch: Any) -> torch.Tensor:
                y = measure(batch)
                y[torch.from_numpy(batch.rows.samples == 5)] = torch.nan
                return y

            recover.measure = poison  # type: ignore[method-assign]
            trainer.fit()
            weights = b"".join(p.detach().numpy().tobytes() for p in trainer.params)
            return [trainer.counters.values["nonfinite_resets"], hashlib.sha256(weights).hexdigest()]

        return poisoned

    found = [a.get("value", a) for size in (1, 3) for a in _run(size, tmp_path, train(size))]
    assert found[0][0] >= 1 and all(f == found[0] for f in found)


def _acting(c: dr.BilevelConfig, rank: int, step: int, act: Callable[[], None]) -> Callable[[int], None]:
    """Train; the process `rank` calls `act` before its gradients of step `step`."""

    def train(this: int) -> None:
        trainer = dr.BilevelTrainer(c, progress=False)
        inner = trainer.objective.gradients

        def gradients(batch: Any) -> Any:
            if this == rank and trainer.step_done == step:
                act()
            return inner(batch)

        trainer.objective.gradients = gradients  # type: ignore[method-assign]
        trainer.fit()

    return train


def test_a_failure_ends_all_with_a_sentence(folder: Path, tmp_path: Path) -> None:
    """One process has no memory left: it says so, the others say which one; the checkpoint is whole."""
    c = _config(folder, tmp_path / "run")

    def exhaust() -> None:
        raise torch.OutOfMemoryError("Tried to allocate 20 GiB")

    first, second, third = _run(3, tmp_path, _acting(c, 1, 3, exhaust))
    assert second["error"] == "OutOfMemory" and "20 GiB" in second["message"]
    assert first["error"] == third["error"] == "ProcessLost"
    assert first["message"] == (
        "All processes of a training must go on, but one failed; process 1 of 3: Tried to allocate 20 GiB"
    )
    assert load_checkpoint(tmp_path / "run/last.safetensors")[1]["step"] == 3
    assert _run(2, tmp_path, _train(c)) == [{"value": c.steps}] * 2


def test_a_full_disk_keeps_the_last_checkpoint(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    c = _config(folder, tmp_path / "run")
    write = checkpoint._write_rows

    def train(rank: int) -> None:
        written = 0

        def full(*arguments: Any) -> None:
            nonlocal written
            written += 1
            if rank == 1 and written > 12:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            write(*arguments)

        monkeypatch.setattr(checkpoint, "_write_rows", full)
        dr.BilevelTrainer(c, progress=False).fit()

    first, second = _run(2, tmp_path, train)
    assert second["error"] == "InputError" and "No space left" in second["message"]
    assert first["error"] == "ProcessLost" and "process 1 of 2" in first["message"]
    assert load_checkpoint(tmp_path / "run/last.safetensors")[1]["step"] >= 1
    assert not list((tmp_path / "run").glob(".*tmp"))


def test_a_killed_process_ends_the_others(folder: Path, tmp_path: Path) -> None:
    c = _config(folder, tmp_path / "run")

    first, second, third = _run(3, tmp_path, _acting(c, 2, 4, lambda: os.kill(os.getpid(), 9)))
    assert third["message"] == "-9"
    for other in (first, second):
        assert other["error"] == "ProcessLost"
        assert other["message"].startswith("All 3 processes of a training must go on, but one has ended (")
    assert load_checkpoint(tmp_path / "run/last.safetensors")[1]["step"] == 4


def test_processes_and_lanes_that_do_not_fit(folder: Path, tmp_path: Path) -> None:
    def build(**changes: Any) -> Callable[[int], Any]:
        def trainer(_: int) -> int:
            return dr.BilevelTrainer(_config(folder, tmp_path / "run", **changes), progress=False).world.size

        return trainer

    for answer in _run(3, tmp_path, build(lanes=2)):
        assert answer["error"] == "InputError"
        assert answer["message"].startswith(
            "Each process must have a lane of its own, but 3 processes came for 2 lanes"
        )
    # Without lanes, processes that happen to be grouped train apart.
    assert _run(2, tmp_path, build(lanes=1)) == [{"value": 1}] * 2
    with pytest.raises(InputError, match="batch must be a multiple of lanes"):
        _config(folder, tmp_path, lanes=3)
    with pytest.raises(InputError, match="at least 8 samples for a step"):
        Lanes(24, 32, 4, seed=0)


def test_lanes_share_out_the_samples() -> None:
    """Every sample once in an epoch, in its own lane, whatever the number of processes."""
    alone = Lanes(24, 8, 4, seed=3)
    for step in range(6):
        parts = alone.samples(step)
        assert [set(p % 4) for p in parts] == [{0}, {1}, {2}, {3}] and all(len(p) == 2 for p in parts)
        shared = [Lanes(24, 8, 4, 3, rank, 3) for rank in range(3)]
        again = {lane: s for one in shared for lane, s in zip(one.local_lanes, one.samples(step), strict=True)}
        assert all(np.array_equal(again[lane], p) for lane, p in enumerate(parts))
        for one in shared:
            samples = np.concatenate(one.samples(step))
            assert np.array_equal(one.owned[one.local(samples)], samples)
    epoch = np.concatenate([np.concatenate(alone.samples(step)) for step in range(alone.steps_per_epoch)])
    assert sorted(epoch) == list(range(24)) and alone.epoch(alone.steps_per_epoch) == 1.0


def test_values_are_interleaved_in_order() -> None:
    assert torch.equal(World().interleave(torch.arange(5), 5), torch.arange(5))


def _torchrun(folder: Path, out: Path, *options: str, **environment: str) -> subprocess.Popen[str]:
    """The command as users start it."""
    c = _config(folder, out)
    given = ("data", "out", "crop", "channels", "steps", "batch", "lanes", "validation", "validation_crop",
             "validate_every", "inner_iterations", "adjoint_iterations", "checkpoint_seconds", "threads", "warmup",
             "sigma", "beta")  # fmt: skip
    settings = [t for name in given for t in (f"--{name.replace('_', '-')}", str(getattr(c, name)))]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", *options, "-m", "deepreg_fast"]
    return subprocess.Popen(
        [*command, "train", "bilevel", *settings],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **LOOPBACK, **environment},
    )


# Kills a process at the steps of a plan, one in each start; imported by Python at its start.
_KILLER = """
import os
def arm():
    from deepreg_fast.training import trainer
    inner, plan = trainer.Trainer._step, os.environ["TEST_KILLS"]
    kills = [tuple(map(int, t.split(":"))) for t in open(plan).read().split()]
    start = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    def step(self):
        if start < len(kills) and self.step_done >= kills[start][0] and self.world.rank == kills[start][1]:
            open(f"{plan}.{start}", "w").close()
            os.kill(os.getpid(), 9)
        return inner(self)
    trainer.Trainer._step = step
if "RANK" in os.environ:
    arm()
"""


@pytest.mark.parametrize("kills", [1, pytest.param(10, marks=pytest.mark.long)])
def test_torchrun_restarts_to_the_same_bits(folder: Path, tmp_path: Path, kills: int) -> None:
    """kill -9 of a process at random steps; one sentence each time, and the weights of one process alone."""
    rng = random.Random(kills)
    steps = sorted(rng.sample(range(1, 8), min(kills, 7))) + [7] * max(0, kills - 7)
    (tmp_path / "plan").write_text(" ".join(f"{s}:{rng.randrange(2)}" for s in steps))
    (tmp_path / "site").mkdir()
    (tmp_path / "site/sitecustomize.py").write_text(_KILLER)
    path = os.pathsep.join((str(tmp_path / "site"), str(Path(dr.__file__).parents[1])))
    process = _torchrun(
        folder, tmp_path / "run", "--nproc-per-node=2", f"--max-restarts={kills}",
        PYTHONPATH=path, TEST_KILLS=str(tmp_path / "plan"),
    )  # fmt: skip
    try:
        printed, _ = process.communicate(timeout=1200)
    finally:
        process.terminate()
    assert process.returncode == 0, printed
    assert len(list(tmp_path.glob("plan.*"))) == kills
    assert printed.count("deepreg-fast: All 2 processes of a training must go on, but one has ended") == kills, printed
    assert printed.count("Trained 8 steps") == 1
    assert _run(1, tmp_path, _train(_config(folder, tmp_path / "whole"))) == [{"value": 8}]
    a, b = (load_checkpoint(tmp_path / n / "last.safetensors")[0] for n in ("run", "whole"))
    assert all(np.array_equal(a[k], b[k]) for k in a)
