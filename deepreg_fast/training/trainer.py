"""The shared training loop: order, schedule, clipping, checkpoints, validation, logs."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from ..ambient import full_precision, on_cpu, outside_inference
from ..errors import CheckpointError, InputError, OutOfMemory, TrainingDiverged
from ..evaluation.metrics import psnr
from ..files import check_outputs, locked, remove_temporaries, same_file, write_atomically
from ..inverse.data_term import add_noise
from ..inverse.problem import build_operator
from ..inverse.recovery import recover
from ..operators import LinearOperator
from ..regularizers.base import Regularizer
from ..regularizers.initialize import initialize_from
from ..solvers import PGDOptions, Solution
from ..status import counts
from ..weights.io import load, locate, save
from .checkpoint import Array, load_checkpoint, load_moments, moments, save_checkpoint
from .config import TrainConfig
from .guards import Counters, MedianClip
from .log import RunLog
from .placement import Placement, Rows
from .samples import PlacedSamples, load_samples

FILES = ("last.safetensors", "best.safetensors", "weights.safetensors", "config.json", "metrics.jsonl")
"""Files that a run overwrites in its folder."""


class Trainer:
    """Base of the trainings: a subclass builds its regularizer and computes the gradients of a batch.

    `fit()` trains to the end. `resume(path)` continues from a run's last checkpoint to the same bits as an
    uninterrupted run, even on a trainer whose `fit()` was interrupted. A run's folder has one writer: `fit()` and
    `resume()` hold its lock, and nothing else writes there. Parameters, their moments and the samples are on `device`.
    `log_mu` and all scalar decisions (clipping, schedule, guards) are on the host; a step synchronizes twice.

    Another thread or a signal handler may set `stopping`: `fit()` then ends after the current step with a checkpoint
    and a `KeyboardInterrupt`.
    """

    method: ClassVar[str] = "train"

    @outside_inference
    def __init__(self, config: TrainConfig, progress: bool | None = None) -> None:
        self.config = config
        self.folder = Path(config.out)
        if config.data != "embedded" and same_file(self.folder, Path(config.data)):
            raise InputError(
                f"out must be another folder than data, but both are {config.out}; name another folder with --out."
            )
        self.progress = progress
        if config.threads:
            torch.set_num_threads(config.threads)
        self.placement = Placement(config.device, config.device_budget_mb)
        self.device = self.placement.device
        self.samples, validation = load_samples(config)
        self.validation = validation.to(self.device)
        self.placed = PlacedSamples(self.samples, self.placement)
        self.A = build_operator(config, self.samples.shape).to(self.device)
        self.reg = self.build()
        self.reg = self.reg.to(self.device)
        self.params = [p for p in self.reg.parameters() if p.requires_grad]
        self.log_mu = torch.tensor(math.log(config.mu0), dtype=torch.float64, device="cpu", requires_grad=True)
        if config.init:
            self.start_from(config.init)
        self.optimizer = torch.optim.Adam(self.groups(), betas=(0.9, 0.99))
        self.step_done = 0
        self._resumed = self._broken = self._holds_lock = False
        self.stopping = False
        self.best = -math.inf
        self.clip = MedianClip(config.clip)
        self.counters = Counters()

    def start_from(self, path: str | Path) -> None:
        """Initialize theta from a weight file, and mu if the file contains it and `init_mu` is set. The file may hold a
        smaller regularizer or the ridge of ridge+red (`initialize_from`).

        Raises
        ------
        InputError
            If the file's regularizer does not match the settings.
        """
        reg, meta = load(path)
        if not initialize_from(reg, self.reg):
            raise InputError(
                f"init must hold a regularizer like the one of the settings ({self.reg.describe()}), but {path} "
                f"holds {reg.describe()}; change the settings or the file."
            )
        with torch.no_grad():
            notes = meta if self.config.init_mu else {}
            self.log_mu.fill_(math.log(float(notes.get("mu", self.config.mu0))))

    # -- defined by subclasses -----------------------------------------------------------------------------------

    def build(self) -> Regularizer:
        """Build the regularizer to be trained."""
        raise NotImplementedError

    def gradients(self, rows: Rows, x: torch.Tensor) -> dict[str, Any]:
        """Set `.grad` of the parameters for the samples `rows` with images `x`; return metrics with a `loss`."""
        raise NotImplementedError

    def groups(self) -> list[dict[str, Any]]:
        """Adam's parameter groups, each with its largest learning rate as `peak`."""
        return [{"params": self.params, "lr": self.config.lr, "peak": self.config.lr}]

    def extra_state(self) -> tuple[Mapping[str, Array], dict[str, Any]]:
        """Tensors and JSON values that a subclass adds to the checkpoint."""
        return {}, {}

    def load_extra_state(self, tensors: dict[str, np.ndarray], state: dict[str, Any]) -> None:
        """Restore what `extra_state` returned."""

    def begin(self) -> None:
        """Called with the run's folder locked, before a training starts or continues."""

    def after_update(self) -> None:
        """Called after Adam's step."""

    # -- the loop ------------------------------------------------------------------------------------------------

    @property
    def mu(self) -> float:
        """The weight of the regularizer."""
        return math.exp(float(self.log_mu.detach()))

    @property
    def checkpoint_path(self) -> Path:
        """Path of the last checkpoint."""
        return self.folder / "last.safetensors"

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
        KeyboardInterrupt
            If `stopping` was set; a checkpoint of the last step has been saved.
        """
        if self.config.init and not self._resumed:
            check_outputs(
                (self.folder / name for name in FILES), [locate(self.config.init)], "name another folder with --out"
            )
        with self._lock():
            if self._broken:
                # An interrupted step leaves an inconsistent state.
                self.load_state()
            elif self.step_done == 0 and not self._resumed and self.checkpoint_path.exists():
                raise CheckpointError(
                    f"{self.folder} must not hold a run already, but has a checkpoint; go on with resume(), or name "
                    "another folder."
                )
            return self._fit()

    def _fit(self) -> Regularizer:
        c = self.config
        for name in FILES:
            remove_temporaries(self.folder / name)
        write_atomically(self.folder / "config.json", c.to_json().encode())
        log = RunLog(self.folder, c.steps, self.step_done, self.progress)
        try:
            self.begin()
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
            log.close()
        save(self.reg, self.folder / "weights.safetensors", self.meta())
        self._broken = False
        return self.reg

    @contextmanager
    def _lock(self) -> Iterator[None]:
        """Lock the run's folder (reentrant)."""
        if self._holds_lock:
            yield
            return
        with locked(self.folder / "run.lock", f"The run in {self.folder}"):
            self._holds_lock = True
            try:
                yield
            finally:
                self._holds_lock = False

    def _loop(self, log: RunLog) -> None:
        c, saved = self.config, time.monotonic()
        while self.step_done < c.steps:
            log.write(self.step_done + 1, self._step())
            self.step_done += 1
            last = self.step_done == c.steps
            if len(self.validation) and c.validate_every and (self.step_done % c.validate_every == 0 or last):
                log.write(self.step_done, self._validate())
            if last or self.stopping or time.monotonic() - saved > c.checkpoint_seconds:
                self.save_checkpoint()
                saved = time.monotonic()
            if self.stopping and not last:
                self.stopping = False
                raise KeyboardInterrupt

    def _step(self) -> dict[str, Any]:
        began = time.perf_counter()
        c = self.config
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * self._schedule(self.step_done)
        rows = self.placement.rows(self.samples.indices(self.step_done, min(c.batch, len(self.samples))))
        metrics = self.gradients(rows, self.placed.batch(rows))
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
        self.after_update()
        epoch = self.samples.epoch(self.step_done + 1, min(c.batch, len(self.samples)))
        seconds = time.perf_counter() - began
        run_metrics = {"grad_norm": norm, "mu": self.mu, "epoch": epoch, "seconds": seconds, "device": str(self.device)}
        return {**metrics, **run_metrics, **self.counters.values}

    def _schedule(self, step: int) -> float:
        """Factor of the learning rate: linear warm-up, then a cosine to `final_lr`."""
        c = self.config
        if step < c.warmup:
            return (step + 1) / c.warmup
        t = (step - c.warmup) / max(1, c.steps - c.warmup)
        return c.final_lr + (1.0 - c.final_lr) * 0.5 * (1.0 + math.cos(math.pi * t))

    def _validate(self) -> dict[str, Any]:
        """Score the validation images and save a new best as `best.safetensors`."""
        metrics = self.validate()
        score = metrics["val_score"]
        if score > self.best:
            self.best = score
            save(self.reg, self.folder / "best.safetensors", self.meta())
        return metrics

    def validate(self) -> dict[str, Any]:
        """Mean and median PSNR and mean SSIM of the validation images, recovered from a cold start."""
        from ..evaluation.metrics import ssim

        x = self.validation
        A = self._operator(x)
        y = add_noise(A.A(x), self.config.sigma, seed=self.config.seed + 1)
        sol = recover(y, A, self.reg, self.mu, options=PGDOptions(300, 1e-4, acceleration="fista"))
        score = psnr(sol.x, x)
        statuses = {f"val_{k}": v for k, v in counts(sol.status).items()}
        value = self.score(sol, x, y, A)
        return {
            "val_psnr": float(score.mean()),
            "val_psnr_median": float(score.median()),
            "val_ssim": float(ssim(sol.x, x).mean()),
            "val_gradients": float(sol.gradients.double().mean()),
            "val_score": value if math.isfinite(value) else -math.inf,
            **statuses,
        }

    def score(self, sol: Solution, x: torch.Tensor, y: torch.Tensor, A: LinearOperator) -> float:
        """What the best checkpoint is chosen by: the mean PSNR of the validation images."""
        return float(psnr(sol.x, x).mean())

    def meta(self) -> dict[str, Any]:
        """Provenance that is stored in a weight file."""
        return {
            "method": self.method,
            "mu": self.mu,
            "step": self.step_done,
            "config": json.loads(self.config.to_json()),
        }

    def _operator(self, x: torch.Tensor) -> LinearOperator:
        """The operator for images like `x` `[B, C, H, W]`."""
        return build_operator(self.config, (x.shape[1], x.shape[2], x.shape[3])).to(self.device)

    # -- state ---------------------------------------------------------------------------------------------------

    def save_checkpoint(self) -> None:
        """Write the complete state to `last.safetensors`; the format does not depend on the device."""
        theta = {f"theta.{k}": v for k, v in self.reg.state_dict().items()}
        extra_tensors, values = self.extra_state()
        tensors = {**theta, "log_mu": self.log_mu.reshape(1), **moments(self.optimizer), **extra_tensors}
        state = {
            "method": self.method,
            "config": json.loads(self.config.to_json()),
            "device": str(self.device),
            "samples": self.samples.fingerprint,
            "step": self.step_done,
            "best": self.best if math.isfinite(self.best) else None,
            "norms": list(self.clip.norms),
            "counters": self.counters.values,
            **values,
        }
        save_checkpoint(self.checkpoint_path, tensors, state)

    def resume(self, path: str | Path | None = None) -> Regularizer:
        """Load the state of `path` (a run's folder or checkpoint file; default: this run's) and train to the end.

        Raises
        ------
        CheckpointError
            If there is no valid checkpoint, or it belongs to another method, other settings or other images.
        """
        with self._lock():
            self.load_state(path)
            return self.fit()

    @outside_inference
    def load_state(self, path: str | Path | None = None) -> None:
        """Load the state of a checkpoint. Neither trains nor writes."""
        source = Path(path) if path is not None else self.checkpoint_path
        tensors, state = load_checkpoint(source / "last.safetensors" if source.is_dir() else source)
        self._check_same_run(state, source)
        shapes = self.reg.state_dict()
        stored = {k: a.shape for k, a in tensors.items() if k.startswith("theta.")}
        if stored != {f"theta.{k}": tuple(v.shape) for k, v in shapes.items()}:
            raise CheckpointError(
                f"{source} must hold the parameters of {type(self.reg).__name__}, but holds {sorted(stored)}; resume "
                "with the regularizer that the run began with."
            )
        self.reg.load_state_dict(
            {k: torch.from_numpy(np.array(tensors[f"theta.{k}"])).reshape(v.shape) for k, v in shapes.items()}
        )
        with torch.no_grad():
            self.log_mu.fill_(float(tensors["log_mu"][0]))
        load_moments(self.optimizer, tensors)
        self.step_done = state["step"]
        self.best = -math.inf if state["best"] is None else state["best"]
        self.clip.norms.clear()
        self.clip.norms.extend(state["norms"])
        self.counters.values.update(state["counters"])
        self.load_extra_state(tensors, state)
        self._resumed, self._broken, self.stopping = True, False, False

    def _check_same_run(self, state: dict[str, Any], where: Path) -> None:
        """Check that the settings that change the result match the checkpoint."""
        if state["method"] != self.method:
            raise CheckpointError(
                f"{where} must be a {self.method!r} run, but is a {state['method']!r} run; resume that one."
            )
        ignored = {
            "out",
            "init",
            "threads",
            "checkpoint_seconds",
            "data",
            "device",
            "device_budget_mb",
            "memory_budget_mb",
        }
        settings = json.loads(self.config.to_json())
        # Settings that did not exist when the run started take their default values.
        saved = {f.name: f.default for f in dataclasses.fields(self.config)} | state["config"]
        changed = sorted(k for k in settings if k not in ignored and settings[k] != saved[k])
        if changed:
            changes = ", ".join(f"{k}={saved[k]!r} (now {settings[k]!r})" for k in changed)
            raise CheckpointError(
                f"A resumed run must keep its settings, but {changes}; restore them or start a new run."
            )
        if state["samples"] != self.samples.fingerprint:
            raise CheckpointError(
                f"A resumed run must find the images it began with, but those of {self.config.data} differ; restore "
                "the folder or start a new run."
            )
