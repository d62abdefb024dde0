"""Natural images without a download, from the scikit-image wheel."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import NamedTuple

import torch

from .. import checks
from ..errors import DataError
from .folder import ImageSet
from .images import load_image, pair

TRAIN_PICTURES = (
    "astronaut.png",
    "brick.png",
    "coins.png",
    "grass.png",
    "gravel.png",
    "moon.png",
    "motorcycle_left.png",
    "rocket.jpg",
)
HELD_OUT_PICTURES = ("camera.png", "chelsea.png", "coffee.png")
COLOR_PICTURES = ("astronaut.png", "motorcycle_left.png", "rocket.jpg", "chelsea.png", "coffee.png")
"""Those of both lists that are in color."""


class EmbeddedImages(NamedTuple):
    """Training and held-out crops, from different photographs."""

    train: ImageSet
    held_out: ImageSet


def embedded_images(
    size: int | tuple[int, int], train_crops: int = 9, held_out_crops: int = 2, color: bool = False
) -> EmbeddedImages:
    """Crops of eight training and three held-out photographs of scikit-image. The crops are always the same.

    A photograph is first halved by averaging 2x2 pixels if it is then still at least twice as large as the crop in each
    direction: the originals are soft at full size, and a small crop then shows more of the scene. The crops lie on an
    even grid around the center, and overlap if the photograph is small.

    Parameters
    ----------
    size
        Height and width of the crops, an integer or a pair; at most 300x384, the smallest extents of the photographs.
    train_crops, held_out_crops
        Crops per photograph. Crop `i` of `camera.png` is named `camera-i`.
    color
        Crops in color, of the three training and two held-out photographs that are in color, instead of gray ones.

    Raises
    ------
    DataError
        If scikit-image or one of its photographs is not installed, or a photograph is smaller than `size`.
    """
    pair(size)
    train_crops = checks.integer(train_crops, "train_crops", 1)
    held_out_crops = checks.integer(held_out_crops, "held_out_crops", 1)
    folder = _folder()
    return EmbeddedImages(
        *(
            _crop_all(folder, tuple(p for p in pictures if p in COLOR_PICTURES or not color), size, crops, color)
            for pictures, crops in ((TRAIN_PICTURES, train_crops), (HELD_OUT_PICTURES, held_out_crops))
        )
    )


def _folder() -> Path:
    """The data folder of the installed scikit-image, found without importing it."""
    spec = importlib.util.find_spec("skimage")
    if spec is None or spec.origin is None:
        raise DataError(
            "Expected scikit-image, whose wheel carries the embedded images, but it is not installed; "
            "run `pip install scikit-image` or name a folder of images."
        )
    return Path(spec.origin).parent / "data"


def _crop_all(
    folder: Path, pictures: tuple[str, ...], size: int | tuple[int, int], crops: int, color: bool
) -> ImageSet:
    height, width = pair(size)
    names: list[str] = []
    images: list[torch.Tensor] = []
    for picture in pictures:
        image = load_image(folder / picture, color=color)
        h, w = image.shape[-2:]
        if h < height or w < width:
            raise DataError(
                f"Expected a size within the embedded images, but {height}x{width} came and {picture} has {h}x{w} "
                "pixels; take a smaller size or a folder of larger images."
            )
        if h // 2 >= 2 * height and w // 2 >= 2 * width:
            image = torch.nn.functional.avg_pool2d(image[None], 2)[0]
        for i, (top, left) in enumerate(_corners(image, height, width, crops)):
            names.append(f"{picture.rpartition('.')[0]}-{i}")
            images.append(image[:, top : top + height, left : left + width])
    return ImageSet(tuple(names), torch.stack(images))


def _corners(image: torch.Tensor, height: int, width: int, crops: int) -> list[tuple[int, int]]:
    """Top left corners of the crops: the first `crops` cells of an even grid, row by row; the center for one crop."""
    rows = math.isqrt(crops)
    columns = math.ceil(crops / rows)
    tops = _spread(image.shape[-2] - height, math.ceil(crops / columns))
    lefts = _spread(image.shape[-1] - width, columns)
    return [(top, left) for top in tops for left in lefts][:crops]


def _spread(room: int, count: int) -> list[int]:
    """The midpoints of `count` equal parts of `[0, room]`."""
    return [(2 * i + 1) * room // (2 * count) for i in range(count)]
