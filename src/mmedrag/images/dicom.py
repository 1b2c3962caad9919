"""DICOM pixels as pictures: any common transfer syntax, windowed, upright, 8 bits.

Place in the picture: behind ``images.load_image`` (first frame) and ``data import dicom`` (all
frames). Needs the extra ``dicom``; compressed pixels are decoded by pylibjpeg and Pillow.
"""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from PIL import Image

from mmedrag.images.pixels import MAX_ASPECT, MAX_PIXELS, short_reason, square_pixels
from mmedrag.images.tones import of_frame, several, tones
from mmedrag.records import UserError

log = logging.getLogger(__name__)
MAX_FRAMES = 10_000
# ultrasound regions (PS3.3 C.8.5.5.1): RegionSpatialFormat 2D, PhysicalUnits cm
_TISSUE, _CM = 1, 3
_CORNERS = ("MinX0", "MinY0", "MaxX1", "MaxY1")
_MONOCHROME = ("MONOCHROME1", "MONOCHROME2")
_YBR = "FULL FULL_422 ICT RCT PARTIAL_420 PARTIAL_422".split()
_COLOUR = ("RGB", *(f"YBR_{kind}" for kind in _YBR), "PALETTE COLOR")


def read(data: bytes, name: str = "DICOM") -> Any:
    """The data set in a file, its preamble and file meta information present or not.

    Raises:
        UserError: not DICOM, damaged, or the extra is missing.
    """
    try:
        import pydicom
        from pydicom.uid import (
            DeflatedExplicitVRLittleEndian,
            ExplicitVRBigEndian,
            ExplicitVRLittleEndian,
            ImplicitVRLittleEndian,
        )
    except ModuleNotFoundError:
        raise UserError(f"{name}: DICOM needs the extra: pip install 'mmedrag[dicom]'") from None
    # its remarks on odd values and its traceback per failed decoder: the error says which failed
    logging.getLogger("pydicom").setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = pydicom.dcmread(io.BytesIO(data), force=True)
            found.file_meta = getattr(found, "file_meta", None) or pydicom.dataset.FileMetaDataset()
            meta = found.file_meta
            if "TransferSyntaxUID" not in meta:
                implicit, little = found.original_encoding
                explicit = ExplicitVRLittleEndian if little else ExplicitVRBigEndian
                meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else explicit
            elif meta.TransferSyntaxUID == DeflatedExplicitVRLittleEndian:
                len(found)  # inflated on reading
            empty = not len(found)
    except Exception as error:
        raise UserError(f"{name}: DICOM cannot be read: {short_reason(error)}") from None
    if empty:
        raise UserError(f"{name}: no DICOM data elements")
    return found


def frames(data: bytes, name: str = "DICOM", limit: int | None = 1) -> list[Image.Image]:
    """The first ``limit`` pictures in a DICOM file (None: all), RGB."""
    dataset = read(data, name)
    count = count_frames(dataset, name)
    return pictures(dataset, name, range(count if limit is None else min(count, limit)))


def pictures(
    dataset: Any,
    name: str,
    indices: Iterable[int],
    clean: Callable[[Image.Image], Image.Image] | None = None,
    remarks: list[str] | None = None,
) -> list[Image.Image]:
    """Frames of a data set: modality LUT, VOI LUT or window, inversion, orientation applied.

    ``clean`` is given each frame before it is turned upright: text burned into a mirrored frame
    can be read only there. ``remarks`` is filled with what the file states and its pixels
    contradict (a window off the values, an impossible HighBit); without it, that is logged.

    Raises:
        UserError: pixels that cannot be decoded; whatever ``clean`` refuses.
    """
    found: dict[str, None] = {}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return [_picture(dataset, name, index, clean, found) for index in indices]
    except (KeyboardInterrupt, SystemExit, UserError):
        raise
    except BaseException as error:  # a panic of the RLE decoder (Rust) is no Exception
        raise UserError(f"{name}: DICOM pixels cannot be decoded: {short_reason(error)}") from None
    finally:
        if remarks is not None:
            remarks += [remark for remark in found if remark not in remarks]
        for remark in found if remarks is None else ():
            log.warning("%s: %s", name, remark)


def count_frames(dataset: Any, name: str) -> int:
    """How many frames there are, after everything that can be refused without decoding.

    Raises:
        UserError: no image in it, an unusable shape, or too large.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _checked(dataset, name)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{name}: DICOM attributes cannot be read: {short_reason(error)}") from None


def _checked(dataset: Any, name: str) -> int:
    if not any(key in dataset for key in ("PixelData", "FloatPixelData", "DoubleFloatPixelData")):
        kind = str(dataset.get("Modality", "") or dataset.get("SOPClassUID", "")) or "unknown kind"
        raise UserError(f"{name}: DICOM without an image ({kind}), expected PixelData")
    rows, columns = int(dataset.get("Rows") or 0), int(dataset.get("Columns") or 0)
    if rows < 1 or columns < 1:
        raise UserError(f"{name}: Rows x Columns is {rows} x {columns}, expected at least 1 x 1")
    if rows * columns > MAX_PIXELS:
        raise UserError(f"{name}: {columns} x {rows} pixels, refused above {MAX_PIXELS:,}")
    count = int(dataset.get("NumberOfFrames") or 1)
    if not 1 <= count <= MAX_FRAMES:
        raise UserError(f"{name}: NumberOfFrames is {count}, expected 1..{MAX_FRAMES}")
    photometric = str(dataset.get("PhotometricInterpretation", ""))
    if photometric not in (*_MONOCHROME, *_COLOUR):
        known = ", ".join((*_MONOCHROME, *_COLOUR))
        raise UserError(
            f"{name}: PhotometricInterpretation is {photometric!r:.40}, expected one of {known}"
        )
    return count


def _picture(
    dataset: Any,
    name: str,
    index: int,
    clean: Callable[[Image.Image], Image.Image] | None,
    remarks: dict[str, None],
) -> Image.Image:
    pixels = tones(dataset, index, remarks)
    found = Image.fromarray(np.ascontiguousarray(pixels)).convert("RGB")
    found = clean(found) if clean else found
    height, width = _pixel_sides(dataset, index, remarks)
    found = square_pixels(found, width, height, name)
    turned = _upright(np.asarray(found), _directions(dataset, index))
    return Image.fromarray(np.ascontiguousarray(turned))


def _pixel_sides(dataset: Any, index: int, remarks: dict[str, None]) -> tuple[float, float]:
    """Height and width of a pixel, in some unit (PS3.3 10.7.1.3, C.8.5.5.1 and C.7.6.3.1.7)."""
    regions = _region_sides(dataset, remarks)
    if regions:
        return regions
    for key in ("PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing"):
        sides = _sides(of_frame(dataset, index, "PixelMeasuresSequence", key))
        if sides:
            return sides
    return _sides(dataset.get("PixelAspectRatio")) or (1.0, 1.0)


def _sides(value: Any) -> tuple[float, float] | None:
    sides = [abs(float(v)) for v in several(value)]
    return (sides[0], sides[1]) if len(sides) == 2 and all(0 < s < np.inf for s in sides) else None


def _region_sides(dataset: Any, remarks: dict[str, None]) -> tuple[float, float] | None:
    """Of the largest ultrasound region that is a picture of tissue, calibrated in cm both ways."""
    found: dict[tuple[float, float], float] = {}
    for region in dataset.get("SequenceOfUltrasoundRegions") or []:
        units = [region.get(f"PhysicalUnits{way}Direction") for way in "XY"]
        sides = _sides([region.get(f"PhysicalDelta{way}") or 0 for way in "YX"])
        if region.get("RegionSpatialFormat") == _TISSUE and units == [_CM, _CM] and sides:
            ends = [float(region.get(f"RegionLocation{end}") or 0) for end in _CORNERS]
            area = abs((ends[2] - ends[0]) * (ends[3] - ends[1]))
            found[sides] = found.get(sides, 0.0) + area
    if not found:
        return None
    chosen = max(found, key=lambda sides: found[sides])
    ratio = chosen[0] / chosen[1]
    if not 1 / MAX_ASPECT <= ratio <= MAX_ASPECT:
        remarks[f"ultrasound pixels of {chosen[1]:g} x {chosen[0]:g} cm: ignored"] = None
        return None
    if any(abs(high / wide / ratio - 1) > 0.01 for high, wide in found):
        remarks["ultrasound regions have pixels of several shapes: the largest region's count"] = (
            None
        )
    return chosen


def _directions(dataset: Any, index: int) -> tuple[str, str]:
    """Where the rows and the columns run: letters of L R P A H F, or "" where unknown."""
    cosines = of_frame(dataset, index, "PlaneOrientationSequence", "ImageOrientationPatient")
    if cosines is not None and len(cosines) == 6:
        axes = np.asarray([float(c) for c in cosines]).reshape(2, 3)
        letters = [("LR", "PA", "HF")[int(np.abs(axis).argmax())] for axis in axes]
        row, column = (
            pair[0] if axis[int(np.abs(axis).argmax())] > 0 else pair[1]
            for pair, axis in zip(letters, axes, strict=True)
        )
        return row, column
    letters = dataset.get("PatientOrientation")
    if letters is None or isinstance(letters, str) or len(letters) != 2:
        return "", ""
    return str(letters[0])[:1].upper(), str(letters[1])[:1].upper()


def _upright(pixels: np.ndarray, directions: tuple[str, str]) -> np.ndarray:
    """As films are read: rows run to the patient's left (or back), columns down to the feet
    (or, in axial slices, to the back)."""
    row, column = directions
    if not row or not column or {row, column} - set("LRPAHF"):
        return pixels
    if row in "HF" and column not in "HF" or (row in "PA" and column in "LR"):
        pixels, row, column = np.swapaxes(pixels, 0, 1), column, row
    if column == "H" or (column == "A" and row in "LR"):
        pixels = pixels[::-1]
    if row == "R":
        pixels = pixels[:, ::-1]
    return pixels
