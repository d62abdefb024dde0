"""Safeguards of bi-level training, each with a counter (docs/design.md)."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

import torch


class Counters:
    """Total number of interventions of each guard."""

    NAMES = (
        "clipped",
        "negative_curvature",
        "adjoint_unconverged",
        "inner_unconverged",
        "runaway_resets",
        "nonfinite_resets",
        "delta_kept",
        "mu_clamped",
    )

    def __init__(self) -> None:
        self.values: dict[str, int] = dict.fromkeys(self.NAMES, 0)

    def add(self, name: str, count: int | torch.Tensor) -> None:
        """Add `count` to a counter."""
        self.values[name] += int(count)


class MedianClip:
    """Clips a gradient's norm to `factor` times its running median over the last `window` steps.

    One transfer reads the norms of all parameters on the host.
    """

    def __init__(self, factor: float, window: int = 100) -> None:
        self.factor = factor
        self.norms: deque[float] = deque(maxlen=window)

    def __call__(self, params: Sequence[torch.Tensor]) -> tuple[float, bool]:
        """Clip `p.grad` in place. Returns the norm before clipping and whether it was clipped."""
        grads = [p.grad for p in params if p.grad is not None]
        squares = torch.stack([g.double().square().sum() for g in grads]).cpu().tolist() if grads else []
        norm = math.sqrt(sum(squares))
        ordered = sorted(self.norms)
        limit = self.factor * ordered[len(ordered) // 2] if len(ordered) >= 10 else float("inf")
        clipped = self.factor > 0 and norm > limit
        if clipped:
            for g in grads:
                g.mul_(limit / norm)
        self.norms.append(min(norm, 2.0 * limit) if clipped else norm)
        return norm, clipped


class ToleranceSchedule:
    """Tolerance of the inner solve: loose at first, halved when the loss falls by less than 1 % over a window."""

    def __init__(self, start: float, end: float, window: int) -> None:
        self.tolerance, self.end, self.window = start, end, window
        self.previous = float("inf")
        self.total, self.count = 0.0, 0

    def observe(self, loss: float) -> None:
        """Update with one step's loss."""
        self.total += loss
        self.count += 1
        if self.count == self.window:
            mean = self.total / self.count
            if mean > 0.99 * self.previous:
                self.tolerance = max(self.end, 0.5 * self.tolerance)
            self.previous = min(self.previous, mean)
            self.total, self.count = 0.0, 0
