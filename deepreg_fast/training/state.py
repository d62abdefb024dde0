"""The state of a training in its checkpoint, and the check that a checkpoint belongs to the run that resumes it."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..errors import CheckpointError
from .checkpoint import load_checkpoint, load_moments, moments, save_checkpoint

if TYPE_CHECKING:
    from .trainer import Trainer

# Settings that a resumed run may change: they say where and how it runs, not what it computes.
_FREE = {"out", "init", "threads", "checkpoint_seconds", "data", "device", "device_budget_mb", "memory_budget_mb"}


def write_state(run: Trainer, path: Path) -> None:
    """Write the complete state of a training."""
    theta = {f"theta.{k}": v for k, v in run.reg.state_dict().items()}
    extra, shards, values = run.objective.state()
    tensors = {**theta, "log_mu": run.log_mu.reshape(1), **moments(run.optimizer), **extra}
    state = {
        "method": run.method,
        "config": run.config.values(),
        "device": str(run.device),
        "samples": run.samples.fingerprint,
        "step": run.step_done,
        "best": run.best if math.isfinite(run.best) else None,
        "norms": list(run.clip.norms),
        "counters": run.counters.values,
        **values,
    }
    # The header must not differ between processes, whose devices may.
    save_checkpoint(path, tensors, run.world.share(state), shards, run.world)


def read_state(run: Trainer, source: Path) -> None:
    """Set the state of a training to that of a checkpoint.

    Raises
    ------
    CheckpointError
        If the checkpoint is damaged or belongs to another run.
    """
    tensors, state = load_checkpoint(source / "last.safetensors" if source.is_dir() else source)
    _check_same_run(run, state, source)
    shapes = run.reg.state_dict()
    stored = {k: a.shape for k, a in tensors.items() if k.startswith("theta.")}
    if stored != {f"theta.{k}": tuple(v.shape) for k, v in shapes.items()}:
        raise CheckpointError(
            f"{source} must hold the parameters of {type(run.reg).__name__}, but holds {sorted(stored)}; resume "
            "with the regularizer that the run began with."
        )
    run.reg.load_state_dict(
        {k: torch.from_numpy(np.array(tensors[f"theta.{k}"])).reshape(v.shape) for k, v in shapes.items()}
    )
    with torch.no_grad():
        run.log_mu.fill_(float(tensors["log_mu"][0]))
    load_moments(run.optimizer, tensors)
    run.step_done = state["step"]
    run.best = -math.inf if state["best"] is None else state["best"]
    run.clip.norms.clear()
    run.clip.norms.extend(state["norms"])
    run.counters.values.update(state["counters"])
    run.objective.load_state(tensors, state)


def _check_same_run(run: Trainer, state: dict[str, Any], where: Path) -> None:
    """Check that the settings that change the result match the checkpoint."""
    if state["method"] != run.method:
        raise CheckpointError(
            f"{where} must be a {run.method!r} run, but is a {state['method']!r} run; resume that one."
        )
    settings = run.config.values()
    # Settings that did not exist when the run started take their default values.
    saved = {f.name: f.default for f in dataclasses.fields(run.config)} | state["config"]
    changed = sorted(k for k in settings if k not in _FREE and settings[k] != saved[k])
    if changed:
        changes = ", ".join(f"{k}={saved[k]!r} (now {settings[k]!r})" for k in changed)
        raise CheckpointError(f"A resumed run must keep its settings, but {changes}; restore them or start a new run.")
    if state["samples"] != run.samples.fingerprint:
        raise CheckpointError(
            f"A resumed run must find the images it began with, but those of {run.config.data} differ; restore "
            "the folder or start a new run."
        )
