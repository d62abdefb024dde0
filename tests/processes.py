"""Processes of one training on this machine: forks of the test's process, which exchange by gloo."""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo"}
"""Without it, gloo looks up the machine's own name, which takes ten seconds where no name server answers."""


class Processes:
    """`function(rank)` in `size` forks, begun. Each returns a JSON value, or the name and text of its exception."""

    def __init__(self, size: int, folder: Path, function: Callable[[int], Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.pids = folder, []
        for rank in range(size):
            pid = os.fork()
            if pid == 0:
                self._child(rank, size, function)
            self.pids.append(pid)

    def _child(self, rank: int, size: int, function: Callable[[int], Any]) -> None:
        code = 1
        try:
            torch.set_num_threads(1)
            os.environ.update(LOOPBACK)
            # Ends a child that waits forever, so that the test fails.
            signal.alarm(1200)
            if size > 1:
                store = f"file://{self.folder}/rendezvous"
                dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size)
            try:
                answer = {"value": function(rank)}
            except Exception as error:
                answer = {"error": type(error).__name__, "message": str(error)}
            (self.folder / f"answer{rank}.json").write_text(json.dumps(answer))
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def kill(self, rank: int) -> None:
        os.kill(self.pids[rank], signal.SIGKILL)

    def answers(self) -> list[dict[str, Any]]:
        """What the processes returned; of a killed one, its signal."""
        out = []
        for rank, pid in enumerate(self.pids):
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            path = self.folder / f"answer{rank}.json"
            out.append(json.loads(path.read_text()) if code == 0 else {"error": "exit", "message": str(code)})
        return out
