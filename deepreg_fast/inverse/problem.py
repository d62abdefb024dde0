"""Inverse problems by name, or from a file: the operator that measures images of a shape."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import checks
from ..errors import DataError, InputError
from ..operators import (
    SRM,
    Blur,
    FourierSampling,
    Identity,
    Inpainting,
    LinearOperator,
    SuperResolution,
    Tomography,
    from_description,
    gaussian_kernel,
    motion_kernel,
)
from ..problem import PROBLEMS, Problem

Shape = tuple[int, int, int]


def build_operator(problem: Problem | str, image_shape: Shape) -> LinearOperator:
    """The operator of a problem for images of a shape.

    Parameters
    ----------
    problem : Problem or str
        Or the name of a problem with default options. A name is one of `PROBLEMS`; an image file (.png, .tif, ...),
        taken as the kernel of a circular blur after division by its sum; or a .json file with the description of an
        operator without `image_shape`, such as `{"kind": "blur", "kernel": [[0.25, 0.5, 0.25]], "boundary":
        "reflect"}`. There a kernel or mask may be a list of rows, or the name of an image file next to the .json file.
    image_shape : (C, H, W)

    Returns
    -------
    LinearOperator

    Raises
    ------
    InputError
        If the name is unknown or the description does not fit.
    DataError
        If the file cannot be read.
    """
    p = Problem(problem) if isinstance(problem, str) else problem
    if p.problem == "cs":
        options = {"transform": p.transform, "randomizer": p.randomizer, "keep_dc": p.keep_dc}
        return SRM(image_shape, p.ratio, seed=p.operator_seed, **options)
    if p.problem in PROBLEMS:
        return _NAMED[p.problem](image_shape, p.operator_seed)
    path = Path(p.problem)
    if not path.is_file():
        raise InputError(
            f"problem must be one of {', '.join(PROBLEMS)}, or a .json or image file, but is {p.problem!r}, and there "
            "is no such file."
        )
    if path.suffix.lower() != ".json":
        return Blur(image_shape, _kernel(path))
    return _described(path, image_shape)


def operator_measuring(problem: Problem | str, measurement_shape: Shape) -> LinearOperator:
    """The operator of a problem whose measurements are pictures of this shape, such as a blurred photograph.

    A picture of a kernel means a blur with "valid" boundaries here: the recovered image is larger than the measurements
    by the kernel's size minus one.

    Raises
    ------
    InputError
        If the problem has no measurements of that shape.
    """
    c, h, w = measurement_shape
    name = problem if isinstance(problem, str) else problem.problem
    path = Path(name)
    if name not in PROBLEMS and path.suffix.lower() != ".json" and path.is_file():
        # Beyond the edge of a photograph there is more of the world, and not its other side.
        kernel = _kernel(path)
        return Blur((c, h + kernel.shape[0] - 1, w + kernel.shape[1] - 1), kernel, "valid")
    shapes = [(c, h, w), *((c, s * h, s * w) for s in (2, 3, 4, 6, 8))]
    for shape in shapes:
        try:
            A = build_operator(problem, shape)
        except InputError:
            if shape == shapes[-1]:
                raise
            continue
        if A.measurement_shape == measurement_shape:
            return A
        if len(A.measurement_shape) == 3 and shape == shapes[0]:
            # Valid boundaries: the image is larger than its measurements by a constant.
            grown = (c, 2 * h - A.measurement_shape[1], 2 * w - A.measurement_shape[2])
            B = build_operator(problem, grown) if min(grown) > 0 else A
            if B.measurement_shape == measurement_shape:
                return B
    raise InputError(
        f"The measurements of problem {name!r} must be a picture of {h} x {w} pixels, but no image size gives that; "
        "save the measurements with save_measurements instead."
    )


def _described(path: Path, image_shape: Shape) -> LinearOperator:
    try:
        description: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} must be a JSON file with an operator's description, but is not: {error}.") from error
    if not isinstance(description, dict):
        raise DataError(f"{path} must hold an object with the operator's kind, but holds {type(description).__name__}.")
    for name, reader in (("kernel", _kernel), ("mask", _mask)):
        value = description.get(name)
        if isinstance(value, str):
            description[name] = reader(path.parent / value)
        elif isinstance(value, list):
            description[name] = torch.tensor(value, dtype=torch.float64, device="cpu")
    mask = description.get("mask")
    if isinstance(mask, torch.Tensor) and mask.ndim == 2:
        description["mask"] = mask.expand(image_shape[0], *mask.shape)
    elif "mask" not in description:
        description.setdefault("image_shape", list(image_shape))
    A = from_description(description)
    if A.image_shape != image_shape:
        raise InputError(
            f"The operator of {path} is for images of {list(A.image_shape)}, but the images are {list(image_shape)}; "
            "crop the images, or change the file."
        )
    return A


def _kernel(path: Path) -> torch.Tensor:
    kernel = _gray(path)
    if not bool(kernel.sum() > 0):
        raise DataError(f"{path} must show a kernel that is not black, but is black.")
    return kernel / kernel.sum()


def _mask(path: Path) -> torch.Tensor:
    return _gray(path) > 0.5


def _gray(path: Path) -> torch.Tensor:
    from ..data import load_image

    return load_image(path)[0].double()


def _random_keys(count: int, seed: int) -> np.ndarray:
    """Numbers in (0, 1), the same on every platform and release of numpy."""
    raw = np.random.PCG64(np.random.SeedSequence([checks.integer(seed, "seed", 0), 7])).random_raw(count)
    return ((raw >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53


def _random_mask(shape: Shape, seed: int) -> LinearOperator:
    c, h, w = shape
    keys = _random_keys(h * w, seed)
    mask = np.zeros(h * w, dtype=bool)
    mask[np.argsort(keys, kind="stable")[: max(1, h * w // 2)]] = True
    return Inpainting(torch.from_numpy(mask).reshape(1, h, w).expand(c, h, w))


def _fourier_mask(shape: Shape, seed: int) -> LinearOperator:
    """A quarter of the frequencies: all within a radius of 0.08 of the sampling rate, the others with a probability
    that falls with the fourth power of the distance from the corner."""
    c, h, w = shape
    y, x = np.mgrid[0:h, 0:w]
    radius = np.sqrt(((y - h // 2) / h) ** 2 + ((x - w // 2) / w) ** 2)
    density = (1.0 - radius / 0.75) ** 4
    order = np.argsort(np.where(radius < 0.08, -1.0, _random_keys(h * w, seed).reshape(h, w) / density), axis=None)
    mask = np.zeros(h * w, dtype=bool)
    mask[order[: max(1, h * w // 4)]] = True
    return FourierSampling(torch.from_numpy(mask).reshape(1, h, w).expand(c, h, w))


_NAMED: dict[str, Any] = {
    "denoise": lambda shape, _: Identity(shape),
    "deblur-gaussian": lambda shape, _: Blur(shape, gaussian_kernel(25, 1.6)),
    "deblur-motion": lambda shape, _: Blur(shape, motion_kernel(30, 45)),
    "sr2": lambda shape, _: SuperResolution(shape, gaussian_kernel(25, 1.6), 2),
    "sr3": lambda shape, _: SuperResolution(shape, gaussian_kernel(25, 1.6), 3),
    "inpaint": _random_mask,
    "ct": lambda shape, _: Tomography(shape, 60),
    "fourier": _fourier_mask,
}
