"""The forms of energies that kernels may compute: `ConvChainForm`, `RidgeForm`, `TvForm`, or a new one.

An energy with the method `kernel_form() -> form | None` has one. A backend has a table from types of forms to kernels.
"""

from __future__ import annotations

from typing import Any


def form_of(energy: Any) -> Any:
    """The form of an energy; None if kernels must not compute it, for example because it was altered."""
    return getattr(energy, "kernel_form", lambda: None)()


def unchecked_form_of(energy: Any) -> Any:
    """The form of an energy whose `form_of` was just accepted, without checks for alterations if it can skip them."""
    return getattr(energy, "unchecked_form", energy.kernel_form)()
