"""BSD400: the 400 gray 180x180 training images of the denoising literature, fetched with a checksum for each.

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
"""Seconds without an answer after which a download counts as failed."""


def bsd400_registry() -> dict[str, str]:
    """SHA-256 of each of the 400 files, by file name."""
    file = resources.files("deepreg_fast.data").joinpath("bsd400_sha256.json")
    return json.loads(file.read_text(encoding="utf-8"))


def is_bsd400(folder: str | os.PathLike[str]) -> bool:
    """Whether the folder's images have the 400 names of BSD400, and no other is among them."""
    return set(image_names(folder)) == set(bsd400_registry())


def download_bsd400(
    folder: str | os.PathLike[str],
    base_url: str = BASE_URL,
    registry: Mapping[str, str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Fetch BSD400 into `folder`, about 8 MB in 400 files, and return the folder.

    Each file is written under another name, compared with its SHA-256 and then renamed, so a file in the folder under
    its own name is a good one. Files that are there and good are not fetched again: after an interruption, call again.

    Parameters
    ----------
    folder
        Where the files go; made if it is missing.
    base_url
        The folder they come from, for a mirror.
    registry
        SHA-256 by file name; by default `bsd400_registry()`.
    progress
        Called as `progress(done, total)` before the first and after every file.

    Raises
    ------
    DataError
        If the folder cannot be written, a server does not answer or lacks a file, or a checksum differs. What was
        fetched until then stays.
    """
    import pooch  # here, not above: `import deepreg_fast` needs no downloader.

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
    logger.setLevel("WARNING")  # one line per file would bury the progress bar
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

    again = "what was fetched is kept, so run the same command again"
    try:
        # pooch names the arguments of its own downloader otherwise than its Downloader type does
        source.fetch(name, downloader=pooch.HTTPDownloader(timeout=TIMEOUT))  # type: ignore[arg-type]
    except requests.RequestException as error:
        raise DataError(
            f"Expected {name} from {source.base_url}, but the download failed ({error}); check the network, or name a "
            f"mirror: {again}."
        ) from error
    except OSError as error:
        raise DataError(
            f"{name} cannot be written to {folder} ({error.strerror or error}); make room or name another folder: "
            f"{again}."
        ) from error
    except ValueError as error:  # pooch's word for a hash that differs; the file was not kept
        raise DataError(
            f"Expected {name} with the SHA-256 {source.registry[name]}, but what {source.base_url} sent has another "
            "and was thrown away; the source has changed or the transfer was damaged: try again or name a mirror."
        ) from error
