"""The shared training loop: order, schedule, clipping, checkpoints, validation, logs."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..ambient import full_precision, on_cpu, outside_inference
from ..errors import CheckpointError, OutOfMemory, TrainingDiverged
from ..inverse.problem import build_operator
from ..operators import LinearOperator
from ..regularizers.base import Regularizer
from .build import start_from
from .config import TrainConfig
from .folder import RunFolder
from .guards import Counters, MedianClip
from .lanes import Batch, Lanes
from .log import RunLog
from .objective import Objective
from .placement import Placement
from .reduction import Reduction
from .samples import PlacedSamples, load_samples
from .state import read_state, write_state
from .world import World, local_device


class Trainer:
    """Minimizes an objective by Adam.

    `fit()` trains to the end. `resume(path)` continues from a run's last checkpoint to the same bits as an
    uninterrupted run, even on a trainer whose `fit()` was interrupted. A run's folder has one writer: `fit()` and
    `resume()` hold its lock, and nothing else writes there. Parameters, their moments and the samples are on `device`.
    `log_mu` and all scalar decisions (clipping, schedule, guards) are on the host; a step synchronizes twice.

    With `lanes > 1`, the processes of an initialized `torch.distributed` share the training and end with the bits of
    one process alone (docs/howto/processes.md).

    Another thread or a signal handler may set `stopping`: `fit()` then ends after the current step with a checkpoint
    and a `KeyboardInterrupt`.
    """

    method: str
    """Name of the objective, which weight files and checkpoints record."""

    @outside_inference
    def __init__(self, config: TrainConfig, objective: Objective[Any], progress: bool | None = None) -> None:
        self.config, self.objective, self.progress = config, objective, progress
        self.method = objective.method
        if config.threads:
            torch.set_num_threads(config.threads)
        self.world = World(config.lanes > 1)
        self.world.check_lanes(config.lanes)
        self.placement = Placement(local_device(config.device, self.world), config.device_budget_mb)
        self.device = self.placement.device
        self.world.exchange_on(self.device)
        self.files = RunFolder(config, self.world)
        self.samples, validation = load_samples(config)
        self.lanes = Lanes(len(self.samples), config.batch, config.lanes, config.seed, self.world.rank, self.world.size)
        self.validation = validation.to(self.device)
        self.placed = PlacedSamples(self.samples, self.lanes.owned, self.placement)
        self.A = build_operator(config, self.samples.shape).to(self.device)
        self.reg = objective.build().to(self.device)
        trained = {name: p for name, p in self.reg.named_parameters() if p.requires_grad}
        self.names, self.params = list(trained), list(trained.values())
        self.log_mu = torch.tensor(math.log(config.mu0), dtype=torch.float64, device="cpu", requires_grad=True)
        if config.init:
            self.start_from(config.init)
        self.step_done = 0
        self.counters = Counters()
        objective.attach(self)
        self.optimizer = torch.optim.Adam(objective.groups(self.params), betas=(0.9, 0.99))
        self.clip = MedianClip(config.clip)
        self.reduction = Reduction(self.world, self.lanes, self.names, self.params, objective)
        self._resumed = self._broken = False
        self.stopping = False
        self.best = -math.inf

    @property
    def mu(self) -> float:
        """The weight of the regularizer."""
        return math.exp(float(self.log_mu.detach()))

    @property
    def folder(self) -> Path:
        """Folder of the run."""
        return self.files.path

    @property
    def checkpoint_path(self) -> Path:
        """Path of the last checkpoint."""
        return self.files.checkpoint

    def start_from(self, path: str | Path) -> None:
        """Initialize theta from a weight file, and mu if the file contains it and `init_mu` is set. The file may hold a
        smaller regularizer or the ridge of ridge+red.

        Raises
        ------
        InputError
            If the file's regularizer does not match the settings.
        """
        mu = start_from(path, self.reg)
        with torch.no_grad():
            self.log_mu.fill_(math.log(mu if self.config.init_mu and mu is not None else self.config.mu0))

    def operator(self, x: torch.Tensor) -> LinearOperator:
        """The operator of the problem for images like `x` `[B, C, H, W]`, on the training's device."""
        shape = (x.shape[1], x.shape[2], x.shape[3])
        return self.A if shape == self.A.image_shape else build_operator(self.config, shape).to(self.device)

    # -- the loop ------------------------------------------------------------------------------------------------

    @full_precision
    @outside_inference
    @torch.enable_grad()
    def fit(self) -> Regularizer:
        """Train to the last step. The regularizer is returned and saved as `weights.safetensors`.

        Raises
        ------
        TrainingDiverged
            If a loss or gradient is not finite (the message names the last good checkpoint), or if a bi-level training
            has recovered no image for 100 steps.
        OutOfMemory
            If a step does not fit the device; the message names the last checkpoint.
        CheckpointError
            If the folder holds another run.
        InputError
            If another process trains in the folder, or the disk is full; the last checkpoint stays.
        ProcessLost
            If another process of a shared training ended or failed.
        KeyboardInterrupt
            If `stopping` was set; a checkpoint of the last step has been saved.
        """
        if self.config.init and not self._resumed:
            self.files.check_init()
        with self.files.locked():
            with self.world.together():
                if self._broken:
                    # An interrupted step leaves an inconsistent state.
                    self.load_state()
                elif self.step_done == 0 and not self._resumed and self.checkpoint_path.exists():
                    raise CheckpointError(
                        f"{self.folder} must not hold a run already, but has a checkpoint; go on with resume(), or "
                        "name another folder."
                    )
            return self._fit()

    def _fit(self) -> Regularizer:
        c, log = self.config, None
        try:
            with self.world.together():
                log = self.files.open_log(self.step_done, self.progress)
                self.objective.begin()
            if self.step_done == 0:
                self.save_checkpoint()
            # If anything raises before the end, only the last checkpoint is consistent.
            self._broken = True
            with self.placement.current():
                self._loop(log)
        except torch.OutOfMemoryError as error:
            raise OutOfMemory(
                f"A step must fit the memory of {self.device}, but did not with batches of {c.batch} ({error}); the "
                f"last good checkpoint is {self.checkpoint_path}: start anew with a smaller batch or crop."
            ) from error
        finally:
            if log is not None:
                log.close()
        self.files.save("weights.safetensors", self.reg, self.meta())
        self._broken = False
        return self.reg

    def _loop(self, log: RunLog | None) -> None:
        c, saved = self.config, time.monotonic()
        while self.step_done < c.steps:
            self.reduction.wish(stop=self.stopping, save=time.monotonic() - saved > c.checkpoint_seconds)
            metrics = self._step()
            if log is not None:
                log.write(self.step_done + 1, metrics)
            self.step_done += 1
            last = self.step_done == c.steps
            if len(self.validation) and c.validate_every and (self.step_done % c.validate_every == 0 or last):
                scores = self._validate()
                if log is not None:
                    log.write(self.step_done, scores)
            stop = self.reduction.agreed_to_stop(self.stopping)
            if last or stop or self.reduction.agreed_to_save(time.monotonic() - saved > c.checkpoint_seconds):
                self.save_checkpoint()
                saved = time.monotonic()
            if stop and not last:
                self.stopping = False
                raise KeyboardInterrupt

    def _step(self) -> dict[str, Any]:
        began = time.perf_counter()
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * self.config.rate(self.step_done)
        metrics = self.gradients(self.batch(self.lanes.samples(self.step_done)))
        norm, clipped = self.clip(self.params)
        if not (math.isfinite(norm) and math.isfinite(metrics["loss"])):
            raise TrainingDiverged(
                f"Training must stay finite, but step {self.step_done + 1} gave loss {metrics['loss']} and gradient "
                f"norm {norm}; the last good checkpoint is {self.checkpoint_path}: lower lr or raise warmup and resume."
            )
        self.counters.add("clipped", clipped)
        # Adam allocates its step numbers at the first step.
        with on_cpu():
            self.optimizer.step()
        self.objective.after_update()
        run_metrics = {
            "grad_norm": norm,
            "mu": self.mu,
            "epoch": self.lanes.epoch(self.step_done + 1),
            "seconds": time.perf_counter() - began,
            "device": str(self.device),
        }
        return {**metrics, **run_metrics, **self.reduction.metrics(), **self.counters.values}

    def batch(self, samples: list[np.ndarray]) -> Batch:
        """The samples of each lane of this process, as one batch. All lanes have equally many."""
        numbers, per_lane = np.concatenate(samples), len(samples[0])
        rows = self.placement.rows(numbers, self.lanes.local(numbers))
        slices = tuple(slice(i, i + per_lane) for i in range(0, len(numbers), per_lane))
        return Batch(rows, self.placed.batch(rows), self.lanes.positions(per_lane), per_lane * self.lanes.lanes, slices)

    def gradients(self, batch: Batch) -> dict[str, Any]:
        """Set `.grad` of the parameters for the batch of all processes. Returns the metrics, with a `loss`."""

        def compute() -> list[Any]:
            # Bits of a lane may depend on its neighbors in a call, unless the kernels exclude that.
            joint = len(batch.lanes) == 1 or self.reg.backend_for(batch.x).batch_invariant
            return [self.objective.gradients(b) for b in ([batch] if joint else batch.split())]

        return self.objective.observe(self.reduction(compute, batch.per_lane))

    def _validate(self) -> dict[str, Any]:
        """Score the validation images and save a new best as `best.safetensors`."""
        metrics = self.objective.validate()
        score = metrics["val_score"]
        if score > self.best:
            self.best = score
            self.files.save("best.safetensors", self.reg, self.meta())
        return metrics

    # -- state ---------------------------------------------------------------------------------------------------

    def meta(self) -> dict[str, Any]:
        """Provenance that is stored in a weight file."""
        return {"method": self.method, "mu": self.mu, "step": self.step_done, "config": self.config.values()}

    def save_checkpoint(self) -> None:
        """Write the complete state to `last.safetensors`; the format depends neither on the device nor on the number of
        processes."""
        write_state(self, self.checkpoint_path)

    def resume(self, path: str | Path | None = None) -> Regularizer:
        """Load the state of `path` (a run's folder or checkpoint file; default: this run's) and train to the end.

        Raises
        ------
        CheckpointError
            If there is no valid checkpoint, or it belongs to another method, other settings or other images.
        """
        with self.files.locked():
            with self.world.together():
                self.load_state(path)
            return self.fit()

    @outside_inference
    def load_state(self, path: str | Path | None = None) -> None:
        """Load the state of a checkpoint. Neither trains nor writes."""
        source = Path(path) if path is not None else self.checkpoint_path
        read_state(self, source)
        self._resumed, self._broken, self.stopping = True, False, False
