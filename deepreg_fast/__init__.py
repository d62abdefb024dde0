"""deepreg-fast: learned regularizers, trained bi-level.

`xhat = argmin_x 1/(2 sigma^2) ||y - A x||^2 + lam r_theta(x)`, with `theta` and `lam` trained through `xhat`.
Importing this package computes and builds nothing; names are loaded when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._version import __version__

_HOME = {
    "SRM": "operators",
    "Identity": "operators",
    "LinearOperator": "operators",
    "RED": "regularizers",
    "Ridge": "regularizers",
    "Sum": "regularizers",
    "ICNN": "regularizers",
    "TV": "regularizers",
    "DenoiserField": "regularizers",
    "EnergyRegularizer": "regularizers",
    "Regularizer": "regularizers",
    "PGDOptions": "solvers",
    "Solution": "solvers",
    "recover": "recovery",
    "hypergradient": "implicit",
    "AdjointOptions": "implicit",
    "Hypergradient": "implicit",
    "beta_hat": "lipschitz",
    "spectrum": "lipschitz",
    "cg": "linsolve",
    "minres": "linsolve",
    "CGOptions": "linsolve",
    "MinresOptions": "linsolve",
    "save": "weights",
    "load": "weights",
    "BilevelTrainer": "training",
    "BilevelConfig": "training",
    "BaselineConfig": "training",
    "DenoiserTrainer": "training",
    "GradientStepTrainer": "training",
    "AdversarialTrainer": "training",
    "use_backend": "backend",
    "backends": "backend",
    "gpu_options": "backend",
    "release_graphs": "backend",
    "Status": "status",
    "add_noise": "fidelity",
    "mu_with_noise": "fidelity",
    "psnr": "metrics",
    "ssim": "metrics",
}

__all__ = ["__version__", "ops", *_HOME]  # pyright: ignore[reportUnsupportedDunderAll]

if TYPE_CHECKING:
    from . import ops
    from .backend import backends, gpu_options, release_graphs, use_backend
    from .fidelity import add_noise, mu_with_noise
    from .implicit import AdjointOptions, Hypergradient, hypergradient
    from .linsolve import CGOptions, MinresOptions, cg, minres
    from .lipschitz import beta_hat, spectrum
    from .metrics import psnr, ssim
    from .operators import SRM, Identity, LinearOperator
    from .recovery import recover
    from .regularizers import ICNN, RED, TV, DenoiserField, EnergyRegularizer, Regularizer, Ridge, Sum
    from .solvers import PGDOptions, Solution
    from .status import Status
    from .training import (
        AdversarialTrainer,
        BaselineConfig,
        BilevelConfig,
        BilevelTrainer,
        DenoiserTrainer,
        GradientStepTrainer,
    )
    from .weights import load, save


def __getattr__(name: str) -> Any:
    if name == "ops":
        return import_module(".ops", __name__)
    if name not in _HOME:
        raise AttributeError(f"module 'deepreg_fast' has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
