"""The peer LearnedRegularizers (github.com/johertrich/LearnedRegularizers), from a checkout of the user's.

Nothing of it is part of this package: `bilevel_training` is imported from the checkout and called as it is.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import io
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from ..errors import InputError
from ..operators import SRM
from ..regularizers import RED
from . import peers_deepinv
from .peers import Images

NAME = "LearnedRegularizers"
HOW = "git clone https://github.com/johertrich/LearnedRegularizers, then --learned-regularizers PATH"
NEEDED = ("training_methods/bilevel_training.py", "evaluation/nmAPG.py")
STEPS = 1000
"""Limit on their recovery's and their MINRES's iterations: their defaults."""


def check(path: Path) -> Path:
    """The folder, if it is a checkout.

    Raises
    ------
    InputError
        If it lacks the files that are called.
    """
    lacks = [name for name in NEEDED if not (path / name).is_file()]
    if lacks:
        raise InputError(
            f"--learned-regularizers must be a checkout with {' and '.join(NEEDED)}, "
            f"but {str(path)!r} has no {lacks[0]}; "
            "clone https://github.com/johertrich/LearnedRegularizers and give its folder."
        )
    return path.resolve()


def commit(path: Path) -> str:
    """The checkout's commit, or "unknown" where git does not tell."""
    try:
        done = subprocess.run(
            ["git", "-C", str(path), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def why_not(path: Path | None) -> str | None:
    """None, or why the peer is missing and how to get it."""
    if path is None:
        return HOW
    reason = peers_deepinv.why_not()
    if reason is not None:
        return f"it needs deepinv: {reason}"
    try:
        _load(path)
    except Exception as error:  # scripts of others: whatever they lack is reported, not raised
        return f"cannot be imported ({type(error).__name__}: {str(error)[:80]})"
    return None


def _load(path: Path) -> Callable[..., Any]:
    """Their `bilevel_training`. Their modules have common names, so that none is left importable."""
    names = ("training_methods", "evaluation", "dataset", "operators", "priors", "hyperparameters")

    def ours_to_hide() -> dict[str, Any]:
        return {n: m for n, m in sys.modules.items() if n.split(".")[0] in names}

    hidden = ours_to_hide()
    for n in hidden:
        del sys.modules[n]
    sys.path.insert(0, str(path))
    try:
        return importlib.import_module("training_methods.bilevel_training").bilevel_training
    finally:
        sys.path.remove(str(path))
        for n in ours_to_hide():
            del sys.modules[n]
        sys.modules.update(hidden)


class _NoValidation:
    """A loader of length one that yields nothing: their loop always validates, and divides by the length."""

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[Images]:
        return iter(())


class Learned:
    """One visit by their `training_methods.bilevel_training.bilevel_training`, called whole with a loader of one batch.

    It calls, in this order: `physics(x)` and `A_dagger` (our operator and our start); `evaluation.reconstruct_nmAPG`;
    deepinv's `minres` on products that build the graph of the gradient anew each time; the mixed derivative, again one
    graph for each parameter; Adam. The prior is our network's energy in the best eager formulation with `g` and
    `grad(x, get_energy)`, so that their solver gets both from one pass.

    Set: `mode="IFT"`, `epochs=1`, no validation images, `lr=0` (Adam does its work and the weights stay), first step
    size 1, which is about the inverse of the largest curvature (theirs is 0.1), and the two tolerances. `reg` keeps its
    default False: their visit has no penalty, where ours ascends the perturbations and differentiates the penalty too.
    """

    def __init__(self, path: Path, reg: RED, A: SRM, mu: float) -> None:
        self.train, self.mu = _load(path), mu
        # Their loop sets `.grad` and Adam's state: on a copy.
        self.prior = peers_deepinv.EnergyPrior(copy.deepcopy(reg))
        self.physics = peers_deepinv.physics(A, reg.center)
        self.fidelity = importlib.import_module("deepinv.optim").L2()

    def step(self, x: Images, tolerance: float, minres_tolerance: float) -> list[torch.Tensor]:
        """Gradient of `sum_b ||xhat_b - x_b||^2` in theta (theirs is of the mean over the batch)."""
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            self.train(
                self.prior,
                self.physics,
                self.fidelity,
                self.mu,
                [x],
                _NoValidation(),
                epochs=1,
                mode="IFT",
                lower_level_step_size=1.0,
                lower_level_max_iter=STEPS,
                lower_level_tol_train=tolerance,
                minres_max_iter=STEPS,
                minres_tol=minres_tolerance,
                lr=0.0,
                device="cpu",
                validation_epochs=1,
            )
        grads = [p.grad for p in self.prior.parameters()]
        return [len(x) * g for g in grads if g is not None]
