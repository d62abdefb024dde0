"""Worker process of a reproduction: runs one task, a chain of trainings or a row's evaluation.

`Job.argv()` is the command line; its last argument is the job as JSON. The exit code is 0, or 2 with an error message
on stderr, or `FATAL` with a message if no other task can continue either, or `STOPPED` after a checkpoint on SIGINT,
SIGTERM, or the end of the parent.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from ..errors import DataError, DeepRegError
from ..files import write_atomically
from .folder import Folder, locked
from .job import FATAL, STOPPED, Job
from .settings import TRAINED, Row, Settings, Stage

# A stopped or killed run loses its progress since the last checkpoint.
CHECKPOINT_SECONDS = 30.0
# A worker may outlive its parent by one step; the next worker waits for it.
_WAIT = 120.0


class _Stop:
    """Stops the worker cleanly on a signal or at the end of the parent."""

    def __init__(self) -> None:
        self.trainer: Any = None
        for name in (signal.SIGINT, signal.SIGTERM):
            signal.signal(name, self._on_signal)
        threading.Thread(target=self._watch, daemon=True).start()

    def _on_signal(self, *_: object) -> None:
        if self.trainer is None:
            for name in (signal.SIGINT, signal.SIGTERM):
                signal.signal(name, signal.SIG_IGN)
            raise KeyboardInterrupt
        self.trainer.stopping = True

    def _watch(self) -> None:
        """Wait for the end of stdin, whose other end the parent holds. (sys.stdin would be locked at exit.)"""
        while os.read(0, 1):
            pass
        os.kill(os.getpid(), signal.SIGTERM)


def train(folder: Folder, settings: Settings, row: Row, job: Job, stop: _Stop) -> None:
    """Train the chain's unfinished stages, each from the weights of the previous one."""
    start = folder.start(settings[row.init]) if row.init else None
    for stage in row.chains[job.chain].stages:
        stage_folder = folder.stage(row, stage)
        if not folder.finished(row, stage):
            _stage(stage_folder, stage, row, job, start, stop)
        # The weights mark the stage as finished. Delete the checkpoint and warm starts, which may take gigabytes.
        for name in ("last.safetensors", *(f.name for f in stage_folder.glob("store_*.bin"))):
            (stage_folder / name).unlink(missing_ok=True)
        start = stage_folder / "weights.safetensors"


def _stage(where: Path, stage: Stage, row: Row, job: Job, start: Path | None, stop: _Stop) -> None:
    trainer_class, config_class = TRAINED[row.method]
    config = config_class(
        **stage.config,
        out=str(where),
        data=row.problem.data,
        device=job.device,
        threads=job.threads,
        checkpoint_seconds=CHECKPOINT_SECONDS,
    )
    trainer = trainer_class(config, progress=False)
    if trainer.checkpoint_path.exists():
        trainer.load_state()
    elif start is not None:
        trainer.start_from(start)
    stop.trainer = trainer
    trainer.fit()
    stop.trainer = None
    if trainer.stopping:
        # The signal arrived during the last step.
        raise KeyboardInterrupt


def score(folder: Folder, settings: Settings, row: Row, job: Job) -> None:
    """Evaluate the row and write its results."""
    import torch

    from .._version import __version__
    from ..training.placement import Placement
    from .machine import describe
    from .score import Scorer

    if job.threads:
        torch.set_num_threads(job.threads)
    placement = Placement(job.device)
    with placement.current():
        scorer = Scorer(folder, settings, row, placement.device)
        results = scorer.result()
    head = {
        **{k: getattr(row, k) for k in ("name", "label", "group", "method", "poster", "init", "weights", "recovery")},
        "ratio": scorer.ratio,
        "problem": dataclasses.asdict(row.problem),
        **{k: getattr(row, k) or None for k in ("compare", "setting", "unstated")},
        "value": row.value if row.compare else None,
    }
    tail = {"machine": describe(placement.device), "version": __version__, "command": job.command}
    write_atomically(folder.result(row), json.dumps({**head, **results, "vs_tv": None, **tail}).encode())
    shutil.rmtree(scorer.parts, ignore_errors=True)


def _full(error: BaseException | None) -> bool:
    """Whether an error was caused by a full disk."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        error = error.__cause__ or error.__context__
    return False


def _vanished(folder: Folder) -> bool:
    """Whether the folder of images, which every row needs, has disappeared."""
    data = Settings.from_json(folder.settings.read_text(encoding="utf-8")).rows[0].problem.data
    return data != "embedded" and not Path(data).is_dir()


def main() -> int:
    """Run the job given on the command line."""
    job = Job(**json.loads(sys.argv[-1]))
    folder = Folder(Path(job.folder))
    try:
        stop = _Stop()
        settings = Settings.from_json(folder.settings.read_text(encoding="utf-8"))
        row = settings[job.row]
        lock = folder.row(row) / (f"chain-{job.chain}.lock" if job.chain >= 0 else "score.lock")
        with locked(lock, f"The row {row.name!r} of {folder.path}", _WAIT):
            if job.chain >= 0:
                train(folder, settings, row, job, stop)
            else:
                score(folder, settings, row, job)
    except KeyboardInterrupt:
        return STOPPED
    except (DeepRegError, OSError) as error:
        if _full(error):
            print(
                f"The disk of {folder.path} must have room, but is full; free space and run the same command again "
                "(everything up to the last checkpoints is kept).",
                file=sys.stderr,
            )
            return FATAL
        if not isinstance(error, DeepRegError):
            raise
        print(error, file=sys.stderr)
        return FATAL if isinstance(error, DataError) and _vanished(folder) else 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
