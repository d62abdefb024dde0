"""The command `deepreg-fast` in a fork of this process, and its reproductions' children in forks of that one: all are
spared the import of torch.

`start` forks it; where torch has started CUDA, which survives no fork, `python forked.py reproduce ...` is the same in
a process of its own.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from deepreg_fast.cli import main
from deepreg_fast.experiments import scheduler


def _load() -> None:
    """What children would import, each for itself."""
    import skimage.data
    import skimage.metrics  # noqa: F401
    import torch.utils.tensorboard  # noqa: F401

    from deepreg_fast.experiments import score, worker  # noqa: F401


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
            os._exit(self._main(argv, env))
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

    def _main(self, argv: Sequence[str], env: Mapping[str, str]) -> int:
        """What the process of this command line does, to its exit code."""
        from deepreg_fast.experiments import worker

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


class Command(Forked):
    """The command itself, in a folder and a process group of its own; `site` is what `sitecustomize` would run."""

    def __init__(self, argv: Sequence[str], *, env: Mapping[str, str], cwd: Path, site: str = "") -> None:
        self._cwd, self._site = cwd, site
        super().__init__(argv, env=env)
        # Here and in the child: whoever comes first, the group exists when this returns.
        os.setpgid(self.pid, self.pid)

    def _main(self, argv: Sequence[str], env: Mapping[str, str]) -> int:
        try:
            os.setpgid(0, 0)
            os.chdir(self._cwd)
            os.environ.clear()
            os.environ.update(env)
            torch.set_num_threads(1)
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.default_int_handler)
            # Those of pytest lead elsewhere.
            sys.stdout, sys.stderr = (os.fdopen(k, "w", buffering=1, closefd=False) for k in (1, 2))
            exec(self._site, {})
            _run(argv)
        except SystemExit as end:
            return end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:
            sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
            return 1
        finally:
            sys.stderr.flush()
        return 0

    def communicate(self) -> tuple[str, str]:
        """Nothing, and what came on stderr until its end."""
        text = self.stderr.read().decode()
        self.wait()
        for stream in (self.stdin, self.stderr):
            stream.close()
        return "", text


class _Processes:
    """What stands for the module `subprocess` in the runner."""

    Popen, PIPE, DEVNULL = Forked, subprocess.PIPE, subprocess.DEVNULL
    TimeoutExpired = subprocess.TimeoutExpired


def _run(argv: Sequence[str]) -> None:
    if "TEST_NO_REPORT" in os.environ:
        # Its figures take longer than all the rest of a small run.
        from deepreg_fast.experiments.report import write

        write.write_report = lambda folder: folder / "report.html"
    scheduler.subprocess = _Processes  # type: ignore[assignment]
    sys.argv = ["deepreg-fast", *argv]
    main()


def start(argv: Sequence[str], *, env: Mapping[str, str], cwd: Path, site: str = "") -> Any:
    """`deepreg-fast ARGV`, begun: as much of a `subprocess.Popen` as tests need."""
    if torch.cuda.is_available():
        return subprocess.Popen(
            [sys.executable, __file__, *argv],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            cwd=cwd,
            env=env,
            start_new_session=True,
        )
    _load()
    return Command(argv, env=env, cwd=cwd, site=site)


if __name__ == "__main__":
    _load()
    _run(sys.argv[1:])
