"""Extension of griffe: docstrings of settings, which the package completes at import (training/fields.py)."""

from __future__ import annotations

import inspect
from typing import Any

import griffe

from deepreg_fast import training

NAMES = ("BaselineConfig", "BilevelConfig")


class CompletedDocstrings(griffe.Extension):
    """Replace the docstring in the source by the one of the imported class."""

    def on_class_instance(self, *, cls: griffe.Class, **_: Any) -> None:
        """Called for each class after it was read."""
        if cls.name in NAMES and cls.docstring is not None:
            cls.docstring.value = inspect.getdoc(getattr(training, cls.name)) or ""
