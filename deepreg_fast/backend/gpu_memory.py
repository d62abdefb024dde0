"""What a device is asked for, said before it is asked, so that a lack of memory is a sentence with both numbers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..errors import OutOfMemory


@contextmanager
def needing(count: int, device: torch.device, what: str) -> Iterator[None]:
    """Allocate inside; if the memory is not there, raise `OutOfMemory` with `count`, the bytes that `what` needs, and
    those that are free (torch's own unused blocks among them)."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise OutOfMemory(
            f"{what} needs {count / 2**20:.0f} MiB on {device}, but {_free(device) / 2**20:.0f} MiB are free; "
            "use a smaller batch."
        ) from error


def _free(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused
