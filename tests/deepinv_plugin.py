"""`pytest -p tests.deepinv_plugin`: deepinv's own tests, unchanged, on this package's operators and regularizers.

docs/deepinv.md says how to run them. Every parametrized list of theirs that names one of their operators gets the names
in `OPERATORS` instead, `find_operator` answers to these, and `get_prior` returns a `DeepInvPrior`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import deepreg_fast as dr

from .torchvision_shim import define

define()
Size = tuple[int, int, int]


def _srm(transform: str, randomizer: str) -> Callable[[Size], dr.LinearOperator]:
    return lambda size: dr.SRM(size, ratio=0.5, transform=transform, randomizer=randomizer, seed=0)


def _kernel(h: int, w: int) -> torch.Tensor:
    k = torch.rand(h, w, generator=torch.Generator().manual_seed(0))
    # A large center, so that the pseudo-inverse exists in float32.
    k[h // 2, w // 2] += h * w
    return k / k.sum()


def _mask(size: Size) -> torch.Tensor:
    return torch.rand(size, generator=torch.Generator().manual_seed(0)) < 0.5


OPERATORS: dict[str, Callable[[Size], dr.LinearOperator]] = {
    "deepreg_srm_dct": _srm("dct", "sign"),
    "deepreg_srm_permutation": _srm("dct", "permutation"),
    "deepreg_srm_walsh": _srm("walsh", "both"),
    "deepreg_srm_hadamard": _srm("hadamard", "sign"),
    "deepreg_blur": lambda size: dr.Blur(size, _kernel(3, 5)),
    "deepreg_super_resolution": lambda size: dr.SuperResolution(size, _kernel(3, 3), 2),
    "deepreg_inpainting": lambda size: dr.Inpainting(_mask(size)),
}


def _retarget(module: Any, known: set[str]) -> None:
    """Replace, in place, each parametrized list of a module that names one of `known`."""
    for function in vars(module).values():
        for mark in getattr(function, "pytestmark", []) if callable(function) else []:
            if mark.name == "parametrize" and isinstance(mark.args[1], list) and known & set(map(str, mark.args[1])):
                mark.args[1][:] = list(OPERATORS)


def pytest_collection(session: pytest.Session) -> None:
    """Before deepinv's tests are collected; their directory is on `sys.path` since their conftest was loaded."""
    import test_optim  # type: ignore[import-not-found]
    import test_physics  # type: ignore[import-not-found]

    theirs = test_physics.find_operator

    def find_operator(name: str, device: Any, imsize: Any = None, get_physics_param: bool = False) -> Any:
        if name not in OPERATORS:
            return theirs(name, device, imsize, get_physics_param)
        size = (3, 16, 8) if imsize is None else tuple(imsize)
        A = OPERATORS[name](size)
        found = (dr.to_deepinv(A).to(device), size, A.sqnorm(), torch.float)
        return (*found, []) if get_physics_param else found

    def get_prior(name: str, device: Any = "cpu") -> Any:
        reg = dr.RED(channels=4, head="red", image_channels=3, seed=0)
        generator = torch.Generator().manual_seed(0)
        for p in reg.parameters():
            p.data.add_(0.01 * torch.randn(p.shape, generator=generator))
        return dr.DeepInvPrior(reg.to(device))

    known = {"inpainting", "deblur_valid"}
    for module in (test_physics, test_optim):
        _retarget(module, known)
        module.find_operator = find_operator
    test_physics.OPERATORS[:] = list(OPERATORS)
    test_optim.get_prior = get_prior
