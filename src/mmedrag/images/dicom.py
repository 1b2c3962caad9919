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

from mmedrag.images.pixels import MAX_PIXELS, scale_to_bytes, short_reason, square_pixels
from mmedrag.records import UserError

log = logging.getLogger(__name__)
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
    from pydicom.pixels import apply_color_lut

    raw, words = _stored(dataset, index, remarks)
    photometric = str(dataset.PhotometricInterpretation)
    if photometric == "PALETTE COLOR":
        raw = apply_color_lut(raw, dataset)
        # the descriptor may state 16 bits where the entries have 8
        spare = max(0, _palette_bits(dataset, raw) - 8)
        pixels = (raw >> spare).astype(np.uint8)
    elif raw.ndim == 3:
        pixels = scale_to_bytes(raw if int(dataset.BitsStored) > 8 else raw.astype(np.uint8))
    else:
        valid = _not_padding(raw, words, dataset, remarks)
        pixels = _grey(raw, valid, dataset, index, photometric == "MONOCHROME1", remarks)
    found = Image.fromarray(np.ascontiguousarray(pixels)).convert("RGB")
    found = clean(found) if clean else found
    height, width = _pixel_sides(dataset, index)
    found = square_pixels(found, width, height, name)
    turned = _upright(np.asarray(found), _directions(dataset, index))
    return Image.fromarray(np.ascontiguousarray(turned))


def _stored(dataset: Any, index: int, remarks: dict[str, None]) -> tuple[np.ndarray, np.ndarray]:
    """Pixel values of a frame, and the whole words they were stored in (PS3.5 §8.1.1).

    pydicom takes the lowest BitsStored bits; a HighBit above them (allowed until 2014) says that
    they lie higher. One that is impossible is ignored, as dcmtk does.
    """
    from pydicom.pixels import pixel_array

    allocated = int(dataset.BitsAllocated)
    stored = int(dataset.get("BitsStored", allocated))
    high = int(dataset.get("HighBit", stored - 1))
    native = not dataset.file_meta.TransferSyntaxUID.is_compressed
    whole = "PixelData" in dataset and allocated in (8, 16, 32) and stored <= allocated
    mixed = str(dataset.PhotometricInterpretation).startswith("YBR")
    if not native or not whole or mixed:
        raw = pixel_array(dataset, index=index)
        return raw, raw
    words = pixel_array(dataset, index=index, bits_stored=allocated)
    if not stored - 1 <= high < allocated:
        remarks[f"HighBit {high} contradicts BitsStored {stored}: ignored"] = None
        high = stored - 1
    if stored == allocated:
        return words, words
    # the sign, if any, moves to the top and comes back down with the value
    bits = words.dtype.itemsize * 8
    return (words << (bits - 1 - high)) >> (bits - stored), words


def _palette_bits(dataset: Any, colours: np.ndarray) -> int:
    """How many bits the entries of the palette really have: 8, or up to 16."""
    if colours.dtype == np.uint8:
        return 8
    stated = int(dataset.RedPaletteColorLookupTableDescriptor[2])
    keys = [f"{c}PaletteColorLookupTableData" for c in ("Red", "Green", "Blue")]
    tables = [dataset.get(key) for key in keys]
    if stated <= 8 or not all(isinstance(table, bytes) for table in tables):
        return 16 if colours.max(initial=0) > 255 else 8
    entries = [np.frombuffer(t[: len(t) // 2 * 2], _words(dataset)) for t in tables]
    return 16 if max(int(e.max(initial=0)) for e in entries) > 255 else 8


def _not_padding(
    raw: np.ndarray, words: np.ndarray, dataset: Any, remarks: dict[str, None]
) -> np.ndarray:
    """Where there is a picture: neither PixelPaddingValue nor up to its RangeLimit (C.7.5.1.1.2).

    Both may be written with the sign that the pixels do not have: they are taken by their bits.
    """
    seen = np.ones(raw.shape, dtype=bool)
    if raw.dtype.kind == "f":
        for key in ("FloatPixelPaddingValue", "DoubleFloatPixelPaddingValue"):
            ends = [dataset.get(key), dataset.get(key.replace("Value", "RangeLimit"))]
            if ends[0] is not None:
                low, high = sorted(
                    float(e) for e in (ends[0], ends[0] if ends[1] is None else ends[1])
                )
                seen &= ~((raw >= low) & (raw <= high))
        return seen
    padding = _first(dataset.get("PixelPaddingValue"))
    limit = _first(dataset.get("PixelPaddingRangeLimit"))
    if not isinstance(padding, int) or raw.dtype == bool:
        return seen
    ends = [padding, limit if isinstance(limit, int) else padding]
    stored, signed = int(dataset.BitsStored), int(dataset.get("PixelRepresentation", 0)) == 1
    for values, bits in ((words, words.dtype.itemsize * 8), (raw, stored)):
        # a value that BitsStored cannot hold is one of whole words only
        if all(-(1 << bits - 1) <= end < 1 << bits for end in ends):
            low, high = sorted(_wrapped(end, bits, signed) for end in ends)
            seen &= ~((values >= low) & (values <= high))
    if not seen.any() and raw.min() != raw.max():
        remarks["PixelPaddingValue covers every pixel: ignored"] = None
        return ~seen
    return seen


def _wrapped(value: int, bits: int, signed: bool) -> int:
    """The number that the lowest ``bits`` of ``value`` stand for."""
    rest = value & (1 << bits) - 1
    return rest - (1 << bits) if signed and rest >> bits - 1 else rest


def _words(dataset: Any) -> str:
    """numpy's name of a 16-bit word in the data set's byte order."""
    return "<u2" if dataset.file_meta.TransferSyntaxUID.is_little_endian else ">u2"


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


def _several(value: Any) -> list[Any]:
    """The values of an element, none to many."""
    if value is None or isinstance(value, (str, bytes)):
        return [value] if value else []
    return list(value) if hasattr(value, "__len__") else [value]


def _first(value: Any) -> Any:
    """Of several values the first; None where there is none."""
    return next(iter(_several(value)), None)


def _grey(
    raw: np.ndarray,
    valid: np.ndarray,
    dataset: Any,
    index: int,
    inverted: bool,
    remarks: dict[str, None],
) -> np.ndarray:
    """Stored values → shown values 0..255 (PS3.3 C.11.1 modality LUT, C.11.2 VOI LUT)."""
    if raw.dtype == bool or (raw.max(initial=0) <= 1 and int(dataset.get("BitsStored", 8)) == 1):
        shown = raw.astype(np.float64)
    else:
        slope = _of_frame(dataset, index, "PixelValueTransformationSequence", "RescaleSlope")
        shift = _of_frame(dataset, index, "PixelValueTransformationSequence", "RescaleIntercept")
        if dataset.get("ModalityLUTSequence"):
            table, first, _ = _table(dataset.ModalityLUTSequence[0], dataset, raw)
            values = table[np.clip(raw.astype(np.int64) - first, 0, len(table) - 1)]
            values = values.astype(np.float64)
            possible = float(table.min()), float(table.max())
        else:
            values = raw.astype(np.float64) * float(slope or 1) + float(shift or 0)
            ends = [e * float(slope or 1) + float(shift or 0) for e in _possible(raw, dataset)]
            possible = min(ends), max(ends)
        if dataset.get("VOILUTSequence"):
            shown = _voi(values, dataset)
        else:
            shown = _windowed(values, valid, possible, dataset, index, remarks)
        shown = np.where(valid, np.nan_to_num(shown), 1.0 if inverted else 0.0)
    if inverted or str(dataset.get("PresentationLUTShape", "")) == "INVERSE":
        shown = 1.0 - shown
    return np.round(np.clip(shown, 0.0, 1.0) * 255).astype(np.uint8)


def _possible(raw: np.ndarray, dataset: Any) -> tuple[float, float]:
    """The smallest and the largest value that the stored bits can hold."""
    if raw.dtype.kind == "f":
        return float("-inf"), float("inf")
    stored = int(dataset.BitsStored)
    signed = int(dataset.get("PixelRepresentation", 0)) == 1
    return (-(1 << stored - 1), (1 << stored - 1) - 1) if signed else (0, (1 << stored) - 1)


def _table(item: Any, dataset: Any, values: np.ndarray) -> tuple[np.ndarray, int, int]:
    """A lookup table as it is, whatever its descriptor states: (entries, first value, bits).

    Raises:
        ValueError: no entries.
    """
    count, first, bits = (int(v) for v in item.LUTDescriptor)
    count = (count & 0xFFFF) or 1 << 16
    data = item.get("LUTData")
    if isinstance(data, bytes):
        entries = np.frombuffer(data[: len(data) // 2 * 2], _words(dataset)).astype("<u2")
        # fewer words than stated: 8-bit entries, two in a word, or a table that is cut short.
        # Read wrongly, either goes up and down all the time
        pairs = entries.view("u1")
        fits = bits <= 8 or count <= len(pairs) <= count + 1
        if len(entries) < count and fits and _rough(pairs) < 2 * _rough(entries):
            entries = pairs
    else:
        found = data if data is not None else []
        entries = np.atleast_1d(np.asarray(found, dtype=np.int64) & 0xFFFF)
    if not len(entries):
        raise ValueError("LUTData is empty")
    # the first value may be written with the sign that the values do not have
    low, high, other = float(values.min()), float(values.max()), first - (1 << 16)
    if first > 0x7FFF and high < first and low < other + len(entries):
        first = other
    elif first < 0 and low >= first + (1 << 16):
        first += 1 << 16
    return entries[:count], first, bits


def _rough(entries: np.ndarray) -> float:
    """The way that a table goes up and down, in units of its range; 1 for one that only rises."""
    way = np.abs(np.diff(entries.astype(np.int64))).sum()
    return float(way) / (int(np.ptp(entries)) or 1)


def _voi(values: np.ndarray, dataset: Any) -> np.ndarray:
    """Values through the first VOI LUT → 0..1 of the range that its entries have.

    That is what the descriptor states, unless the largest entry needs more or fewer bits (12 bits
    of film declared as 16): then it is the table's own range.
    """
    table, first, bits = _table(dataset.VOILUTSequence[0], dataset, values)
    found = table[np.clip(np.nan_to_num(values).astype(np.int64) - first, 0, len(table) - 1)]
    low, high = 0.0, float((1 << min(max(bits, 1), 16)) - 1)
    if not high / 2 < table.max() <= high:
        low, high = float(table.min()), float(table.max())
    return (found - low) / ((high - low) or 1.0)


def _windowed(
    values: np.ndarray,
    valid: np.ndarray,
    possible: tuple[float, float],
    dataset: Any,
    index: int,
    remarks: dict[str, None],
) -> np.ndarray:
    """Values → 0..1 by the first window that shows anything, or by their own range.

    A window can miss every value of a frame and be right (air above a head). It is wrong, and the
    values' own range is shown, where it lies off all that the bits can hold or misses values
    that spread wider than itself. Either way this is remarked.
    """
    seen = values[valid & np.isfinite(values)]
    low, high = (float(seen.min()), float(seen.max())) if seen.size else (0.0, 1.0)
    own = (values - low) / ((high - low) or 1.0)
    windows = _windows(dataset, index)
    for centre, width, function in windows:
        ends = np.clip(_window(np.array([low, high]), centre, width, function), 0, 1)
        if low == high or np.ptp(ends) * 255 >= 1:
            return _window(values, centre, width, function)
    if not windows:
        return own
    centre, width, function = windows[0]
    reach = np.clip(_window(np.array(possible), centre, width, function), 0, 1)
    wrong = np.ptp(reach) * 255 < 1 or high - low >= width
    done = "their own range is shown" if wrong else "the frame is shown without contrast"
    remarks[f"window {centre:g} ± {width / 2:g} is off the values {low:g} to {high:g}: {done}"] = (
        None
    )
    return own if wrong else _window(values, centre, width, function)


def _windows(dataset: Any, index: int) -> list[tuple[float, float, str]]:
    """All usable windows of a frame: centre, width, function."""
    centres, widths = (
        _of_frame(dataset, index, "FrameVOILUTSequence", key)
        for key in ("WindowCenter", "WindowWidth")
    )
    function = str(_of_frame(dataset, index, "FrameVOILUTSequence", "VOILUTFunction") or "")
    pairs = zip(_several(centres), _several(widths), strict=False)
    return [(float(c), float(w), function) for c, w in pairs if np.isfinite(c) and 0 < w < np.inf]


def _pixel_sides(dataset: Any, index: int) -> tuple[float, float]:
    """Height and width of a pixel, in some unit (PS3.3 10.7.1.3 and C.7.6.3.1.7)."""
    for key in ("PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing"):
        sides = [
            float(v) for v in _several(_of_frame(dataset, index, "PixelMeasuresSequence", key))
        ]
        if len(sides) == 2 and all(0 < side < np.inf for side in sides):
            return sides[0], sides[1]
    sides = [float(v) for v in _several(dataset.get("PixelAspectRatio"))]
    if len(sides) == 2 and all(0 < side < np.inf for side in sides):
        return sides[0], sides[1]
    return 1.0, 1.0


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
