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

from mmedrag.images.pixels import MAX_PIXELS, short_reason
from mmedrag.records import UserError

MAX_FRAMES = 10_000
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
) -> list[Image.Image]:
    """Frames of a data set: modality LUT, VOI LUT or window, inversion, orientation applied.

    ``clean`` is given each frame before it is turned upright: text burned into a mirrored frame
    can be read only there.

    Raises:
        UserError: pixels that cannot be decoded; whatever ``clean`` refuses.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return [_picture(dataset, index, clean) for index in indices]
    except (KeyboardInterrupt, SystemExit, UserError):
        raise
    except BaseException as error:  # a panic of the RLE decoder (Rust) is no Exception
        raise UserError(f"{name}: DICOM pixels cannot be decoded: {short_reason(error)}") from None


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
    dataset: Any, index: int, clean: Callable[[Image.Image], Image.Image] | None
) -> Image.Image:
    from pydicom.pixels import apply_color_lut, pixel_array

    raw = pixel_array(dataset, index=index)
    photometric = str(dataset.PhotometricInterpretation)
    if photometric == "PALETTE COLOR":
        raw = apply_color_lut(raw, dataset)
        pixels = (raw >> 8 if raw.dtype == np.uint16 else raw).astype(np.uint8)
    elif raw.ndim == 3:
        spare = max(0, int(dataset.BitsStored) - 8)
        pixels = (raw >> spare if raw.dtype != np.uint8 else raw).astype(np.uint8)
    else:
        pixels = _grey(raw, dataset, index, photometric == "MONOCHROME1")
    found = Image.fromarray(np.ascontiguousarray(pixels)).convert("RGB")
    found = clean(found) if clean else found
    turned = _upright(np.asarray(found), _directions(dataset, index))
    return Image.fromarray(np.ascontiguousarray(turned))


def _of_frame(dataset: Any, index: int, sequence: str, key: str) -> Any:
    """A value of the frame's functional group, else the shared one, else the data set's own."""
    groups = []
    per_frame = dataset.get("PerFrameFunctionalGroupsSequence")
    if per_frame and index < len(per_frame):
        groups.append(per_frame[index])
    groups += list(dataset.get("SharedFunctionalGroupsSequence") or [])
    for group in groups:
        for item in group.get(sequence) or []:
            if item.get(key) is not None:
                return item.get(key)
    return dataset.get(key)


def _first(value: Any) -> Any:
    """Of several values (windows) the first; None where there is none."""
    if value is None or isinstance(value, (str, bytes)):
        return value or None
    try:
        return value[0] if len(value) else None
    except TypeError:
        return value


def _grey(raw: np.ndarray, dataset: Any, index: int, inverted: bool) -> np.ndarray:
    """Stored values → shown values 0..255 (PS3.3 C.11.1 modality LUT, C.11.2 VOI LUT)."""
    from pydicom.pixels import apply_modality_lut, apply_voi_lut

    if raw.dtype == bool or (raw.max(initial=0) <= 1 and int(dataset.get("BitsStored", 8)) == 1):
        shown = raw.astype(np.float64)
    else:
        padding = dataset.get("PixelPaddingValue")
        valid = raw != padding if isinstance(padding, int) else np.ones(raw.shape, dtype=bool)
        slope = _of_frame(dataset, index, "PixelValueTransformationSequence", "RescaleSlope")
        shift = _of_frame(dataset, index, "PixelValueTransformationSequence", "RescaleIntercept")
        if dataset.get("ModalityLUTSequence"):
            values = np.asarray(apply_modality_lut(raw, dataset), dtype=np.float64)
        else:
            values = raw.astype(np.float64) * float(slope or 1) + float(shift or 0)
        centre = _first(_of_frame(dataset, index, "FrameVOILUTSequence", "WindowCenter"))
        width = _first(_of_frame(dataset, index, "FrameVOILUTSequence", "WindowWidth"))
        if dataset.get("VOILUTSequence"):
            table = np.asarray(apply_voi_lut(values.astype(np.int64), dataset), dtype=np.float64)
            bits = int(dataset.VOILUTSequence[0].LUTDescriptor[2])
            shown = table / float((1 << bits) - 1)
        elif centre is not None and width is not None and float(width) > 0:
            function = str(_of_frame(dataset, index, "FrameVOILUTSequence", "VOILUTFunction") or "")
            shown = _window(values, float(centre), float(width), function)
        else:
            seen = values[valid & np.isfinite(values)]
            low, high = (seen.min(), seen.max()) if seen.size else (0.0, 1.0)
            shown = (values - low) / ((high - low) or 1.0)
        shown = np.where(valid, np.nan_to_num(shown), 1.0 if inverted else 0.0)
    if inverted or str(dataset.get("PresentationLUTShape", "")) == "INVERSE":
        shown = 1.0 - shown
    return np.round(np.clip(shown, 0.0, 1.0) * 255).astype(np.uint8)


def _window(values: np.ndarray, centre: float, width: float, function: str) -> np.ndarray:
    """Window centre and width → 0..1 (PS3.3 C.11.2.1.2 and C.11.2.1.3)."""
    if function == "SIGMOID":
        return 1.0 / (1.0 + np.exp(np.clip(-4.0 * (values - centre) / width, -60, 60)))
    if function == "LINEAR_EXACT" or width <= 1:
        return (values - centre) / width + 0.5
    return (values - (centre - 0.5)) / (width - 1.0) + 0.5


def _directions(dataset: Any, index: int) -> tuple[str, str]:
    """Where the rows and the columns run: letters of L R P A H F, or "" where unknown."""
    cosines = _of_frame(dataset, index, "PlaneOrientationSequence", "ImageOrientationPatient")
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
