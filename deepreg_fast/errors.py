"""Every error that deepreg-fast raises on purpose.

A message is one sentence (or a few) that says what was expected, what came, and what to do.
The command line prints that message alone and exits with code 2.
"""

from __future__ import annotations

from typing import Any


class DeepRegError(Exception):
    """Base class of all errors raised on purpose by this package."""


class InputError(DeepRegError, ValueError):
    """An argument, a tensor or an option is not what the function takes."""


class DataError(InputError):
    """An image, a folder or a measurement file cannot be used."""


class CheckpointError(InputError):
    """A weight or checkpoint file is truncated, foreign, or does not fit."""


class OperatorMismatch(InputError):
    """Measurements or a state belong to another operator."""


class BackendUnavailable(DeepRegError, RuntimeError):
    """A backend that was named cannot run here, with the reason and the way out."""


class OutOfMemory(DeepRegError, RuntimeError):
    """A device has less free memory than a call needs, with both numbers.

    `partial` holds what a solve had computed until then, or None: a `Solution` with the last accepted iterates, where
    the status of an image still at work is `MAX_ITERATIONS`.
    """

    def __init__(self, message: str, partial: Any = None) -> None:
        super().__init__(message)
        self.partial = partial


class TrainingDiverged(DeepRegError, RuntimeError):
    """Training met a value that is not finite; the last good checkpoint is named."""
