"""Peer LearnedRegularizers (github.com/johertrich/LearnedRegularizers), from the user's checkout.

None of its code is part of this package: `bilevel_training` is imported from the checkout and called unchanged.
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
"""Iteration limit of their recovery and their MINRES, as in their defaults."""


def check(path: Path) -> Path:
    """Check that a folder is a checkout; return its absolute path.

    Raises
    ------
    InputError
        If it lacks required files.
    """
    missing = [name for name in NEEDED if not (path / name).is_file()]
    if missing:
        raise InputError(
            f"--learned-regularizers must be a checkout with {' and '.join(NEEDED)}, "
            f"but {str(path)!r} has no {missing[0]}; "
            "clone https://github.com/johertrich/LearnedRegularizers and give its folder."
        )
    return path.resolve()


def commit(path: Path) -> str:
    """The checkout's commit, or "unknown" if git fails."""
    try:
        done = subprocess.run(
            ["git", "-C", str(path), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def unsupported_reason(path: Path | None) -> str | None:
    """None, or why the peer is missing and how to get it."""
    if path is None:
        return HOW
    reason = peers_deepinv.unsupported_reason()
    if reason is not None:
        return f"it needs deepinv: {reason}"
    try:
        _load(path)
    except Exception as error:  # a failing import of their scripts is reported, not raised
        return f"cannot be imported ({type(error).__name__}: {str(error)[:80]})"
    return None


def _load(path: Path) -> Callable[..., Any]:
    """Import their `bilevel_training`, then remove their modules from `sys.modules`, because their names are common."""
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
    """A loader of length one that yields nothing, because their loop always validates and divides by the length."""

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[Images]:
        return iter(())


class Learned:
    """One training step by their `training_methods.bilevel_training.bilevel_training`, with a loader of one batch.

    It calls in this order: `physics(x)` and `A_dagger` (our operator and initial point);
    `evaluation.reconstruct_nmAPG`; deepinv's `minres` with products that rebuild the graph of the gradient each time;
    the mixed derivative, with one graph per parameter; Adam. The prior is our network's energy in the best eager
    formulation with `g` and `grad(x, get_energy)`, so that their solver gets both from one evaluation.

    Arguments: `mode="IFT"`, `epochs=1`, no validation images, `lr=0` (Adam runs, but the weights do not change), first
    step size 1, about the inverse of the largest curvature (their default is 0.1), and the two tolerances. `reg` keeps
    its default False, so their step has no penalty, while ours also ascends the perturbations and differentiates the
    penalty.
    """

    def __init__(self, path: Path, reg: RED, A: SRM, mu: float) -> None:
        self.train, self.mu = _load(path), mu
        # A copy, because their loop sets `.grad` and updates parameters.
        self.prior = peers_deepinv.EnergyPrior(copy.deepcopy(reg))
        self.physics = peers_deepinv.physics(A, reg.center)
        self.fidelity = importlib.import_module("deepinv.optim").L2()

    def step(self, x: Images, tolerance: float, minres_tolerance: float) -> list[torch.Tensor]:
        """Gradient of `sum_b ||xhat_b - x_b||^2` in theta; theirs, of the mean over the batch, is rescaled."""
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
