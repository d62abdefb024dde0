"""The processes of one training: what they exchange, and how they end together.

Any launcher of `torch.distributed` starts them (torchrun, SLURM, Ray, Kubernetes). A process alone exchanges nothing.
Sums are computed from gathered values in a fixed order, never by the communication library: its order depends on the
number of processes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from ..errors import InputError, ProcessLost


class World:
    """Number of processes, and the rank of this one.

    Parameters
    ----------
    shared : bool
        Whether the training is shared with the processes of an initialized `torch.distributed`.
    device : torch.device
        Device of the training; NCCL exchanges there, gloo on the host.
    """

    def __init__(self, shared: bool = False, device: torch.device | None = None) -> None:
        self.rank, self.size = 0, 1
        self.device = torch.device("cpu")
        if shared and dist.is_available() and dist.is_initialized():
            self.rank, self.size = dist.get_rank(), dist.get_world_size()
            if device is not None and device.type == "cuda" and "nccl" in str(dist.get_backend()):
                self.device = device

    @property
    def is_first(self) -> bool:
        """Whether this process writes what all of them share: checkpoints, logs, weights."""
        return self.rank == 0

    def check_lanes(self, lanes: int) -> None:
        """Check that each process has a lane.

        Raises
        ------
        InputError
            If there are more processes than lanes.
        """
        if self.size > lanes:
            raise InputError(
                f"Each process must have a lane of its own, but {self.size} processes came for {lanes} "
                f"{'lane' if lanes == 1 else 'lanes'}; set lanes to a multiple of the number of processes, or start "
                "fewer processes."
            )

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        """The values of all processes, `[size, ...]` in the order of their ranks, on this world's device.

        Raises
        ------
        ProcessLost
            If another process ended.
        """
        values = values.to(self.device)
        if self.size == 1:
            return values[None]
        parts = [torch.empty_like(values) for _ in range(self.size)]
        with self._alive():
            dist.all_gather(parts, values.contiguous())
        return torch.stack(parts)

    def interleave(self, values: torch.Tensor, count: int) -> torch.Tensor:
        """`[count, ...]` of which process r has the rows `r, r + size, ...`, all of them in order.

        Raises
        ------
        ProcessLost
            If another process ended.
        """
        padded = values.new_zeros(-(-count // self.size), *values.shape[1:])
        padded[: len(values)] = values
        return self.gather(padded).transpose(0, 1).flatten(0, 1)[:count]

    def share(self, value: Any) -> Any:
        """The value of the first process.

        Raises
        ------
        ProcessLost
            If another process ended.
        """
        if self.size == 1:
            return value
        values = [value]
        with self._alive():
            dist.broadcast_object_list(values, src=0)
        return values[0]

    def check(self, error: Exception | None) -> None:
        """Raise the error of this process, or `ProcessLost` with the message of the first process that has one."""
        if self.size > 1:
            messages: list[str | None] = [None] * self.size
            with self._alive():
                dist.all_gather_object(messages, None if error is None else str(error) or type(error).__name__)
            failed = [f"process {i} of {self.size}: {m}" for i, m in enumerate(messages) if m is not None]
            if failed and error is None:
                raise ProcessLost(f"All processes of a training must go on, but one failed; {failed[0]}")
        if error is not None:
            raise error

    @contextmanager
    def together(self) -> Iterator[None]:
        """Wait for all processes at the end of the block; an error in one of them is raised in each."""
        error = None
        try:
            yield
        except Exception as raised:
            error = raised
        self.check(error)

    @contextmanager
    def _alive(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise ProcessLost(
                f"All {self.size} processes of a training must go on, but one has ended ({_first_line(error)}); resume "
                "from the last checkpoint, or start with torchrun --max-restarts, which resumes by itself."
            ) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__


@contextmanager
def joined() -> Iterator[World]:
    """Join the processes that a launcher started (the variables RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT), if any.

    Raises
    ------
    InputError
        If the processes cannot find each other.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or "RANK" not in os.environ or dist.is_initialized():
        yield World(shared=True)
        return
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    except (RuntimeError, ValueError) as error:
        raise InputError(
            f"The processes of a training must reach each other, but torch.distributed says: {_first_line(error)}; "
            "start them with torchrun, or set RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT."
        ) from error
    try:
        yield World(shared=True)
    finally:
        dist.destroy_process_group()


def was_restarted() -> bool:
    """Whether torchrun started this process again after a failure."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def local_device(name: str, world: World) -> str:
    """The device of this process: with several processes on a machine, "cuda" is the one of `LOCAL_RANK`."""
    if world.size == 1 or name not in ("cuda", "auto") or not torch.cuda.is_available():
        return name
    return f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % torch.cuda.device_count()}"
