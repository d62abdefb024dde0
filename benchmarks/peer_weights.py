"""The priors that LearnedRegularizers ships, on the compressive sensing of BSD400 (benchmarks/results/peer_weights).

    python benchmarks/peer_weights.py --checkout LearnedRegularizers --prior WCRR --data BSD400 --out wcrr.json

The checkout is the user's (`git clone https://github.com/johertrich/LearnedRegularizers`); nothing of it is part of
this repository. Its weights were trained bi-level for denoising. The prior's own gradient is compared with differences
of its own energy before it is used, and its weight mu is tuned on validation images, as TV's is. `--scales` also tunes
s in `r(s x)/s^2`.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import sys
import time
import types
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from deepreg_fast.bench.machine import describe
from deepreg_fast.data import ImageSet, carve_validation, centre_crop, load_folder, load_split
from deepreg_fast.evaluation.compare import Method, evaluate, paired, run
from deepreg_fast.evaluation.metrics import psnr
from deepreg_fast.evaluation.tuning import tuned_tv
from deepreg_fast.files import write_atomically
from deepreg_fast.operators import SRM
from deepreg_fast.regularizers import Regularizer
from deepreg_fast.solvers import ACCELERATIONS, PGDOptions

WEIGHTS = "weights/bilevel_Denoising/{}_bilevel_{}_for_Denoising.pt"
TRAINED = {"CRR": "IFT", "WCRR": "IFT", "TDV": "JFB"}
"""Prior -> which of their bi-level trainings."""
VALIDATION = 12
"""Training images set apart, the same ones as in the trainings of benchmarks/results/bsd400_cs5."""


class Foreign(Regularizer):
    """`r(x) = prior.g(s x) / s^2` of a prior of theirs, with the gradient that it computes itself."""

    def __init__(self, prior: nn.Module, scale: float = 1.0) -> None:
        super().__init__()
        self.prior = prior.requires_grad_(False).eval()
        self.scale = scale

    def energy(self, x: torch.Tensor) -> torch.Tensor:
        """`r(x_b)`, `[B]`."""
        return self.prior.g(self.scale * x) / self.scale**2  # type: ignore[operator]

    @torch.no_grad()
    def value_and_grad(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`r(x_b)` `[B]` and `grad r(x_b)` `[B, 1, H, W]`, both from one call of their `grad`."""
        value, grad = self.prior.grad(self.scale * x, get_energy=True)  # type: ignore[operator]
        return value / self.scale**2, grad / self.scale


def load_prior(checkout: Path, name: str) -> nn.Module:
    """Their prior with their weights, in float32; its modules are loaded by themselves, without their packages."""
    source, weights = checkout / "priors", checkout / WEIGHTS.format(name, TRAINED[name])
    file = source / ("tdv/__init__.py" if name == "TDV" else "wcrr.py")
    for needed in (file, source / "parameter_learning_wrapper.py", weights):
        if not needed.is_file():
            sys.exit(f"--checkout must be a clone of LearnedRegularizers, but has no {needed.relative_to(checkout)}.")
    _base_class()
    module = _module(file)
    if name == "TDV":
        prior = module.TDV(in_channels=1, num_features=32, multiplier=1, num_mb=3, num_scales=3, zero_mean=True)
    else:
        prior = module.WCRR(sigma=0.1, weak_convexity=1.0 if name == "WCRR" else 0.0, device="cpu")
    wrapped = _module(source / "parameter_learning_wrapper.py").ParameterLearningWrapper(prior, device="cpu")
    wrapped.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    return wrapped


def _base_class() -> None:
    """Their priors inherit from deepinv's `Prior` and use nothing of it: without deepinv, a plain module serves."""
    if "deepinv" not in sys.modules and importlib.util.find_spec("deepinv") is None:
        optim = types.ModuleType("deepinv.optim")
        optim.Prior = nn.Module  # type: ignore[attr-defined]
        sys.modules["deepinv"], sys.modules["deepinv.optim"] = types.ModuleType("deepinv"), optim


def _module(file: Path) -> Any:
    name = "learned_regularizers_" + (file.parent.name if file.name == "__init__.py" else file.stem)
    folders = [str(file.parent)] if file.name == "__init__.py" else None
    spec = importlib.util.spec_from_file_location(name, file, submodule_search_locations=folders)
    assert spec is not None and spec.loader is not None
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def keep_normalization(prior: nn.Module) -> None:
    """CRR and WCRR compute the norm of their filters anew in every call; the weights stay, so it is computed once."""
    ridge: Any = prior.regularizer
    if hasattr(ridge, "get_conv_lip"):
        norm = ridge.get_conv_lip().detach()
        ridge.get_conv_lip = lambda: norm


def gradient_error(prior: nn.Module, x: torch.Tensor) -> float:
    """Largest relative difference of `<grad r(x), v>` and central differences of r, in float64, over three v: two
    random ones and the gradient's own direction."""
    reg = Foreign(prior)
    g = reg.value_and_grad(x)[1]
    generator = torch.Generator().manual_seed(0)
    directions = [torch.randn(x.shape, generator=generator, dtype=x.dtype) for _ in range(2)] + [g]
    worst = 0.0
    for v in directions:
        v = v / v.norm()
        ahead, behind = reg.energy(x + 1e-5 * v), reg.energy(x - 1e-5 * v)
        measured, claimed = float((ahead - behind).sum()) / 2e-5, float((g * v).sum())
        worst = max(worst, abs(measured - claimed) / abs(claimed))
    return worst


def checked_prior(checkout: Path, name: str, x: torch.Tensor) -> tuple[nn.Module, float]:
    """The prior and the error of its gradient at an image `x`; the program ends where that exceeds 1e-4."""
    prior = load_prior(checkout, name).double()
    noisy = x.double() + 0.05 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    error = gradient_error(prior, noisy)
    if not error < 1e-4:
        sys.exit(f"The gradient of {name} must be that of its energy, but differs from differences by {error:.1e}.")
    prior = prior.float()
    keep_normalization(prior)
    return prior, error


def tuned(name: str, prior: nn.Module, options: argparse.Namespace, x: torch.Tensor) -> tuple[Method, float]:
    """The method with the mu and s of the best mean PSNR on the images `x`, and that PSNR."""
    A = SRM((1, *x.shape[-2:]), 0.2)
    y = A.A(x)
    solver = PGDOptions(options.max_iterations, 1e-4, options.acceleration)
    scored: list[tuple[float, Method]] = []
    for scale, mu in itertools.product(options.scales, options.mus):
        method = Method(name.lower(), Foreign(prior, scale), mu, solver)
        score = float(psnr(run(method, y, A).x, x).mean())  # type: ignore[union-attr]
        print(f"{name}: s = {scale:g}, mu = {mu:g}: {score:.3f} dB on the validation images", flush=True)
        scored.append((score, method))
    score, best = max(scored, key=lambda pair: pair[0])
    return best, score


def images(options: argparse.Namespace) -> tuple[ImageSet, torch.Tensor]:
    """The test images whole, every fifth of them first, so that what is there early is of all kinds; and crops of the
    first `--tune-on` validation images."""
    split = load_split("bsd400")
    validation = carve_validation(split.train, VALIDATION, 0)[1][: options.tune_on]
    order = [name for k in range(5) for name in split.test[k::5]][: options.limit]
    return load_folder(options.data, names=order), centre_crop(load_folder(options.data, names=validation).x, 96)


def timed(method: Method, x: torch.Tensor, A: SRM) -> dict[str, Any]:
    """What `evaluate` answers, with `cpu_seconds`: the process's own time, whatever else the machine does."""
    began = time.process_time()
    out = evaluate([method], x, A.A(x), A)
    out[method.name]["cpu_seconds"] = time.process_time() - began
    return out


def joined(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """One answer of `evaluate` for all images from those for a few images each."""
    out: dict[str, Any] = {}
    for name in parts[0]:
        rows = [p[name] for p in parts]
        figures = {k: [v for r in rows for v in r[k]] for k in ("psnr", "ssim", "iterations", "gradients")}
        status = sum((Counter(r["status"]) for r in rows), Counter())
        out[name] = {
            "psnr_mean": float(np.mean(figures["psnr"])),
            "psnr_median": float(np.median(figures["psnr"])),
            "ssim_mean": float(np.mean(figures["ssim"])),
            **figures,
            "status": dict(status),
            "mu": rows[0]["mu"],
            "seconds": sum(r["seconds"] for r in rows),
            "cpu_seconds": sum(r["cpu_seconds"] for r in rows),
        }
        out[name]["seconds_per_image"] = out[name]["cpu_seconds"] / len(figures["psnr"])
        if name != "tv":
            out[name]["vs_tv"] = paired(np.array(figures["psnr"]), np.array(out["tv"]["psnr"]))
    return out


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkout", type=Path, required=True, help="clone of johertrich/LearnedRegularizers")
    parser.add_argument("--prior", choices=[*TRAINED], default="WCRR")
    parser.add_argument("--data", type=Path, required=True, help="folder of BSD400")
    parser.add_argument("--out", type=Path, required=True, help="JSON file, written anew after every two images")
    parser.add_argument("--limit", type=int, default=30, help="test images, every fifth of the 30 first")
    parser.add_argument("--tune-on", type=int, default=VALIDATION, help="validation images, cropped to 96 x 96")
    parser.add_argument("--mus", type=float, nargs="+", default=[1e-4, 1e-3, 1e-2, 1e-1], help="weights to try")
    parser.add_argument("--scales", type=float, nargs="+", default=[1.0], help="values of s in r(s x)/s^2 to try")
    parser.add_argument("--acceleration", choices=[*ACCELERATIONS], default="fista")
    parser.add_argument("--max-iterations", type=int, default=500, help="gradients per image")
    return parser.parse_args()


def main() -> None:
    """Tune, recover, and write one JSON file like `deepreg-fast evaluate`'s."""
    options = arguments()
    torch.set_num_threads(1)
    test, tuning = images(options)
    prior, error = checked_prior(options.checkout, options.prior, tuning[:1, :, :48, :48])
    method, score = tuned(options.prior, prior, options, tuning)
    assert isinstance(method.reg, Foreign)
    A_tuning, A = SRM((1, *tuning.shape[-2:]), 0.2), SRM((1, *test.x.shape[-2:]), 0.2)
    tv = tuned_tv(tuning, A_tuning.A(tuning), A_tuning)
    about = {
        "scale": method.reg.scale,
        "validation_psnr": score,
        "gradient_error": error,
        "parameters": sum(p.numel() for p in prior.parameters()),
        "weights": WEIGHTS.format(options.prior, TRAINED[options.prior]),
    }
    settings = {k: v for k, v in vars(options).items() if k not in ("checkout", "data", "out")}
    parts = []
    for i in range(0, len(test), 2):
        x = test.x[i : i + 2]
        parts.append({**timed(tv, x, A), **timed(method, x, A)})
        result = joined(parts)
        result[method.name] |= about
        done = list(test.names[: i + 2])
        result["settings"] = {**settings, "images": done, "operator": A.describe()}
        result["machine"] = describe(options.checkout)
        write_atomically(options.out, (json.dumps(result, indent=1) + "\n").encode())
        print(told(method.name, result[method.name]), flush=True)


def told(name: str, f: dict[str, Any]) -> str:
    """One line about what there is so far."""
    against = f["vs_tv"]
    return (
        f"{name}, {against['images']} images: {f['psnr_mean']:.2f} dB, {against['mean']:+.2f} dB against TV, "
        f"{against['wins']} wins, {f['status']}, {f['seconds_per_image']:.1f} s of CPU per image"
    )


if __name__ == "__main__":
    main()
