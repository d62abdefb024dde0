"""Comparison of recovery methods on the same images with the same operator."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import checks
from ..ambient import full_precision
from ..data import ImageSet, carve_validation, embedded_images, image_names, load_folder, load_split
from ..errors import DataError, InputError
from ..files import same_file
from ..inverse.data_term import add_noise, initial_point
from ..inverse.problem import build_operator
from ..inverse.recovery import recover
from ..operators import LinearOperator
from ..problem import Problem
from ..regularizers import TV
from ..regularizers.base import Regularizer
from ..solvers import PGDOptions, Solution
from ..solvers.pgd import Observer
from ..status import counts
from .metrics import psnr, ssim


@dataclass(frozen=True)
class Experiment(Problem):
    """A measurement problem and the images that it measures.

    Parameters
    ----------
    problem, ratio, transform, randomizer, keep_dc, operator_seed, sigma, color
        As in `Problem`.
    data : str
        Folder of images, or "embedded".
    split : str
        JSON split file or "bsd400", whose test part is evaluated. If empty, all images except the tuning images are.
    test_crop : int
        Side of the center crop of all images; 0 for no crop.
    tuning : int
        Number of training images on which mu is tuned.

    Raises
    ------
    InputError
        If a value is invalid.
    """

    data: str = "embedded"
    split: str = ""
    test_crop: int = 0
    tuning: int = 6

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.integer(self.test_crop, "test_crop", 0)
        checks.integer(self.tuning, "tuning", 1)


@dataclass(frozen=True)
class Measured:
    """An experiment's operator, its test images `x` `[N, C, H, W]` with their `names` and measurements `y`, one per
    row, and the tuning images with their measurements."""

    A: LinearOperator
    names: tuple[str, ...]
    x: torch.Tensor
    y: torch.Tensor
    x_tuning: torch.Tensor
    y_tuning: torch.Tensor


def measure(experiment: Experiment, device: torch.device | str = "cpu", limit: int = 0, tune_on: str = "") -> Measured:
    """Load the images and measure them on the CPU, so that the numbers do not depend on the device.

    `limit` is the number of test images; 0 for all. For `tune_on`, see `evaluation_images`.
    """
    test, tuning = evaluation_images(experiment, tune_on)
    if checks.integer(limit, "limit", 0):
        test = ImageSet(test.names[:limit], test.x[:limit])
    A = build_operator(experiment, test.shape)
    y = add_noise(A.A(test.x), experiment.sigma, seed=1)
    y_tuning = add_noise(A.A(tuning), experiment.sigma, seed=2)
    x, y, tuning, y_tuning = (t.to(device) for t in (test.x, y, tuning, y_tuning))
    return Measured(A.to(device), test.names, x, y, tuning, y_tuning)


# Name of the crop option, on the command line and in Python, for error messages.
_CROP = "--crop (test_crop)"


def evaluation_images(experiment: Experiment, tune_on: str = "") -> tuple[ImageSet, torch.Tensor]:
    """Test images and tuning images `[M, C, H, W]`, which are disjoint. Tuning images come from the training part, or
    from the folder `tune_on` ("embedded" for scikit-image's photographs), cropped to the size of the test images.

    Raises
    ------
    DataError
        If the images cannot be read, or their sizes differ and no crop is set.
    InputError
        If a folder without split leaves no test image, or `tune_on` is the data folder.
    """
    data, crop, count, color = experiment.data, experiment.test_crop, experiment.tuning, experiment.color
    if data == "embedded":
        train, test = embedded_images(crop or 96, color=color)
        tuning = train.x[:: max(1, len(train.x) // count)][:count]
        return test, _tuning_images(tune_on, test, count) if tune_on else tuning
    if tune_on and same_file(Path(tune_on), Path(data)):
        raise InputError(f"--tune-on must be another folder than --data, but both are {data}; name another one.")
    size = crop or None
    if experiment.split:
        names = load_split(experiment.split)
        test = load_folder(data, size, names.test, _CROP, color)
        pool = names.train
    else:
        pool = image_names(data)
        if not tune_on and len(pool) <= count:
            raise InputError(
                f"{data} must hold more images than the {count} set apart for tuning, but holds {len(pool)}; name "
                "another folder to tune on (--tune-on, or --tune-on embedded), or tune on fewer (--validation)."
            )
        test_names = pool if tune_on else carve_validation(pool, count, 0)[0]
        test = load_folder(data, size, test_names, _CROP, color)
    if tune_on:
        return test, _tuning_images(tune_on, test, count)
    tuning_names = carve_validation(pool, count, 0, "--validation (tuning)")[1]
    tuning = load_folder(data, size, tuning_names, _CROP, color)
    if tuning.shape != test.shape:
        raise DataError(
            f"Images for testing and tuning must be of one shape, but {test.names[0]} has "
            f"{'x'.join(map(str, test.shape[1:]))} pixels and {tuning.names[0]} has "
            f"{'x'.join(map(str, tuning.shape[1:]))}; give a {_CROP} to take the center crop of each."
        )
    return test, tuning.x


def _tuning_images(tune_on: str, test: ImageSet, count: int) -> torch.Tensor:
    """At most `count` images from another folder, cropped to the size of the test images."""
    channels, height, width = test.shape
    color = channels == 3
    if tune_on == "embedded":
        x = embedded_images((height, width), color=color).train.x
        return x[:: max(1, len(x) // count)][:count]
    names = image_names(tune_on)
    chosen = carve_validation(names, count, 0)[1] if count < len(names) else names
    return load_folder(tune_on, (height, width), chosen, _CROP, color).x


@dataclass(frozen=True)
class Method:
    """A regularizer with its weight mu, the scale of its argument (`Regularizer.rescaled`) and solver options.

    Without a regularizer, the method is the back-projection `A^T y` if `name` is "adjoint", otherwise the minimum-norm
    solution about mid-gray.
    """

    name: str
    reg: Regularizer | None = None
    mu: float | None = None
    options: PGDOptions = PGDOptions(acceleration="fista")
    scale: float = 1.0

    @property
    def regularizer(self) -> Regularizer:
        """The regularizer, rescaled by `scale`."""
        assert self.reg is not None
        return self.reg.rescaled(self.scale)


@full_precision
@torch.no_grad()
def run(
    method: Method,
    y: torch.Tensor,
    A: LinearOperator,
    batch: int | None = None,
    near: Solution | None = None,
    observer: Observer | None = None,
) -> Solution | torch.Tensor:
    """Recover all images with one method. Closed-form methods return a tensor.

    `batch` images are recovered at a time. The default is 5 on the CPU, because a few images fill its caches, and 64 on
    other devices; with an `observer` (see `recover`), all images at once. Recoveries start from the images and step
    sizes of `near`, a solution for another mu; by default from the minimum-norm solutions.
    """
    batch = batch or (len(y) if observer else 5 if y.device.type == "cpu" else 64)
    if method.reg is None:
        return A.A_adjoint(y) if method.name == "adjoint" else initial_point(y, A, TV())
    parts, reg, rest = [], method.regularizer, {"options": method.options, "observer": observer}
    for rows in (slice(i, i + batch) for i in range(0, len(y), batch)):
        start = {"x0": near.x[rows], "tau0": near.tau[rows]} if near else {}
        parts.append(recover(y[rows], A, reg, method.mu, **rest, **start))  # type: ignore[arg-type]
    names = ("x", "status", "iterations", "gradients", "residual", "tau")
    joined = {n: torch.cat([getattr(p, n) for p in parts]) for n in names}
    return Solution(**joined, backend=parts[0].backend)  # type: ignore[arg-type]


def evaluate(
    methods: Sequence[Method],
    x: torch.Tensor,
    y: torch.Tensor,
    A: LinearOperator,
    done: Callable[[int | None, str], None] = lambda *_: None,
) -> dict[str, Any]:
    """Evaluate each method on images `x` `[N, C, H, W]` from measurements `y` `[N, m]`, all on one device.

    `done(None, text)` is called after each method; the text announces the next one.

    Returns a dictionary by method name with `psnr_mean`, `psnr_median`, `ssim_mean`, the `status` counts, `mu`,
    `seconds`, and per image `psnr`, `ssim`, `iterations` and `gradients`. If there is a method "tv", the others also
    have `vs_tv`: mean and median of the paired differences in dB, a 95 % bootstrap interval of the mean, and the number
    of wins.
    """
    names = [m.name for m in methods]
    if len(set(names)) != len(names):
        raise InputError(f"Methods must have different names, but are {names}; rename one.")
    results = {}
    for m, after in zip(methods, [*names[1:], ""], strict=True):
        results[m.name] = figures(m, x, y, A)[0]
        done(None, f"recovering by {after}" if after else "")
    against_tv(results)
    return results


def against_tv(results: dict[str, Any]) -> None:
    """Add `vs_tv` to the results of each other method, if "tv" is among them."""
    if "tv" in results:
        reference = np.array(results["tv"]["psnr"])
        for name, result in results.items():
            if name != "tv":
                result["vs_tv"] = paired(np.array(result["psnr"]), reference)


def figures(
    method: Method, x: torch.Tensor, y: torch.Tensor, A: LinearOperator, observer: Observer | None = None
) -> tuple[dict[str, Any], torch.Tensor]:
    """Results of `evaluate` for one method, and the recovered images `[N, C, H, W]`. For `observer`, see `run`."""
    began = time.perf_counter()
    sol = run(method, y, A, observer=observer)
    if y.is_cuda:
        torch.cuda.synchronize(y.device)
    seconds = time.perf_counter() - began
    image = sol.x if isinstance(sol, Solution) else sol
    solved = isinstance(sol, Solution)
    result = {
        "psnr": psnr(image, x).tolist(),
        "ssim": ssim(image, x).tolist(),
        "iterations": sol.iterations.tolist() if solved else [0] * len(x),
        "gradients": sol.gradients.tolist() if solved else [0] * len(x),
        "status": counts(sol.status) if solved else {"converged": len(x)},
        "mu": method.mu,
        "seconds": seconds,
    }
    return means(result) | result, image


def means(result: dict[str, Any]) -> dict[str, float]:
    """`psnr_mean`, `psnr_median` and `ssim_mean` of the per-image results."""
    p = np.array(result["psnr"])
    return {
        "psnr_mean": float(p.mean()),
        "psnr_median": float(np.median(p)),
        "ssim_mean": float(np.mean(result["ssim"])),
    }


def paired(a: np.ndarray, b: np.ndarray, draws: int = 10_000) -> dict[str, Any]:
    """Statistics of the per-image differences `a - b`: mean, median, 95 % bootstrap interval of the mean (fixed seed),
    wins."""
    d = a - b
    rng = np.random.Generator(np.random.PCG64(0))
    means = d[rng.integers(0, len(d), (draws, len(d)))].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return {
        "mean": float(d.mean()),
        "median": float(np.median(d)),
        "interval": [float(low), float(high)],
        "wins": int((d > 0).sum()),
        "images": len(d),
    }
