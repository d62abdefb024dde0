"""A plugin of pytest: the tests marked gpu run with the stand-in, so that what they launch is compiled."""

from __future__ import annotations

import os

# tests/conftest.py chooses the interpreter where there is no device.
os.environ["TRITON_INTERPRET"] = "0"

from gpu_stages import stand_in

DRIVER = stand_in.install()
