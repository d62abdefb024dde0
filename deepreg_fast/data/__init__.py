"""Images: files, folders, BSD400, the embedded photographs, and the paper's augmentation."""

from .augment import AUGMENTATIONS, augment
from .bsd400 import BASE_URL, bsd400_registry, download_bsd400, is_bsd400
from .embedded import EmbeddedImages, embedded_images
from .folder import (
    ImageSet,
    Split,
    bsd400_split,
    carve_validation,
    image_names,
    load_folder,
    load_images,
    load_split,
    split_sha256,
)
from .images import MAX_PIXELS, center_crop, load_image, npy, png, save_image

__all__ = [
    "AUGMENTATIONS",
    "BASE_URL",
    "MAX_PIXELS",
    "EmbeddedImages",
    "ImageSet",
    "Split",
    "augment",
    "bsd400_registry",
    "bsd400_split",
    "carve_validation",
    "center_crop",
    "download_bsd400",
    "embedded_images",
    "image_names",
    "is_bsd400",
    "load_folder",
    "load_image",
    "load_images",
    "load_split",
    "npy",
    "png",
    "save_image",
    "split_sha256",
]
