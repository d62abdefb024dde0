"""The training samples: every image in its orientations, each with one crop that stays put.

Warm starts need the crop, the noise and the measurements of a sample to be the same at every visit.
"""

from __future__ import annotations

import hashlib
import json
from functools import cached_property

import numpy as np
import torch

from ..data import (
    AUGMENTATIONS,
    ImageSet,
    augment,
    carve_validation,
    centre_crop,
    embedded_images,
    load_folder,
    load_split,
)
from ..errors import DataError
from .config import TrainConfig


class Samples:
    """Crops by sample number, and the order in which an epoch visits them."""

    def __init__(self, images: ImageSet, crop: int, orientations: int, seed: int) -> None:
        n, _, height, width = images.x.shape
        self.size = (crop or height, crop or width)
        if min(height, width) < max(1, crop):
            raise DataError(
                f"Training crops must fit the images, but crop is {crop} and the images are {height} x {width}; "
                "use a smaller crop."
            )
        self.images, self.orientations, self.seed = images, orientations, seed
        rng = np.random.Generator(np.random.PCG64([seed, 1]))
        self.top = rng.integers(0, height - self.size[0] + 1, n * orientations)
        self.left = rng.integers(0, width - self.size[1] + 1, n * orientations)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of names and pixels: a run may only go on with the images it began with."""
        digest = hashlib.sha256(json.dumps(self.images.names).encode())
        digest.update(self.images.x.numpy().tobytes())
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self.top)

    def batch(self, indices: np.ndarray) -> torch.Tensor:
        """Images `[B, 1, crop, crop]` of these samples."""
        out = []
        for i in indices:
            picture, k = divmod(int(i), self.orientations)
            t, s = self.top[i], self.left[i]
            out.append(augment(self.images.x[picture][None, :, t : t + self.size[0], s : s + self.size[1]], k))
        return torch.cat(out)

    def indices(self, step: int, batch: int) -> np.ndarray:
        """Samples of step `step`: a function of seed and step alone, so that a resumed run goes on unchanged."""
        per_epoch = max(1, len(self) // batch)
        epoch, place = divmod(step, per_epoch)
        order = np.random.Generator(np.random.PCG64([self.seed, 2, epoch])).permutation(len(self))
        return order[place * batch : (place + 1) * batch]

    def epoch(self, step: int, batch: int) -> float:
        """Epochs done after `step` steps."""
        return step / max(1, len(self) // batch)


def load_samples(config: TrainConfig) -> tuple[Samples, torch.Tensor]:
    """Training samples and validation images `[N, 1, h, w]` of the configured source."""
    images = load_training_images(config)
    train_names, val_names = _carve(images, config)
    row = {n: i for i, n in enumerate(images.names)}
    train = ImageSet(tuple(train_names), images.x[[row[n] for n in train_names]])
    val = images.x[[row[n] for n in val_names]]
    if config.validation_crop and len(val):
        c = min(config.validation_crop, *val.shape[-2:])
        val = centre_crop(val, c).contiguous()
    return Samples(train, config.crop, AUGMENTATIONS if config.augment else 1, config.seed), val


def _carve(images: ImageSet, config: TrainConfig) -> tuple[list[str], list[str]]:
    """Names for training and validation; no embedded picture gives crops to both."""
    if config.data != "embedded":
        if config.validation >= len(images.names):
            raise DataError(
                f"validation must leave images to train on, but is {config.validation} and {config.data} gives "
                f"{len(images.names)}; lower validation or add images."
            )
        train, val = carve_validation(images.names, config.validation, config.seed)
        return list(train), list(val)
    if config.validation == 0:
        return list(images.names), []
    pictures = sorted({n.rpartition("-")[0] for n in images.names})
    kept = set(carve_validation(tuple(pictures), 2, config.seed)[1])
    train = [n for n in images.names if n.rpartition("-")[0] not in kept]
    val = [n for n in images.names if n.rpartition("-")[0] in kept]
    if config.validation > len(val):
        raise DataError(
            f"The embedded images give at most {len(val)} validation crops, but validation is {config.validation}; "
            "lower it or name a folder of images."
        )
    # Spread over both pictures, in a fixed order.
    return train, [val[i * len(val) // config.validation] for i in range(config.validation)]


def load_training_images(config: TrainConfig) -> ImageSet:
    """The images of the configured source, without the test part of its split."""
    if config.data == "embedded":
        return embedded_images(max(96, config.crop, config.validation_crop)).train
    if not config.split:
        return load_folder(config.data)
    return load_folder(config.data, names=load_split(config.split).train)
