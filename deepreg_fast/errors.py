"""The exceptions that deepreg-fast raises deliberately.

A message states what was expected, what was received, and how to fix it. The command line prints only the message and
exits with code 2.
"""

from __future__ import annotations

from typing import Any


class DeepRegError(Exception):
    """Base class of all errors that this package raises deliberately."""


class InputError(DeepRegError, ValueError):
    """An argument, a tensor or an option is invalid."""


class DataError(InputError):
    """An image, a folder or a measurement file cannot be used."""


class CheckpointError(InputError):
    """A weight or checkpoint file is truncated, of another format, or does not match."""


class OperatorMismatch(InputError):
    """Measurements or a state belong to another operator."""


class BackendUnavailable(DeepRegError, RuntimeError):
    """A named backend cannot run here; the message gives the reason and the remedy."""


class OutOfMemory(DeepRegError, RuntimeError):
    """A device has less free memory than a call needs; the message gives both numbers.

    `partial` is the partial result of a solve, or None: a `Solution` with the last accepted iterates, in which images
    that were still active have status `MAX_ITERATIONS`.
    """

    def __init__(self, message: str, partial: Any = None) -> None:
        super().__init__(message)
        self.partial = partial


class TrainingDiverged(DeepRegError, RuntimeError):
    """A loss or gradient of a training is not finite, or no image could be recovered for many steps."""


class ProcessLost(DeepRegError, RuntimeError):
    """Another process of a training with several of them ended or failed."""
