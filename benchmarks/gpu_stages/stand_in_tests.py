"""A plugin of pytest: the tests marked gpu run with the stand-in, so that what they launch is compiled."""

from __future__ import annotations

from gpu_stages import stand_in

DRIVER = stand_in.install()
