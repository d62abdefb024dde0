"""Result of an iterative solve per image, as a value instead of an exception."""

from __future__ import annotations

import enum
from collections.abc import Iterable

import torch


class Status(enum.IntEnum):
    """Result of an iterative solve for one image.

    Solvers return an int64 tensor `[B]` of these values. `advice` suggests what to do next;
    `deepreg_fast.status.statuses(tensor)` gives the members, and `counts(tensor)` a dictionary
    `name -> number of images`.

    Attributes
    ----------
    CONVERGED, MAX_ITERATIONS, STAGNATED, NEGATIVE_CURVATURE, NON_FINITE, RUNAWAY
    advice : str

    Examples
    --------
    >>> import deepreg_fast as dr
    >>> dr.Status(0).name
    'CONVERGED'
    """

    CONVERGED = 0
    MAX_ITERATIONS = 1
    STAGNATED = 2
    NEGATIVE_CURVATURE = 3
    NON_FINITE = 4
    RUNAWAY = 5

    @property
    def advice(self) -> str:
        """One sentence: what happened and what to change."""
        return _ADVICE[self]


_ADVICE = {
    Status.CONVERGED: "The residual, evaluated at the returned point, is at or below the tolerance.",
    Status.MAX_ITERATIONS: "The iteration limit was reached: raise max_iterations, loosen tolerance, "
    "or start from a better point.",
    Status.STAGNATED: "The residual stopped falling above the tolerance, as a rule at the rounding of "
    "this precision or on a singular system: loosen tolerance or solve in float64.",
    Status.NEGATIVE_CURVATURE: "The matrix is not positive definite along a search direction: the "
    "iterate before it is returned; use MINRES, or a smaller beta or a larger alpha.",
    Status.NON_FINITE: "The input or the computation contained NaN or infinity: check this image's input; its last "
    "finite iterate is returned.",
    Status.RUNAWAY: "The iterate left every plausible image: the regularizer is unbounded below "
    "there; use a larger alpha or a smaller beta or mu.",
}


def statuses(status: torch.Tensor | Iterable[int]) -> tuple[Status, ...]:
    """The `Status` members of a status tensor `[B]`."""
    values = status.tolist() if isinstance(status, torch.Tensor) else status
    return tuple(Status(int(v)) for v in values)


def counts(status: torch.Tensor | Iterable[int]) -> dict[str, int]:
    """Number of images with each status, such as `{"converged": 7, "max_iterations": 1}`."""
    out: dict[str, int] = {}
    for s in statuses(status):
        out[s.name.lower()] = out.get(s.name.lower(), 0) + 1
    return out
