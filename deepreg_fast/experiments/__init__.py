"""The paper's experiment from one file of settings: training, evaluation, tables, in one folder that can be resumed."""

from __future__ import annotations

from .parse import load_settings, parse
from .reproduce import Reproduction, reproduce
from .settings import Row, Settings

__all__ = ["Reproduction", "Row", "Settings", "load_settings", "parse", "reproduce"]
