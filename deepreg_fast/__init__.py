"""deepreg-fast: learned regularizers, trained bi-level.

`xhat = argmin_x 1/(2 sigma^2) ||y - A x||^2 + lam r_theta(x)`, with `theta` and `lam` trained through `xhat`.
Importing this package computes and builds nothing; names are imported on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._version import __version__

_HOME = {
    "SRM": "operators",
    "Identity": "operators",
    "Blur": "operators",
    "SuperResolution": "operators",
    "Inpainting": "operators",
    "Demosaicing": "operators",
    "FourierSampling": "operators",
    "Tomography": "operators",
    "MRI": "operators",
    "Stack": "operators",
    "LinearOperator": "operators",
    "RED": "regularizers",
    "Ridge": "regularizers",
    "Sum": "regularizers",
    "ICNN": "regularizers",
    "TV": "regularizers",
    "DenoiserField": "regularizers",
    "EnergyRegularizer": "regularizers",
    "PerChannel": "regularizers",
    "Luma": "regularizers",
    "RealImag": "regularizers",
    "Magnitude": "regularizers",
    "Regularizer": "regularizers",
    "PGDOptions": "solvers",
    "Solution": "solvers",
    "recover": "inverse.recovery",
    "hypergradient": "inverse.hypergradient",
    "ImplicitAdjoint": "inverse.adjoint",
    "JacobianFree": "inverse.adjoint",
    "Unrolled": "inverse.adjoint",
    "Hypergradient": "inverse.hypergradient",
    "beta_hat": "regularizers.lipschitz",
    "spectrum": "regularizers.lipschitz",
    "cg": "solvers",
    "minres": "solvers",
    "CGOptions": "solvers",
    "MinresOptions": "solvers",
    "save": "weights.io",
    "load": "weights.io",
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
    "add_noise": "inverse.data_term",
    "mu_with_noise": "inverse.data_term",
    "psnr": "evaluation.metrics",
    "ssim": "evaluation.metrics",
    "from_deepinv": "adapters.deepinv",
    "to_deepinv": "adapters.deepinv",
    "DeepInvPrior": "adapters.deepinv",
    "RecoverModel": "adapters.deepinv",
    "load_peer": "adapters.peers",
}

__all__ = ["__version__", "ops", *_HOME]  # pyright: ignore[reportUnsupportedDunderAll]

if TYPE_CHECKING:
    from . import ops
    from .adapters.deepinv import DeepInvPrior, RecoverModel, from_deepinv, to_deepinv
    from .adapters.peers import load_peer
    from .backend import backends, gpu_options, release_graphs, use_backend
    from .evaluation.metrics import psnr, ssim
    from .inverse.adjoint import ImplicitAdjoint, JacobianFree, Unrolled
    from .inverse.data_term import add_noise, mu_with_noise
    from .inverse.hypergradient import Hypergradient, hypergradient
    from .inverse.recovery import recover
    from .operators import (
        MRI,
        SRM,
        Blur,
        Demosaicing,
        FourierSampling,
        Identity,
        Inpainting,
        LinearOperator,
        Stack,
        SuperResolution,
        Tomography,
    )
    from .regularizers import (
        ICNN,
        RED,
        TV,
        DenoiserField,
        EnergyRegularizer,
        Luma,
        Magnitude,
        PerChannel,
        RealImag,
        Regularizer,
        Ridge,
        Sum,
    )
    from .regularizers.lipschitz import beta_hat, spectrum
    from .solvers import CGOptions, MinresOptions, PGDOptions, Solution, cg, minres
    from .status import Status
    from .training import (
        AdversarialTrainer,
        BaselineConfig,
        BilevelConfig,
        BilevelTrainer,
        DenoiserTrainer,
        GradientStepTrainer,
    )
    from .weights.io import load, save


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
