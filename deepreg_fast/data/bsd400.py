"""BSD400: the 400 gray 180x180 training images of the denoising literature, downloaded and verified by checksum.

The images come from the Berkeley Segmentation Dataset (Martin, Fowlkes, Tal, Malik 2001; for research use) in the form
that Zhang et al. distribute with the training code of DnCNN (IEEE TIP 2017). They are not part of this package.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import DataError
from .folder import image_names

if TYPE_CHECKING:
    import pooch

BASE_URL = (
    "https://raw.githubusercontent.com/cszn/DnCNN/e93b27812d3ff523a3a79d19e5e50d233d7a8d0a/"
    "TrainingCodes/DnCNN_TrainingCodes_v1.0/data/Train400/"
)
"""The upstream folder, at a fixed commit."""

TIMEOUT = 30.0
"""Seconds without a response after which a download fails."""


def bsd400_registry() -> dict[str, str]:
    """SHA-256 of the 400 files by file name."""
    file = resources.files("deepreg_fast.data").joinpath("bsd400_sha256.json")
    return json.loads(file.read_text(encoding="utf-8"))


def is_bsd400(folder: str | os.PathLike[str]) -> bool:
    """Whether the folder's images have exactly the 400 names of BSD400."""
    return set(image_names(folder)) == set(bsd400_registry())


def download_bsd400(
    folder: str | os.PathLike[str],
    base_url: str = BASE_URL,
    registry: Mapping[str, str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Download BSD400 into `folder` (about 8 MB in 400 files) and return the folder.

    Each file is written under a temporary name, verified by its SHA-256 and renamed, so every file under its final name
    is valid. Valid files are not downloaded again: after an interruption, call this function again.

    Parameters
    ----------
    folder
        Destination folder, created if missing.
    base_url
        Source folder; change it to use a mirror.
    registry
        SHA-256 by file name; by default `bsd400_registry()`.
    progress
        Called as `progress(done, total)` before the first and after every file.

    Raises
    ------
    DataError
        If the folder cannot be written, a server does not respond or lacks a file, or a checksum differs. Files that
        were already downloaded stay.
    """
    import pooch  # imported here: `import deepreg_fast` needs no downloader.

    registry = bsd400_registry() if registry is None else dict(registry)
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(
            f"The data folder {folder} cannot be made ({error.strerror}); name one you may write to."
        ) from error
    logger = pooch.get_logger()
    level = logger.level
    logger.setLevel("WARNING")  # a line per file would hide the progress bar
    try:
        source = pooch.create(path=folder, base_url=base_url.rstrip("/") + "/", registry=registry)
        for done, name in enumerate(sorted(registry)):
            if progress is not None:
                progress(done, len(registry))
            _fetch(source, name, folder)
        if progress is not None:
            progress(len(registry), len(registry))
    finally:
        logger.setLevel(level)
    return folder


def _fetch(source: pooch.Pooch, name: str, folder: Path) -> None:
    import pooch
    import requests

    remedy = "what was fetched is kept, so run the same command again"
    try:
        # The argument names of pooch's own downloader differ from those of its Downloader type.
        source.fetch(name, downloader=pooch.HTTPDownloader(timeout=TIMEOUT))  # type: ignore[arg-type]
    except requests.RequestException as error:
        raise DataError(
            f"Expected {name} from {source.base_url}, but the download failed ({error}); check the network, or name a "
            f"mirror: {remedy}."
        ) from error
    except OSError as error:
        raise DataError(
            f"{name} cannot be written to {folder} ({error.strerror or error}); make room or name another folder: "
            f"{remedy}."
        ) from error
    except ValueError as error:  # pooch raises this for a wrong hash, after deleting the file
        raise DataError(
            f"Expected {name} with the SHA-256 {source.registry[name]}, but what {source.base_url} sent has another "
            "and was thrown away; the source has changed or the transfer was damaged: try again or name a mirror."
        ) from error
