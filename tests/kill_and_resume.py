"""A training that is killed at random moments and resumed until it is done, for test_training.py.

    python kill_and_resume.py FOLDER_OF_IMAGES FOLDER_OF_RUN MEMORY_BUDGET KILLS

Forks one child per attempt, so that torch is imported once. Prints how many children were killed, and the exit code.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
import traceback
from typing import Any

import torch
import torch.utils.tensorboard

import deepreg_fast as dr


def config(data: str, out: str, memory_budget_mb: int) -> dr.BilevelConfig:
    """A training of a few seconds, with a checkpoint after every step."""
    return dr.BilevelConfig(
        data=data,
        out=out,
        crop=16,
        channels=4,
        steps=60,
        batch=4,
        validation=2,
        validation_crop=16,
        validate_every=20,
        inner_iterations=8,
        beta=2.0,
        sigma=0.01,
        warmup=5,
        checkpoint_seconds=0.0,
        memory_budget_mb=memory_budget_mb,
        threads=1,
    )


class Gated(dr.BilevelTrainer):
    """A training that waits for its end before the step `gate`, so that no machine is too fast to be killed."""

    gate = 0

    def _step(self) -> dict[str, Any]:
        while self.gate and self.step_done >= self.gate:
            signal.pause()
        return super()._step()


def train(data: str, out: str, memory_budget_mb: int, gate: int = 0) -> None:
    """Begin the run, or go on with it; with `gate`, up to that step and no further."""
    trainer = Gated(config(data, out, memory_budget_mb), progress=False)
    trainer.gate = gate
    if trainer.checkpoint_path.exists():
        trainer.resume()
    else:
        trainer.fit()


def kill(data: str, out: str, memory_budget_mb: int, kills: int) -> tuple[int, int]:
    """Train in forks of this process; how many of them were killed, and the exit code of the last.

    Each kill comes at a random moment, and each child that will be killed has a share of the steps and no more: a fast
    machine meets the later kills at the end of a share, a slow one in the middle of it.
    """
    rng = random.Random(0)
    steps = config(data, out, memory_budget_mb).steps
    killed = 0
    while True:
        child = os.fork()
        if child == 0:
            try:
                torch.set_num_threads(1)
                gate = max(1, steps * (killed + 1) // (kills + 1)) if killed < kills else 0
                train(data, out, memory_budget_mb, gate)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(1)
        if killed < kills:
            time.sleep(rng.uniform(0.02, 0.35))
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            killed += 1
        else:
            return killed, os.waitstatus_to_exitcode(status)


if __name__ == "__main__":
    print(*kill(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])))
