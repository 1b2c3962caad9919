"""Image files of any common kind in, RGB pixels out.

Place in the picture: the left edge; every stage that looks at pixels. Readable are PNG, JPEG, TIFF,
BMP, PPM, WebP, NPZ (the array ``slo_fundus`` of Harvard-FairVLMed, or the only image-like one) and
DICOM (with the extra ``dicom``). Whatever is wrong with a file becomes one
:class:`~mmedrag.records.records.UserError` that names it.
"""

from __future__ import annotations

import io
import logging
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, TiffImagePlugin

from mmedrag.images import deep
from mmedrag.images.pixels import (
    MAX_ASPECT,
    MAX_PIXELS,
    check_size,
    picture_from_array,
    short_reason,
    square_pixels,
)
from mmedrag.records import UserError

log = logging.getLogger(__name__)
FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "PPM", "WEBP")
_TURN = 0x0112  # tag Orientation, the same in EXIF and TIFF
_TURNS = dict(
    zip(
        range(2, 9),
        (
            Image.Transpose.FLIP_LEFT_RIGHT,
            Image.Transpose.ROTATE_180,
            Image.Transpose.FLIP_TOP_BOTTOM,
            Image.Transpose.TRANSPOSE,
            Image.Transpose.ROTATE_270,
            Image.Transpose.TRANSVERSE,
            Image.Transpose.ROTATE_90,
        ),
        strict=True,
    )
)
_SWAPPED = range(5, 9)  # rows become columns
EXPECTED = "expected PNG, JPEG, TIFF, BMP, PPM, WebP, NPZ or DICOM"


def load_image(path: str | Path) -> Image.Image:
    """The picture in a file, mode ``RGB``, upright, with an empty ``info``.

    EXIF orientation is applied. Transparency is laid on black. More than 8 bits per channel
    (and signed or float samples) are scaled linearly from the picture's own minimum..maximum, one
    range for all channels, to 0..255. Pixels whose file says that they are not square are made
    so. Of several pages or frames the first is taken (``dicom.frames`` gives all of a DICOM).

    Raises:
        UserError: missing, unreadable, truncated, too large, or not an image.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: image cannot be read: {error.strerror}") from None
    return decode_image(data, str(path))


def decode_image(data: bytes, name: str = "image") -> Image.Image:
    """As :func:`load_image`, from bytes; ``name`` is what an error calls them."""
    if not data:
        raise UserError(f"{name}: image file is empty, {EXPECTED}")
    if data[:4] == b"PK\x03\x04":
        return picture_from_array(_npz(data, name), name)
    if looks_like_dicom(data) or name.lower().endswith((".dcm", ".dicom")):
        from mmedrag.images.dicom import frames  # pydicom only when a DICOM file comes

        return frames(data, name)[0]
    header: deep.Tiff | None = None
    # Whatever a decoder throws at hostile bytes (struct.error, IndexError, ...) is bad input.
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's bomb warning; the guard below is stricter
            header = deep.Tiff.of(data) if data[:4] in deep.TIFF_HEADS else None
            if header and header.deep:
                picture = deep.tiff(data, header, name)
                return _turned(
                    _squared(picture, _tiff_density(header), name), header.number(_TURN, 1)
                )
            with Image.open(io.BytesIO(data), formats=FORMATS) as opened:
                check_size(opened.size, name)
                if header and header.palette:
                    opened.palette = header.palette
                return _upright_rgb(opened, data, name)
    except UserError:
        raise
    except Image.UnidentifiedImageError:
        if header:
            raise UserError(f"{name}: TIFF of {header.kind}: this kind is not read") from None
        raise UserError(f"{name}: not an image in a known format, {EXPECTED}") from None
    except Image.DecompressionBombError:
        raise UserError(f"{name}: more than {MAX_PIXELS:,} pixels, refused") from None
    except Exception as error:
        raise UserError(f"{name}: image cannot be decoded: {short_reason(error)}") from None


def stated_size(data: bytes) -> tuple[str, tuple[int, int]]:
    """Format and (width, height) by a file's header alone; raises what Pillow does at others."""
    if data[:4] in deep.TIFF_HEADS:
        return "TIFF", deep.Tiff.of(data).size
    with Image.open(io.BytesIO(data), formats=FORMATS) as opened:
        return opened.format or "", opened.size


def looks_like_dicom(data: bytes) -> bool:
    """A part-10 preamble or, where that is missing, a plausible first element of the header.

    Group 0002 or 0008 in either byte order, then a value representation (two capitals) or, in
    the implicit encoding, a short length.
    """
    if data[128:132] == b"DICM":
        return True
    group, rest = data[:2], data[4:8]
    if len(rest) < 4 or group not in (b"\x02\0", b"\x08\0", b"\0\x02", b"\0\x08"):
        return False
    return rest[:2].isalpha() and rest[:2].isupper() or rest[2:] == b"\0\0"


def _upright_rgb(opened: Image.Image, data: bytes, name: str) -> Image.Image:
    density = _density(opened)
    reader = {"PNG": deep.png, "PPM": deep.ppm}.get(opened.format or "")
    found = reader(data, opened, name) if reader else None
    if found is None and opened.format != "TIFF":
        opened.load()  # reading EXIF may load too, and would hide that the picture is damaged
    # before Pillow turns a TIFF on loading; damaged EXIF: the picture counts as upright
    try:
        turn = int(opened.getexif().get(_TURN, 1))
    except Exception:
        turn = 1
    if found is not None:
        return _turned(_squared(found, density, name), turn)
    opened.load()
    try:
        turned = ImageOps.exif_transpose(opened)
    except Exception:
        turned = opened
    if density and turn in _SWAPPED:
        density = density[::-1]
    if turned.mode.startswith(("I", "F")):
        return _squared(picture_from_array(np.asarray(turned), name), density, name)
    if turned.has_transparency_data:
        rgba = turned.convert("RGBA")
        turned = Image.alpha_composite(Image.new("RGBA", rgba.size, (0, 0, 0, 255)), rgba)
    # a new image from the bare pixels: nothing of the old ``info`` (comments, EXIF) comes along
    rgb = turned if turned.mode == "RGB" else turned.convert("RGB")
    return _squared(Image.frombytes("RGB", rgb.size, rgb.tobytes()), density, name)


def _turned(picture: Image.Image, orientation: int) -> Image.Image:
    """Upright after EXIF's (or TIFF's) tag 274."""
    way = _TURNS.get(orientation)
    return picture if way is None else picture.transpose(way)


def _squared(picture: Image.Image, density: tuple[float, float] | None, name: str) -> Image.Image:
    return square_pixels(picture, 1 / density[0], 1 / density[1], name) if density else picture


def _density(opened: Image.Image) -> tuple[float, float] | None:
    """Pixels per length across and down, where the file states both (pHYs, JFIF, TIFF, BMP)."""
    if isinstance(opened, TiffImagePlugin.TiffImageFile):
        return _positive(opened.tag_v2.get(282), opened.tag_v2.get(283))
    # a JPEG's EXIF is lost in the stored copy, its JFIF header is not
    keys = ("jfif_density",) if opened.format in ("JPEG", "MPO") else ("aspect", "dpi")
    found = next((opened.info[key] for key in keys if key in opened.info), (None, None))
    return _positive(*found)


def _tiff_density(header: deep.Tiff) -> tuple[float, float] | None:
    return _positive(header.tags.get(282), header.tags.get(283))


def _positive(across: Any, down: Any) -> tuple[float, float] | None:
    try:
        pair = float(across), float(down)
    except (TypeError, ValueError, ZeroDivisionError):
        return None
    if not all(0 < value < float("inf") for value in pair):
        return None
    if max(pair) > MAX_ASPECT * min(pair):  # no scanner's: the header is damaged, not the pixels
        log.warning("a picture says %g x %g pixels per length: ignored", *pair)
        return None
    return pair


def _npz(data: bytes, name: str) -> np.ndarray:
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            sizes = {i.filename.removesuffix(".npy"): i.file_size for i in archive.infolist()}
        keys = ["slo_fundus"] if "slo_fundus" in sizes else sorted(sizes)
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            for key in keys:
                if sizes[key] > 8 * MAX_PIXELS:
                    raise UserError(f"{name}: array {key!r} of {sizes[key]:,} bytes, refused")
                try:
                    found = arrays[key]
                except ValueError:  # an object array: never unpickled
                    continue
                if found.ndim in (2, 3) and min(found.shape[:2]) > 1:
                    return found
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{name}: NPZ cannot be read: {short_reason(error)}") from None
    raise UserError(f"{name}: no image array in NPZ (arrays: {', '.join(sorted(sizes)) or 'none'})")
