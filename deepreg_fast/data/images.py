"""Defensive image loading: one file to a float32 tensor in [0, 1], gray `[1, H, W]` or color `[3, H, W]`."""

from __future__ import annotations

import io
import os
import warnings
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps

from .. import checks
from ..errors import DataError, InputError
from ..files import replace_atomically

# Pillow's names; its PPM reader covers PGM and PPM. No other format is decoded, whatever the file's suffix.
FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "PPM", "WEBP")
SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".pgm", ".ppm", ".webp")
_FORMATS_TEXT = "PNG, JPEG, TIFF, BMP, PGM, PPM or WebP"
MAX_PIXELS = 64_000_000
"""A file whose header announces more pixels is rejected before decompression."""

_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # ITU-R BT.601
_SIXTEEN_BIT = 65535

Size = int | tuple[int, int] | None


def load_image(
    path: str | os.PathLike[str], size: Size = None, option: str = "size", color: bool = False
) -> torch.Tensor:
    """Read one image as gray values or colors, a float32 tensor in [0, 1].

    8-bit values are divided by 255 and 16-bit values by 65535; float values must lie in [0, 1]. For gray values, color
    is converted to ITU-R BT.601 luma, `0.299 R + 0.587 G + 0.114 B`, without rounding to 8 bits. Transparency is
    dropped, only the first frame is read, and the EXIF orientation is applied.

    Parameters
    ----------
    path : str or Path
        A PNG, JPEG, TIFF, BMP, PGM, PPM or WebP file, recognized by its content, not its suffix.
    size : int, pair of int, or None
        None for the whole image, `n` for the center `n x n` pixels, or `(height, width)`. Images are never scaled.
    option : str
        Name of the option that sets the size, for the error message of an image that is too small.
    color : bool
        Keep red, green and blue; the three are equal for a gray file.

    Returns
    -------
    Tensor `[1, H, W]`, or `[3, H, W]` with `color`

    Raises
    ------
    DataError
        If the file is missing, of another format, damaged, larger than `MAX_PIXELS`, or smaller than `size`.
    InputError
        If `size` is not a positive integer or a pair of them.

    Examples
    --------
    >>> import tempfile, torch
    >>> from deepreg_fast.data import load_image, save_image
    >>> path = save_image(tempfile.mkdtemp() + "/gray.png", torch.full((1, 20, 30), 0.2))
    >>> load_image(path, size=(8, 10)).shape
    torch.Size([1, 8, 10])
    """
    path = Path(path)
    if path.is_dir():
        raise DataError(f"Expected an image file, but {path} is a folder; name one file in it, or load the folder.")
    try:
        with path.open("rb") as file:
            values = _decode(file, path, color)
    except FileNotFoundError:
        raise DataError(f"There is no image file {path}; check the name and the folder.") from None
    except PermissionError as error:
        raise DataError(f"The image file {path} cannot be read ({error.strerror}); check its permissions.") from error
    return center_crop(torch.from_numpy(values), size, str(path), option)


def decode_image(text: bytes, name: str, color: bool = False) -> torch.Tensor:
    """Like `load_image` for the content of a file; `name` is for error messages."""
    return torch.from_numpy(_decode(io.BytesIO(text), Path(name), color))


def center_crop(image: torch.Tensor, size: Size, name: str = "the image", option: str = "size") -> torch.Tensor:
    """The center `height x width` pixels of an image `[..., H, W]`, from row `(H - height) // 2` and column
    `(W - width) // 2`. Images are never scaled or padded.

    Raises
    ------
    DataError
        If the image is smaller than `size`.
    """
    if size is None:
        return image
    height, width = pair(size)
    h, w = image.shape[-2:]
    if h < height or w < width:
        raise DataError(
            f"Expected images of at least {height}x{width} pixels (height x width), but {name} has {h}x{w}; "
            f"take a smaller {option} or leave this image out."
        )
    top, left = (h - height) // 2, (w - width) // 2
    return image[..., top : top + height, left : left + width].contiguous()


def pair(size: int | tuple[int, int]) -> tuple[int, int]:
    """`(height, width)` from an integer or a pair; checks that both are positive integers."""
    sides: Any = tuple(size) if isinstance(size, (tuple, list)) else (size, size)
    both = [checks.plain(n) for n in sides]
    if len(both) != 2 or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in both):
        raise InputError(f"size must be a positive integer or a pair (height, width) of them, but is {size!r}.")
    return both[0], both[1]


def save_image(path: str | os.PathLike[str], image: torch.Tensor) -> Path:
    """Write an image, clipped to [0, 1], as an 8-bit PNG; return its path.

    The image is gray, `[1, H, W]` or `[H, W]`, or color, `[3, H, W]`.

    The file is written atomically: under a temporary name, then renamed.

    Raises
    ------
    InputError
        If `image` has another shape or is not finite.
    DataError
        If the file cannot be written.
    """
    path, text = Path(path), png(image)
    try:
        replace_atomically(path, text)
    except OSError as error:
        raise DataError(
            f"The image {path} cannot be written ({error.strerror or error}); name a file in a folder that exists "
            "and that you may write to."
        ) from error
    return path


def png(image: torch.Tensor) -> bytes:
    """The bytes of the 8-bit PNG that `save_image` writes.

    Raises
    ------
    InputError
        If `image` has another shape or is not finite.
    """
    values = image.detach().cpu()
    is_image = values.ndim == 2 or (values.ndim == 3 and values.shape[0] in (1, 3))
    if not is_image or not bool(torch.isfinite(values).all()):
        raise InputError(
            f"Expected a finite image, gray [1, H, W] or [H, W] or color [3, H, W], but a tensor of shape "
            f"{list(image.shape)} came{' with NaN or infinite pixels' if is_image else ''}; write one image at a time."
        )
    if values.ndim == 3:
        values = values[0] if values.shape[0] == 1 else values.permute(1, 2, 0)
    pixels = (values.double().clamp(0, 1) * 255).round().to(torch.uint8).contiguous().numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def npy(image: torch.Tensor) -> bytes:
    """The bytes of a .npy file with an image in float32."""
    buffer = io.BytesIO()
    np.save(buffer, image.float().numpy(), allow_pickle=False)
    return buffer.getvalue()


def _decode(file: BinaryIO, path: Path, color: bool) -> np.ndarray:
    """Float32 values `[1, H, W]` or `[3, H, W]` of an open file; any damage raises a `DataError`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns about size and odd metadata; the size is checked below.
            with Image.open(file, formats=FORMATS) as image:
                _refuse_bomb(image.size, path)
                image.verify()  # For PNG, verifies the checksum of every chunk; decoding alone does not.
            file.seek(0)
            with Image.open(file, formats=FORMATS) as image:
                image.load()
                image = _upright(image)
                return _colors(image, path) if color else _gray(image, path)[None]
    except DataError:
        raise
    except Image.DecompressionBombError:
        raise _bomb(path) from None
    except Image.UnidentifiedImageError:
        raise DataError(
            f"Expected an image as {_FORMATS_TEXT}, but {path} is none of these, or is damaged; convert it to PNG."
        ) from None
    except Exception as error:  # Pillow's decoders raise nearly any error type on damaged files
        raise DataError(
            f"Expected a whole image, but {path} is truncated or damaged ({error}); fetch or export it again."
        ) from error


def _upright(image: Image.Image) -> Image.Image:
    """Apply the image's EXIF orientation; a damaged tag is ignored."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # Pillow's tag readers raise nearly any error type as well
        return image


def _refuse_bomb(size: tuple[int, int], path: Path) -> None:
    if size[0] * size[1] > MAX_PIXELS:
        raise _bomb(path)


def _bomb(path: Path) -> DataError:
    return DataError(
        f"Expected at most {MAX_PIXELS:,} pixels, but {path} announces more and would fill the memory "
        "(a decompression bomb?); crop it first."
    )


def _has_color(image: Image.Image) -> bool:
    return not (image.mode in ("1", "L", "LA", "La", "F") or image.mode.startswith("I"))


def _colors(image: Image.Image, path: Path) -> np.ndarray:
    """`[3, H, W]`."""
    if not _has_color(image):
        return np.repeat(_gray(image, path)[None], 3, 0)
    rgb = np.asarray(image.convert("RGB"), dtype=np.float32)
    return np.ascontiguousarray(rgb.transpose(2, 0, 1) / 255)


def _gray(image: Image.Image, path: Path) -> np.ndarray:
    """`[H, W]`."""
    mode = image.mode
    if mode == "1" or mode in ("L", "LA", "La"):
        return np.asarray(image.convert("L"), dtype=np.float32) / 255
    if mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > _SIXTEEN_BIT:
            raise DataError(
                f"Expected 8-bit or 16-bit values, but {path} holds integers from {values.min()} to {values.max()}; "
                "convert it to a 16-bit image."
            )
        return (values / _SIXTEEN_BIT).astype(np.float32)
    if mode == "F":
        floats = np.asarray(image, dtype=np.float32)
        if not (np.isfinite(floats).all() and floats.min() >= 0 and floats.max() <= 1):
            raise DataError(
                f"Expected finite float values in [0, 1], but {path} holds others (from {floats.min():g} to "
                f"{floats.max():g}); scale them to [0, 1] first."
            )
        return floats.copy()
    rgb = np.asarray(image.convert("RGB"), dtype=np.float32)
    return np.clip(rgb @ _LUMA / 255, 0, 1, dtype=np.float32)
