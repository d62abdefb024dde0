"""Recovery of many images: sources of measurements, units that processes claim, results that appear by rename."""

from __future__ import annotations

from .loop import Job, run
from .results import summary
from .sources import Measurement, Source, open_source
from .units import Units, shard_of_environment

__all__ = ["Job", "Measurement", "Source", "Units", "open_source", "run", "shard_of_environment", "summary"]
