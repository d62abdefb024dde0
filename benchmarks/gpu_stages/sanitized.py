"""Program for compute-sanitizer: runs every kernel of the conv chain, the solvers and the SRM on small images."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch


def main() -> None:
    """Run each group once and wait for the device."""
    mode = sys.argv[1]
    if mode == "stand-in":
        from gpu_stages import stand_in

        stand_in.install()
    device = "cuda" if mode == "gpu" else "cpu"
    groups: dict[str, Callable[[], object]] = {
        "chain pixel": lambda: _chain(device, "pixel"),
        "SRM": lambda: _operators(device, mode),
        "chain none": lambda: _chain(device, "none"),
        "chain image": lambda: _chain(device, "image"),
        "solvers": lambda: _solvers(device),
    }
    for name, f in groups.items():
        f()
        if mode == "gpu":
            torch.cuda.synchronize()
        print(f"ran {name}", flush=True)


def _network(device: str, norm: str) -> Any:
    import deepreg_fast as dr

    return dr.RED(16, 3, norm, seed=0).to(device)


def _chain(device: str, norm: str) -> None:
    """Run the conv chain with even and odd sides, and with inactive images."""
    from deepreg_fast.backend import active_images

    for rows, columns in ((16, 24), (17, 35)):
        reg, x = _network(device, norm), torch.rand(3, 1, rows, columns, device=device)
        for active in (None, torch.tensor([True, False, True], device=device)):
            with active_images(active):
                reg.value_and_grad(x)
                lin = reg.linearize(x)
                lin.hvp(x)
                lin.param_vjp(x)


def _operators(device: str, mode: str) -> None:
    import deepreg_fast as dr

    for transform, shapes in (
        ("dct", ((1, 24, 20), (1, 45, 33), (1, 180, 180))),
        ("hadamard", ((1, 24, 20), (1, 12, 28))),
        ("walsh", ((1, 32, 32), (1, 64, 48), (1, 128, 128))),
    ):
        for shape in shapes if mode != "dry" else shapes[:1]:
            A = dr.SRM(shape, 0.3, transform=transform, randomizer="both").to(device)
            x, gamma = torch.rand((2, *shape), device=device), torch.rand(2, device=device)
            y = A.A(x)
            answers = (y, A.A_adjoint(y), A.normal(x), A.prox_l2(x, y, gamma), A.shifted_inverse(x, gamma))
            if mode != "stand-in":
                assert all(bool(torch.isfinite(a).all()) for a in answers)


def _solvers(device: str) -> None:
    import deepreg_fast as dr

    reg, A = _network(device, "pixel"), dr.SRM((1, 17, 35), 0.4).to(device)
    x = torch.rand(3, 1, 17, 35, device=device)
    for acceleration in ("none", "fista", "anderson"):
        options = dr.PGDOptions(4, 1e-6, acceleration)
        for solver in (dr.CGOptions(4, 1e-6), dr.MinresOptions(4, 1e-6)):
            dr.hypergradient(x, A.A(x), A, reg, 0.1, options=options, adjoint=dr.ImplicitAdjoint(solver))


if __name__ == "__main__":
    main()
