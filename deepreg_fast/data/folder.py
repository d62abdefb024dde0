"""A folder of images as one tensor, and splits of its names into training and test."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import torch

from .. import checks
from ..errors import DataError, InputError
from ..files import name_bytes, portable
from .images import SUFFIXES, Size, load_image


@dataclass(frozen=True)
class ImageSet:
    """Named images of one shape: `names` (length N) and `x` `[N, C, H, W]`, float32 in [0, 1]."""

    names: tuple[str, ...]
    x: torch.Tensor

    def __post_init__(self) -> None:
        checks.images(self.x)
        if len(self.names) != len(self.x):
            raise InputError(
                f"An ImageSet needs one name per image, but {len(self.names)} names came for {len(self.x)} images."
            )
        if len(set(self.names)) != len(self.names):
            raise InputError("An ImageSet needs names that differ, but some name came twice; rename the images.")

    def __len__(self) -> int:
        return len(self.names)

    @property
    def shape(self) -> tuple[int, int, int]:
        """`(C, H, W)` of every image."""
        c, h, w = self.x.shape[1:]
        return c, h, w

    def subset(self, names: Iterable[str]) -> ImageSet:
        """The images with these names, in this order.

        Raises
        ------
        DataError
            If a name is not in the set.
        """
        names = tuple(names)
        index = {name: i for i, name in enumerate(self.names)}
        for name in names:
            if name not in index:
                raise DataError(f"Expected names of this image set, but {name!r} is not among its {len(self)} images.")
        return ImageSet(names, self.x[[index[name] for name in names]])


@dataclass(frozen=True)
class Split:
    """File names of the training and the test images, which are disjoint."""

    train: tuple[str, ...]
    test: tuple[str, ...]


def load_folder(
    path: str | os.PathLike[str],
    size: Size = None,
    names: Sequence[str] | None = None,
    option: str = "size",
    color: bool = False,
) -> ImageSet:
    """Read the images of a folder (without subfolders), sorted by name, as one `ImageSet`.

    Parameters
    ----------
    path
        The folder. Hidden files and files without an image suffix are ignored.
    size
        Take the center crop of this size from every image (`center_crop`); None if all have the same shape.
    names
        Read only these files, in this order.
    option
        Name of the option that sets the size, for error messages.
    color
        Read colors instead of gray values (`load_image`).

    Raises
    ------
    DataError
        If the folder is missing or contains no image, a named file is missing, a file is damaged or too small,
        or the shapes differ and `size` is None.
    """
    folder = Path(path)
    chosen, images = load_images(folder, size, names, option, color)
    for name, image in zip(chosen, images, strict=True):
        if image.shape != images[0].shape:
            first, other = (f"{t.shape[1]}x{t.shape[2]}" for t in (images[0], image))
            raise DataError(
                f"Expected images of one shape in {folder}, but {chosen[0]} has {first} pixels and {name} has {other}; "
                f"give a {option} to take the center crop of each."
            )
    return ImageSet(chosen, torch.stack(images))


def load_images(
    path: str | os.PathLike[str],
    size: Size = None,
    names: Sequence[str] | None = None,
    option: str = "size",
    color: bool = False,
) -> tuple[tuple[str, ...], list[torch.Tensor]]:
    """Names and images `[C, H, W]` of a folder, read as by `load_folder`. Shapes may differ.

    Raises
    ------
    DataError
        As in `load_folder`, except for shapes.
    """
    folder = Path(path)
    files = image_names(folder)
    chosen = files if names is None else _known(folder, files, names)
    return chosen, [load_image(folder / name, size, option, color) for name in chosen]


def image_names(path: str | os.PathLike[str]) -> tuple[str, ...]:
    """The names of the image files in a folder, sorted by their portable form (`files.portable`), so that the order
    does not depend on the Unicode form that a system stores.

    Raises
    ------
    DataError
        If the folder is missing, is not a folder, cannot be read, or contains no image.
    """
    folder = Path(path)
    if not folder.exists():
        raise DataError(
            f"There is no data folder {folder}; name a folder of images, or fetch one with `deepreg-fast data bsd400`."
        )
    try:
        names = sorted(
            (
                f.name
                for f in folder.iterdir()
                if f.suffix.lower() in SUFFIXES and not f.name.startswith(".") and f.is_file()
            ),
            key=lambda name: (portable(name), name),
        )
    except OSError as error:
        raise DataError(f"Expected a folder that can be read, but {folder} is not one ({error.strerror}).") from error
    if not names:
        raise DataError(f"Expected images ({', '.join(SUFFIXES)}) in {folder}, but it holds none; name another folder.")
    return tuple(names)


def load_split(path: str | os.PathLike[str]) -> Split:
    """Read a JSON split file, `{"train": ["a.png", ...], "test": ["b.png", ...]}`; `"bsd400"` is the shipped one.

    Raises
    ------
    DataError
        If the file is missing or not such a JSON object, or if a name is not a plain file name or is duplicated.
    """
    if path == "bsd400":
        return bsd400_split()
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"The split file {path} cannot be read ({error}); name a JSON file.") from error
    return _parse_split(text, str(path))


def bsd400_split() -> Split:
    """The project's split of BSD400, shipped with the package: 370 training and 30 test images."""
    return _parse_split(_shipped_split().decode(), "bsd400_split.json")


def split_sha256(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a split file's bytes, in hexadecimal; `"bsd400"` is the shipped one.

    Raises
    ------
    DataError
        If the file cannot be read.
    """
    try:
        return hashlib.sha256(_shipped_split() if path == "bsd400" else Path(path).read_bytes()).hexdigest()
    except OSError as error:
        raise DataError(f"The split file {path} cannot be read ({error}); name a JSON file.") from error


def _shipped_split() -> bytes:
    return resources.files("deepreg_fast.data").joinpath("bsd400_split.json").read_bytes()


def carve_validation(
    names: Sequence[str], count: int, seed: int = 0, option: str = "count"
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Split training names into `(train, validation)` with `count` validation names.

    The validation names are those with the smallest SHA-256 of `"seed:name"`, with the name in its portable form. The
    choice depends only on the set of names and the seed, not on their order, the platform or a library's random
    generator. Both results keep the order of `names`. `option` is the name of the option that sets the count, for error
    messages.

    Raises
    ------
    InputError
        If `count` is negative or leaves no training image, or a name is duplicated.
    """
    if len(set(names)) != len(names):
        raise InputError("carve_validation needs names that differ, but some name came twice.")
    count = checks.integer(count, option, 0, max(len(names) - 1, 0))
    seed = checks.integer(seed, "seed", 0)
    prefix = f"{seed}:".encode()
    ranked = sorted(names, key=lambda name: (hashlib.sha256(prefix + name_bytes(name)).digest(), name))
    chosen = set(ranked[:count])
    return tuple(n for n in names if n not in chosen), tuple(n for n in names if n in chosen)


def _known(folder: Path, found: tuple[str, ...], names: Sequence[str]) -> tuple[str, ...]:
    if not names:
        raise DataError(f"Expected the names of images in {folder}, but the list of names is empty.")
    # A list written on another system may contain a name in the other Unicode form.
    stored = {portable(name): name for name in reversed(found)} | {name: name for name in found}
    names = [stored.get(name, stored.get(portable(name), name)) for name in names]
    missing = sorted(set(names) - set(found))
    if missing:
        raise DataError(
            f"Expected {len(names)} named images in {folder}, but {len(missing)} are missing, first {missing[0]!r}; "
            "name the folder that belongs to this split, or complete it."
        )
    return tuple(names)


def _parse_split(text: str, source: str) -> Split:
    expected = 'a JSON object {"train": [names], "test": [names]}'
    try:
        data = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"Expected {expected} in the split file {source}, but it is not JSON ({error}).") from error
    if not isinstance(data, dict) or not {"train", "test"} <= data.keys():
        raise DataError(f"Expected {expected} in the split file {source}, but its keys are others; add the two lists.")
    lists = []
    for key in ("train", "test"):
        entries = data[key]
        if not isinstance(entries, list) or not all(_plain(name) for name in entries):
            raise DataError(f"Expected a list of plain file names under {key!r} in the split file {source}.")
        lists.append(tuple(entries))
    train, test = lists
    if len({*train, *test}) != len(train) + len(test):
        raise DataError(f"Expected every image once in the split file {source}, but a name comes twice; remove one.")
    return Split(train, test)


def _plain(name: object) -> bool:
    return isinstance(name, str) and name not in ("", ".", "..") and not set(name) & set("/\\\0")
