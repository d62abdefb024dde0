"""The paper's experiment from a settings file: training, evaluation and tables in one resumable folder."""

from __future__ import annotations

from .parse import load_settings, parse
from .reproduce import Reproduction, reproduce
from .settings import Row, Settings

__all__ = ["Reproduction", "Row", "Settings", "load_settings", "parse", "reproduce"]
