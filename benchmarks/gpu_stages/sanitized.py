"""What compute-sanitizer watches: every product of small structurally random matrices, of even and odd sides."""

from __future__ import annotations

import sys

import torch


def main() -> None:
    """Run them once each and wait."""
    import deepreg_fast as dr

    device = "cpu" if "--dry-run" in sys.argv else "cuda"
    for transform, shapes in (
        ("dct", ((1, 24, 20), (1, 45, 33), (1, 180, 180))),
        ("hadamard", ((1, 24, 20), (1, 12, 28))),
        ("walsh", ((1, 32, 32), (1, 64, 48), (1, 128, 128))),
    ):
        for shape in shapes:
            for randomizer in ("sign", "permutation", "both"):
                A = dr.SRM(shape, 0.3, transform=transform, randomizer=randomizer).to(device)
                x = torch.rand((2, *shape), device=device)
                y = A.A(x)
                gamma = torch.rand(2, device=device)
                answers = (y, A.A_adjoint(y), A.normal(x), A.prox_l2(x, y, gamma), A.shifted_inverse(x, gamma))
                assert all(bool(torch.isfinite(a).all()) for a in answers)
    print("every product ran")


if __name__ == "__main__":
    main()
