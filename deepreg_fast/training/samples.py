"""The training samples: every image in each orientation, with one fixed crop.

Warm starts require a sample's crop, noise and measurements to be the same in every epoch.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from ..data import (
    AUGMENTATIONS,
    ImageSet,
    augment,
    carve_validation,
    center_crop,
    embedded_images,
    load_images,
    load_split,
)
from ..errors import DataError
from ..files import portable
from ..inverse.data_term import standard_normal
from .config import TrainConfig
from .lanes import Rows
from .placement import DeviceSamples, Placement


@dataclass(frozen=True)
class Pictures:
    """Named images `[C, H, W]`, each of its own size."""

    names: tuple[str, ...]
    x: tuple[torch.Tensor, ...]


class Samples:
    """Crops by sample number. `shape` is `(C, height, width)` of every crop."""

    def __init__(self, images: ImageSet | Pictures, crop: int, orientations: int, seed: int) -> None:
        sizes = [(int(x.shape[-2]), int(x.shape[-1])) for x in images.x]
        for name, (height, width) in zip(images.names, sizes, strict=True):
            if min(height, width) < max(1, crop):
                raise DataError(
                    f"Training crops must fit the images, but crop is {crop} and {name} is {height} x {width}; "
                    "use a smaller crop or leave this image out."
                )
        if not crop and len(set(sizes)) > 1:
            raise DataError(
                f"Whole images must be of one size, but {len(set(sizes))} sizes came; set crop to train on crops."
            )
        self.size = (crop, crop) if crop else sizes[0]
        self.shape = (int(images.x[0].shape[0]), *self.size)
        self.images, self.orientations, self.seed = images, orientations, seed
        rng = np.random.Generator(np.random.PCG64([seed, 1]))
        self.top, self.left = (self._places(rng, [n[k] for n in sizes], self.size[k]) for k in (0, 1))

    def _places(self, rng: np.random.Generator, sides: list[int], crop: int) -> np.ndarray:
        """First row or column of each sample's crop."""
        room: int | np.ndarray = sides[0] - crop + 1
        if len(set(sides)) > 1:
            room = np.repeat(np.array(sides) - crop + 1, self.orientations)
        return rng.integers(0, room, len(sides) * self.orientations)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of names and pixels: a run continues only with the images it started with. Names are hashed in their
        portable form, so a folder may move to a system with another Unicode form."""
        digest = hashlib.sha256(json.dumps([portable(n) for n in self.images.names]).encode())
        if isinstance(self.images.x, torch.Tensor):
            digest.update(self.images.x.numpy().tobytes())
        else:
            for x in self.images.x:
                digest.update(f"{list(x.shape)}".encode() + x.numpy().tobytes())
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self.top)

    def batch(self, indices: np.ndarray) -> torch.Tensor:
        """Images `[B, C, crop, crop]` of these samples."""
        out = []
        for i in indices:
            picture, k = divmod(int(i), self.orientations)
            t, s = self.top[i], self.left[i]
            out.append(augment(self.images.x[picture][None, :, t : t + self.size[0], s : s + self.size[1]], k))
        return torch.cat(out)


class PlacedSamples:
    """The crops on the device: all at once if they fit its budget, otherwise cut on the host for each batch."""

    def __init__(self, samples: Samples, owned: np.ndarray, placement: Placement) -> None:
        self.samples, self.owned, self.placement = samples, owned, placement

    @cached_property
    def table(self) -> DeviceSamples | None:
        """The crops of this process `[N, C, crop, crop]`, or None. Created at the first use, after the warm starts took
        their share of the budget."""
        count, shape = len(self.owned), self.samples.shape
        if not self.placement.take(4 * count * math.prod(shape)):
            return None
        table = DeviceSamples((count, *shape), torch.float32, self.placement.device)
        for piece in np.array_split(np.arange(count), -(-count // 64)):
            crops = self.samples.batch(self.owned[piece])
            table.put(self.placement.rows(self.owned[piece], piece), self.placement.upload(crops))
        return table

    def batch(self, rows: Rows) -> torch.Tensor:
        """Images `[B, C, crop, crop]` of these samples."""
        if self.table is None:
            return self.placement.upload(self.samples.batch(rows.samples))
        return self.table.get(rows)


class Noise:
    """Standard normal numbers `[m]` for each of `shape[0]` samples, the same in every epoch. They are generated on the
    host and stored on the device if they fit its budget."""

    def __init__(self, seed: int, shape: tuple[int, int], placement: Placement) -> None:
        self.seed, self.shape, self.placement = seed, shape, placement
        self._known = np.zeros(shape[0], bool)

    @cached_property
    def table(self) -> DeviceSamples | None:
        """The numbers generated so far `[N, m]`, or None."""
        if not self.placement.take(4 * self.shape[0] * self.shape[1]):
            return None
        return DeviceSamples(self.shape, torch.float32, self.placement.device)

    def _made(self, samples: np.ndarray) -> torch.Tensor:
        rows = [standard_normal(self.shape[1], self.seed * 1_000_003 + int(r)) for r in samples]
        return self.placement.upload(torch.stack(rows).float())

    def batch(self, rows: Rows) -> torch.Tensor:
        """The numbers `[B, m]` of these samples."""
        if self.table is None:
            return self._made(rows.samples)
        new = ~self._known[rows.local]
        if new.any():
            samples, local = rows.samples[new], rows.local[new]
            self.table.put(self.placement.rows(samples, local), self._made(samples))
            self._known[local] = True
        return self.table.get(rows)


def load_samples(config: TrainConfig) -> tuple[Samples, torch.Tensor]:
    """Training samples and validation images `[N, C, h, w]` of the configured source."""
    names, images = load_training_images(config)
    train_names, val_names = _carve(names, config)
    image_of = dict(zip(names, images, strict=True))
    train = [image_of[n] for n in train_names]
    one_shape = len({x.shape for x in train}) == 1
    pictures = (
        ImageSet(tuple(train_names), torch.stack(train)) if one_shape else Pictures(tuple(train_names), tuple(train))
    )
    val = _validation([image_of[n] for n in val_names], val_names, config)
    return Samples(pictures, config.crop, AUGMENTATIONS if config.augment else 1, config.seed), val


def _validation(images: list[torch.Tensor], names: list[str], config: TrainConfig) -> torch.Tensor:
    """The validation images `[N, C, h, w]`, cropped to `validation_crop` or to the smallest side if that is less."""
    if not images:
        return torch.zeros(0, config.image_channels, 1, 1, dtype=torch.float32, device="cpu")
    if config.validation_crop:
        side = min(config.validation_crop, *(min(x.shape[-2:]) for x in images))
        images = [center_crop(x, side) for x in images]
    for name, x in zip(names, images, strict=True):
        if x.shape != images[0].shape:
            first, other = (f"{t.shape[-2]} x {t.shape[-1]}" for t in (images[0], x))
            raise DataError(
                f"Whole validation images must be of one size, but {names[0]} is {first} and {name} is {other}; set "
                "validation_crop to validate on crops."
            )
    return torch.stack(images)


def _carve(names: tuple[str, ...], config: TrainConfig) -> tuple[list[str], list[str]]:
    """Names for training and validation. With embedded images the two never share a photograph."""
    if config.data != "embedded":
        if config.validation >= len(names):
            raise DataError(
                f"validation must leave images to train on, but is {config.validation} and {config.data} gives "
                f"{len(names)}; lower validation or add images."
            )
        train, val = carve_validation(names, config.validation, config.seed)
        return list(train), list(val)
    if config.validation == 0:
        return list(names), []
    pictures = sorted({n.rpartition("-")[0] for n in names})
    # Two of the eight photographs, or one of the three in color.
    validation_pictures = set(carve_validation(tuple(pictures), max(1, len(pictures) // 4), config.seed)[1])
    train = [n for n in names if n.rpartition("-")[0] not in validation_pictures]
    val = [n for n in names if n.rpartition("-")[0] in validation_pictures]
    if config.validation > len(val):
        raise DataError(
            f"The embedded images give at most {len(val)} validation crops, but validation is {config.validation}; "
            "lower it or name a folder of images."
        )
    # Spread over these photographs, in a fixed order.
    return train, [val[i * len(val) // config.validation] for i in range(config.validation)]


def load_training_images(config: TrainConfig) -> tuple[tuple[str, ...], Sequence[torch.Tensor]]:
    """Names and images `[C, H, W]` of the configured source, without the test part of its split."""
    if config.data == "embedded":
        images = embedded_images(max(96, config.crop, config.validation_crop), color=config.color).train
        return images.names, images.x.unbind()
    names = load_split(config.split).train if config.split else None
    return load_images(config.data, names=names, color=config.color)
