"""The command `deepreg-fast` whose reproductions fork their children instead of starting them, so that all are spared
the import of torch.

python forked.py reproduce --settings ...
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

# What children would import, each for itself.
import skimage.data
import skimage.metrics  # noqa: F401
import torch
import torch.utils.tensorboard

from deepreg_fast.cli import main
from deepreg_fast.experiments import scheduler, score, worker  # noqa: F401


class Forked:
    """As much of `subprocess.Popen` as the runner of a reproduction needs."""

    def __init__(self, argv: Sequence[str], *, env: Mapping[str, str], **_: Any) -> None:
        self.returncode: int | None = None
        below, above = os.pipe(), os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.dup2(below[0], 0)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(above[1], 2)
            for end in (*below, *above):
                os.close(end)
            os._exit(_job(argv, env))
        os.close(below[0])
        os.close(above[1])
        self.stdin, self.stderr = os.fdopen(below[1], "wb"), os.fdopen(above[0], "rb")

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout: float = float("inf")) -> int:
        until = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > until:
                raise subprocess.TimeoutExpired("forked", timeout)
            time.sleep(0.01)
        return code

    def terminate(self) -> None:
        os.kill(self.pid, signal.SIGTERM)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)


def _job(argv: Sequence[str], env: Mapping[str, str]) -> int:
    """What the process of this command line does, to its exit code."""
    os.environ.clear()
    os.environ.update(env)
    torch.set_num_threads(int(env["OMP_NUM_THREADS"]))
    sys.argv = list(argv)
    try:
        return worker.main()
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        return 1
    finally:
        sys.stderr.flush()


class _Processes:
    """What stands for the module `subprocess` in the runner."""

    Popen, PIPE, DEVNULL = Forked, subprocess.PIPE, subprocess.DEVNULL
    TimeoutExpired = subprocess.TimeoutExpired


if __name__ == "__main__":
    scheduler.subprocess = _Processes  # type: ignore[assignment]
    main()
