"""The processes of one training: what they exchange, and how they end together.

Any launcher of `torch.distributed` starts them (torchrun, SLURM, Ray, Kubernetes). A process alone exchanges nothing.
Sums are computed from gathered values in a fixed order, never by the communication library: its order depends on the
number of processes.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from ..errors import InputError, ProcessLost

# The store of the processes that this one has joined, and the seconds that it waits for them at the end.
_STORES: list[Store] = []
_PATIENCE = 60.0


class World:
    """Number of processes, and the rank of this one.

    Parameters
    ----------
    shared : bool
        Whether the training is shared with the processes of an initialized `torch.distributed`.
    """

    def __init__(self, shared: bool = False) -> None:
        self.rank, self.size = 0, 1
        self.device = torch.device("cpu")
        if shared and dist.is_available() and dist.is_initialized():
            self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def exchange_on(self, device: torch.device) -> None:
        """Exchange on the training's device if NCCL can, otherwise on the host."""
        if self.size > 1 and device.type == "cuda" and "nccl" in str(dist.get_backend()):
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
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    try:
        store, rank, size = next(iter(rendezvous("env://")))
        _STORES.append(_store_of_these(store, rank, size))
        dist.init_process_group(backend, store=_STORES[-1], rank=rank, world_size=size)
    except (RuntimeError, ValueError) as error:
        raise InputError(
            f"The processes of a training must reach each other, but torch.distributed says: {_first_line(error)}; "
            "start them with torchrun, or set RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT."
        ) from error
    yield World(shared=True)


def has_joined() -> bool:
    """Whether this process has joined others by `joined`."""
    return bool(_STORES)


def leave(code: int) -> NoReturn:
    """End this process, which has joined others, after all of them have finished their exchanges.

    A process that frees gloo's connections while another one closes them is aborted at times, after a training that
    succeeded or before its error is printed. So nothing is freed.
    """
    if code == 0:
        store, size, until = _STORES[-1], dist.get_world_size(), time.monotonic() + _PATIENCE
        store.set(f"done {dist.get_rank()}", "")
        while not store.check([f"done {r}" for r in range(size)]) and time.monotonic() < until:
            time.sleep(0.02)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(code)


def _store_of_these(store: Store, rank: int, size: int, seconds: float = 600.0) -> Store:
    """A part of the store for exactly the processes that run now.

    torchrun starts processes again with the same store, in which the addresses of the earlier ones remain; who reads
    one of those waits forever. So each process writes a name that nobody had before, the first one publishes all names
    until all others have confirmed them, and the names are the prefix of the part.
    """
    name, until = secrets.token_hex(8), time.monotonic() + seconds
    store.set(f"process {rank}", name)
    others, confirmed = range(1, size), ""
    while time.monotonic() < until:
        if rank == 0 and all(store.check([f"process {r}"]) for r in others):
            names = "-".join([name, *(_text(store, f"process {r}") for r in others)])
            if names != confirmed:
                confirmed = names
                store.set("processes", names)
            if all(_text(store, f"confirmed {r}") == names for r in others):
                store.set("begin", names)
                return PrefixStore(names, store)
        elif rank > 0 and (names := _text(store, "processes")).split("-")[rank : rank + 1] == [name]:
            if names != confirmed:
                confirmed = names
                store.set(f"confirmed {rank}", names)
            if _text(store, "begin") == names:
                return PrefixStore(names, store)
        time.sleep(0.02)
    raise RuntimeError(f"not all {size} processes came within {seconds:.0f} seconds")


def _text(store: Store, key: str) -> str:
    return store.get(key).decode() if store.check([key]) else ""


def was_restarted() -> bool:
    """Whether torchrun started this process again after a failure."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def local_device(name: str, world: World) -> str:
    """The device of this process: with several processes on a machine, "cuda" is the one of `LOCAL_RANK`."""
    if world.size == 1 or name not in ("cuda", "auto") or not torch.cuda.is_available():
        return name
    return f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % torch.cuda.device_count()}"
