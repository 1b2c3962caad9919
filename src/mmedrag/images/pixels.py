"""Limits, and arrays of any number type as 8-bit pictures.

Place in the picture: below every reader of pictures (``files``, ``dicom``).
"""

from __future__ import annotations

import re

import numpy as np
from PIL import Image

from mmedrag.records import UserError

MAX_PIXELS = 100_000_000  # a 10,000 x 10,000 image; more is refused before it is decoded
MAX_ASPECT = 32.0  # of one pixel; a scan of an OCT cube reaches 24


def check_size(size: tuple[int, int], name: str) -> None:
    """Refuse a picture without pixels or with more than ``MAX_PIXELS``, before it is decoded."""
    width, height = size
    if width * height > MAX_PIXELS:
        raise UserError(
            f"{name}: {width} x {height} pixels, refused above {MAX_PIXELS:,} (decompression bomb)"
        )
    if width < 1 or height < 1:
        raise UserError(f"{name}: image has no pixels")


def short_reason(error: BaseException) -> str:
    """One line of at most 200 characters, the same in every process (no addresses in it)."""
    words = re.sub(r"<[\w.]+ object at 0x[0-9a-f]+>", "data", " ".join(str(error).split()))
    kind = f" ({type(error).__name__})"
    return f"{words[: 200 - len(kind)] or 'unknown reason'}{kind}"


def scale_to_bytes(pixels: np.ndarray) -> np.ndarray:
    """uint8 of an array of any number type: 8-bit stays, the rest is min..max → 0..255."""
    if pixels.dtype == np.uint8:
        return pixels
    if pixels.dtype == bool:
        return pixels.astype(np.uint8) * np.uint8(255)
    values = pixels.astype(np.float64)
    finite = np.isfinite(values)
    if not finite.any():
        raise ValueError("no finite pixel values")
    low, high = values[finite].min(), values[finite].max()
    if not finite.all():
        values = np.where(finite, values, low)
    return np.round((values - low) * (255.0 / (high - low or 1.0))).astype(np.uint8)


def picture_from_array(pixels: np.ndarray, name: str) -> Image.Image:
    """RGB picture of an array (H, W), (H, W, 3 or 4) or (1 or 3, H, W) of any number type."""
    pixels = np.squeeze(pixels)
    if pixels.ndim == 3 and pixels.shape[0] in (1, 3) and pixels.shape[2] not in (1, 3, 4):
        pixels = np.moveaxis(pixels, 0, 2)  # channels first, as in torch-made arrays
    if pixels.ndim not in (2, 3) or (pixels.ndim == 3 and pixels.shape[2] not in (3, 4)):
        raise UserError(f"{name}: array of shape {pixels.shape}, expected (H, W) or (H, W, 3)")
    check_size((pixels.shape[1], pixels.shape[0]), name)
    if pixels.dtype.kind not in "buif":
        raise UserError(f"{name}: array of {pixels.dtype}, expected numbers")
    try:
        # a fourth channel is alpha: it has no say in the range of the colours
        data = np.ascontiguousarray(scale_to_bytes(pixels[..., :3] if pixels.ndim == 3 else pixels))
    except ValueError as error:
        raise UserError(f"{name}: {error}") from None
    return Image.fromarray(data).convert("RGB")


def square_pixels(picture: Image.Image, across: float, down: float, name: str) -> Image.Image:
    """The picture stretched along the longer side of its pixels, so that they become square.

    Args:
        across: width of a pixel. down: its height, in the same unit; both above 0.

    Raises:
        UserError: sides that no camera has, or too large a picture.
    """
    ratio = max(across / down, down / across)
    if ratio < 1.01:
        return picture
    if ratio > MAX_ASPECT:
        raise UserError(
            f"{name}: pixels of {across:g} x {down:g} (width x height), expected sides within "
            f"{MAX_ASPECT:g} times of each other"
        )
    width, height = picture.size
    size = (round(width * ratio), height) if across > down else (width, round(height * ratio))
    check_size(size, name)
    return picture.resize(size, Image.Resampling.BICUBIC)
