"""Pytest plugin that runs the tests marked gpu with the stand-in, so that the kernels that they launch are compiled."""

from __future__ import annotations

import os

# tests/conftest.py selects the interpreter if there is no device.
os.environ["TRITON_INTERPRET"] = "0"

from gpu_stages import stand_in

DRIVER = stand_in.install()
