"""Settings of a training run: frozen, validated, and the source of the command-line options."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from typing import Any, TypeVar

from .. import checks
from ..checks import option
from ..errors import InputError
from ..problem import Problem
from .fields import with_fields

REGULARIZERS = ("red", "ridge", "ridge+red")

T = TypeVar("T", bound="TrainConfig")
LOSSES = ("mse", "psnr", "l1", "ssim", "sure", "noise2noise")
UNSUPERVISED = ("sure", "noise2noise")
"""Losses that do not use the true images."""
DELTA_BALLS = ("sphere", "free")


@dataclass(frozen=True)
class TrainConfig(Problem):
    """Settings shared by all trainings; the problem is what the images are recovered from."""

    out: str = option("runs/train", "Folder of the run: checkpoints, logs, weights.")
    data: str = option("embedded", "Folder of images, or 'embedded' for those in scikit-image's wheel.")
    split: str = option("", "JSON file with 'train' and 'test' file names, or 'bsd400'; test images are not read.")
    crop: int = option(48, "Side of the square training crops; 0 takes whole images.")
    augment: bool = option(True, "Use each image in 4 orientations.")
    validation: int = option(10, "Images of the training part that are held out for validation.")
    validation_crop: int = option(96, "Side of the center crop of the validation images; 0 takes whole images.")
    validate_every: int = option(200, "Steps between two validations; 0 for none.")
    regularizer: str = option("red", "The regularizer: red (the network), ridge (filters and profiles) or ridge+red.")
    channels: int = option(16, "Width of the network.")
    depth: int = option(3, "Number of convolutions.")
    norm: str = option("none", "LayerNorm: none, pixel or image.")
    norm_place: str = option("before", "Place of the LayerNorm: before or after SiLU.")
    norm_eps: float = option(1e-2, "Epsilon of the LayerNorm, relative to the gained input.")
    head: str = option("red", "Energy of the network's output h: red, residual or norm.")
    gain: float = option(10.0, "Input gain of the network.")
    center: float = option(0.5, "Gray value about which the regularizer is centered.")
    alpha: float = option(0.0, "Strong convexity added to r.")
    kernel_size: int = option(0, "Side of the filters (of ridge in ridge+red), odd; 0 takes 3 for red, 9 for ridge.")
    filters: int = option(32, "Filters of ridge.")
    scales: int = option(4, "Steps in each profile of ridge.")
    convex: bool = option(True, "Keep ridge convex; otherwise it is weakly convex.")
    steps: int = option(2000, "Adam steps.")
    batch: int = option(8, "Images per step.")
    lanes: int = option(
        1, "Parts of each batch with gradients of their own, which processes share out (torchrun); batch is a multiple."
    )
    lr: float = option(2e-3, "Largest learning rate of theta.")
    warmup: int = option(100, "Steps of linear warm-up.")
    final_lr: float = option(0.05, "Last learning rate as a fraction of the largest (cosine).")
    clip: float = option(2.0, "Gradient norm limit as a multiple of its running median; 0 for none.")
    seed: int = option(0, "Seed of weights, crops, noise and order.")
    init: str = option("", "Weight file to start theta and mu from (or a smaller network's); empty: random weights.")
    init_mu: bool = option(True, "Also take mu from the weight file of init; otherwise start from mu0.")
    device: str = option("cpu", "Where to train: cpu, cuda, cuda:1 or auto (CUDA if there is such a device).")
    device_budget_mb: int = option(0, "CUDA memory (MB) for samples and warm starts; 0 takes half of what is free.")
    threads: int = option(0, "Threads of torch; 0 does not change them.")
    checkpoint_seconds: float = option(60.0, "Seconds between two checkpoints.")
    mu0: float = option(1e-2, "Weight mu of the regularizer (its initial value if mu is trained).")

    def __post_init__(self) -> None:
        checks.plain_fields(self)
        # Checked first, because its error message lists the devices.
        checks.device_name(self.device)
        super().__post_init__()
        for name in (
            "crop",
            "validation",
            "validation_crop",
            "validate_every",
            "warmup",
            "seed",
            "threads",
        ):
            checks.integer(getattr(self, name), name, 0)
        checks.choice(self.regularizer, "regularizer", REGULARIZERS)
        checks.integer(self.filters, "filters", 1)
        checks.integer(self.scales, "scales", 1, 8)
        side = checks.integer(self.kernel_size, "kernel_size", 0)
        if (side and side % 2 == 0) or (side == 1 and self.regularizer != "red"):
            raise InputError(f"kernel_size must be odd (3 or more for ridge) or 0, but is {side}.")
        if self.alpha and self.regularizer != "red":
            raise InputError(
                f"alpha is a setting of red and must be 0 for {self.regularizer}, but is {self.alpha}; leave it out."
            )
        checks.integer(self.device_budget_mb, "device_budget_mb", 0)
        for name, low in (("steps", 1), ("batch", 1), ("lanes", 1), ("channels", 1), ("depth", 2)):
            checks.integer(getattr(self, name), name, low)
        if self.batch % self.lanes:
            raise InputError(
                f"batch must be a multiple of lanes, but batch is {self.batch} and lanes {self.lanes}; change one of "
                "them."
            )
        checks.number(self.lr, "lr", 0.0, open_low=True)
        checks.number(self.final_lr, "final_lr", 0.0, 1.0)
        checks.number(self.clip, "clip", 0.0)
        checks.number(self.mu0, "mu0", 0.0, open_low=True)
        checks.number(self.checkpoint_seconds, "checkpoint_seconds", 0.0)

    def chain(self) -> dict[str, Any]:
        """Network arguments shared by `RED` and `DenoiserField`."""
        shared = ("channels", "depth", "norm", "norm_place", "gain", "center", "seed", "image_channels")
        return {name: getattr(self, name) for name in shared} | {
            "kernel_size": self.kernel_size if self.kernel_size and self.regularizer == "red" else 3,
            "eps": self.norm_eps,
        }

    def rate(self, step: int) -> float:
        """Factor of the learning rates: linear warm-up, then a cosine to `final_lr`."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        t = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.final_lr + (1.0 - self.final_lr) * 0.5 * (1.0 + math.cos(math.pi * t))

    def values(self) -> dict[str, Any]:
        """All settings by name, as JSON values."""
        return json.loads(self.to_json())

    def to_json(self) -> str:
        """All settings as a JSON object."""
        return json.dumps(dataclasses.asdict(self), indent=1)

    @classmethod
    def from_json(cls: type[T], text: str) -> T:
        """Settings from the output of `to_json`; unknown names are an error.

        Raises
        ------
        InputError
            If the text is not a JSON object, or a setting is unknown or invalid.
        """
        try:
            return cls.from_values(json.loads(text))
        except (json.JSONDecodeError, RecursionError) as error:
            raise InputError(f"Settings must be a JSON object, but cannot be read ({error}).") from error

    @classmethod
    def from_values(cls: type[T], values: object) -> T:
        """Settings from a dictionary of JSON values by name."""
        if not isinstance(values, dict):
            raise InputError(f"Settings must be an object of names and values, but are {checks.describe(values)}.")
        known = {f.name for f in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise InputError(
                f"Settings must be among those of {cls.__name__}, but {unknown} came; remove or rename them."
            )
        return cls(**values)


@with_fields
@dataclass(frozen=True)
class BilevelConfig(TrainConfig):
    """Settings of bi-level training (docs/math.md, M7 and M11).

    Parameters
    ----------
    <every field>

    Raises
    ------
    InputError
        If a value is out of range; the message names the field.

    Examples
    --------
    >>> import deepreg_fast as dr
    >>> dr.BilevelConfig(steps=100, beta=10.0).transform
    'dct'
    """

    out: str = option("runs/bilevel", "Folder of the run: checkpoints, logs, weights.")
    penalty: str = option("lipschitz", "What beta bounds: lipschitz (of grad s) or curvature (of s, from above).")
    beta: float = option(5.0, "Bound of the penalty: a Lipschitz constant or a curvature; 0 for no penalty.")
    beta_start: float = option(0.0, "beta at the first step, raised linearly over the first half; 0 starts at beta.")
    loss: str = option(
        "mse",
        "Loss of the recoveries: mse (squared error), psnr (its logarithm per image), l1, ssim; or, without the "
        "true images: sure, noise2noise.",
    )
    xi: float = option(1.0, "Weight of the penalty sum_b relu(beta_hat_b - beta).")
    delta_radius: float = option(
        0.05, "Norm of the perturbations, as a fraction of that of the image minus its center."
    )
    delta_ball: str = option("sphere", "Perturbations of fixed norm (sphere), or of any norm (free).")
    delta_steps: int = option(1, "Ascent steps of each perturbation per training step.")
    delta_steps_late: int = option(3, "The same in the last third of the training.")
    mu_lr: float = option(1e-2, "Learning rate of log mu.")
    mu_min: float = option(1e-4, "Lower bound of mu.")
    mu_max: float = option(1.0, "Upper bound of mu.")
    inner_iterations: int = option(30, "Gradients of the recovery per image and training step.")
    first_iterations: int = option(
        0, "The same in an image's first step, without a warm start; 0 takes inner_iterations."
    )
    tolerance_start: float = option(3e-3, "Tolerance of the recovery at the first step.")
    tolerance_end: float = option(1e-4, "Smallest tolerance; when the loss stalls, the tolerance is halved down to it.")
    stall_window: int = option(100, "Steps over which the loss must fall by 1 % to keep the tolerance.")
    acceleration: str = option("anderson", "Acceleration of the recovery in training: none, fista or anderson.")
    memory: int = option(5, "Differences per image that Anderson acceleration stores, 1 to 20.")
    monotone: bool = option(False, "Reject Anderson candidates that increase the objective, if r is bounded below.")
    adjoint: str = option("cg", "Hypergradient: cg, minres, jfb or unrolled.")
    jfb_steps: int = option(0, "Number of first steps that use jfb, the cheaper hypergradient, instead.")
    adjoint_iterations: int = option(8, "Iterations of the adjoint solve per training step.")
    adjoint_tolerance: float = option(0.1, "Relative residual of the adjoint solve.")
    warm_start: bool = option(True, "Start the recovery and the adjoint solve from the image's previous solutions.")
    memory_budget_mb: int = option(2048, "Host memory (MB) for warm starts; beyond it they are in files of the run.")

    def __post_init__(self) -> None:
        # Imported here because the command-line help lists the settings without importing torch.
        from ..inverse.adjoint import METHODS
        from ..regularizers.lipschitz import PENALTIES
        from ..solvers import ACCELERATIONS

        super().__post_init__()
        checks.choice(self.penalty, "penalty", tuple(PENALTIES))
        checks.number(self.beta, "beta", 0.0)
        checks.number(self.beta_start, "beta_start", 0.0)
        checks.choice(self.loss, "loss", LOSSES)
        if self.loss in UNSUPERVISED and not self.sigma:
            raise InputError(f"loss={self.loss!r} needs noisy measurements, but sigma is 0; set sigma to their noise.")
        if self.loss not in ("mse", "psnr") and self.adjoint == "unrolled":
            raise InputError(f"adjoint='unrolled' is for the losses mse and psnr, but loss is {self.loss!r}.")
        checks.number(self.xi, "xi", 0.0)
        checks.number(self.delta_radius, "delta_radius", 0.0, 10.0, open_low=True)
        checks.choice(self.delta_ball, "delta_ball", DELTA_BALLS)
        checks.integer(self.delta_steps, "delta_steps", 0)
        checks.integer(self.delta_steps_late, "delta_steps_late", 0)
        checks.number(self.mu_lr, "mu_lr", 0.0)
        checks.number(self.mu_max, "mu_max", 0.0, open_low=True)
        checks.number(self.mu_min, "mu_min", 0.0, open_low=True)
        if not self.mu_min <= self.mu0 <= self.mu_max:
            raise InputError(
                f"mu0 must be a number in [mu_min, mu_max], but is {self.mu0:g} with mu_min {self.mu_min:g} and mu_max "
                f"{self.mu_max:g}; change one of them."
            )
        checks.integer(self.inner_iterations, "inner_iterations", 2)
        checks.integer(self.first_iterations, "first_iterations", 0)
        checks.number(self.tolerance_end, "tolerance_end", 0.0)
        checks.number(self.tolerance_start, "tolerance_start", 0.0)
        if self.tolerance_start < self.tolerance_end:
            raise InputError(
                f"tolerance_start must be at least tolerance_end, but is {self.tolerance_start:g} and tolerance_end "
                f"{self.tolerance_end:g}; change one of them."
            )
        checks.integer(self.stall_window, "stall_window", 1)
        checks.choice(self.acceleration, "acceleration", ACCELERATIONS)
        checks.integer(self.memory, "memory", 1, 20)
        checks.choice(self.adjoint, "adjoint", METHODS)
        checks.integer(self.jfb_steps, "jfb_steps", 0)
        checks.integer(self.adjoint_iterations, "adjoint_iterations", 1)
        checks.number(self.adjoint_tolerance, "adjoint_tolerance", 0.0, 1.0)
        checks.integer(self.memory_budget_mb, "memory_budget_mb", 0)


@with_fields
@dataclass(frozen=True)
class BaselineConfig(TrainConfig):
    """Settings of the baselines' training (docs/math.md, M12).

    Parameters
    ----------
    <every field>

    Raises
    ------
    InputError
        If a value is out of range; the message names the field.

    Examples
    --------
    >>> import deepreg_fast as dr
    >>> dr.BaselineConfig(noise_level=0.1).steps
    2000
    """

    noise_level: float = option(0.06, "Standard deviation of the noise that denoisers are trained on.")
    rho: float = option(0.1, "Added rho/2 ||u||^2 of the adversarial regularizer.")
    gradient_penalty: float = option(10.0, "Weight of the adversarial critic's gradient penalty.")

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.number(self.noise_level, "noise_level", 0.0, open_low=True)
        checks.number(self.rho, "rho", 0.0)
        checks.number(self.gradient_penalty, "gradient_penalty", 0.0)
