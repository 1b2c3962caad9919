"""Stored values of a DICOM frame → tones 0 to 255: bits, padding, lookup tables, windows, colour.

Place in the picture: under ``dicom``, which lays what comes out here square and upright. What a
data set states and its pixels contradict is remarked: the keys of ``remarks`` are the lines.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mmedrag.images.pixels import scale_to_bytes

_DEEP_YBR = ("YBR_FULL", "YBR_FULL_422")
_FEW = 32  # tones of 255; a picture in fewer is hardly seen
_PALETTE = [f"{colour}PaletteColorLookupTable" for colour in ("Red", "Green", "Blue")]


def tones(dataset: Any, index: int, remarks: dict[str, None]) -> np.ndarray:
    """A frame as it is shown, not yet turned: uint8 [H, W] or [H, W, 3]."""
    from pydicom.pixels import apply_color_lut

    raw, words = _stored(dataset, index, remarks)
    photometric = str(dataset.PhotometricInterpretation)
    if photometric == "PALETTE COLOR":
        for descriptor in filter(None, (dataset.get(f"{name}Descriptor") for name in _PALETTE)):
            descriptor[2] = 8 if descriptor[2] <= 8 else 16  # what pydicom knows, and the standard
        colours = apply_color_lut(raw, dataset)
        return (colours >> max(0, _palette_bits(dataset, colours) - 8)).astype(np.uint8)
    if raw.ndim == 3:
        return scale_to_bytes(raw if int(dataset.BitsStored) > 8 else raw.astype(np.uint8))
    valid = _not_padding(raw, words, dataset, remarks)
    return _grey(raw, valid, dataset, index, photometric == "MONOCHROME1", remarks)


def _stored(dataset: Any, index: int, remarks: dict[str, None]) -> tuple[np.ndarray, np.ndarray]:
    """Pixel values of a frame, and the whole words they were stored in (PS3.5 §8.1.1).

    pydicom takes the lowest BitsStored bits; a HighBit above them (allowed until 2014) says that
    they lie higher. One that is impossible is ignored, as dcmtk does. YBR_FULL becomes RGB.
    """
    from pydicom.pixels import pixel_array
    from pydicom.uid import RLELossless

    allocated = int(dataset.BitsAllocated)
    stored = int(dataset.get("BitsStored", allocated))
    high = int(dataset.get("HighBit", stored - 1))
    photometric = str(dataset.PhotometricInterpretation)
    deep_ybr = allocated > 8 and photometric in _DEEP_YBR  # of bytes pydicom itself makes RGB
    syntax = dataset.file_meta.TransferSyntaxUID
    whole = "PixelData" in dataset and (not syntax.is_compressed or syntax == RLELossless)
    fits = allocated in (8, 16, 32) and stored <= allocated
    if not whole or not fits or (photometric.startswith("YBR") and not deep_ybr):
        raw = pixel_array(dataset, index=index, as_rgb=not deep_ybr)
        return (_rgb_of(raw, stored) if deep_ybr else raw), raw
    words = pixel_array(dataset, index=index, bits_stored=allocated, as_rgb=not deep_ybr)
    if not stored - 1 <= high < allocated:
        remarks[f"HighBit {high} contradicts BitsStored {stored}: ignored"] = None
        high = stored - 1
    raw = words
    if stored < allocated:
        # the sign, if any, moves to the top and comes back down with the value
        bits = words.dtype.itemsize * 8
        raw = (words << (bits - 1 - high)) >> (bits - stored)
    return (_rgb_of(raw, stored) if deep_ybr else raw), words


def _rgb_of(ybr: np.ndarray, bits: int) -> np.ndarray:
    """RGB of YBR_FULL [H, W, 3] of more than 8 bits (PS3.3 C.7.6.3.1.2, ITU-T T.871 §7)."""
    half, full = 1 << bits - 1, (1 << bits) - 1
    y, blue, red = np.moveaxis(ybr.astype(np.float32), -1, 0)
    blue, red = blue - half, red - half
    rgb = [y + 1.402 * red, y - 0.344136 * blue - 0.714136 * red, y + 1.772 * blue]
    return np.round(np.clip(np.stack(rgb, axis=-1), 0, full)).astype(ybr.dtype)


def _palette_bits(dataset: Any, colours: np.ndarray) -> int:
    """How many bits the entries of the palette really have; the descriptor may state 16.

    A palette of 16 bits whose brightest entry needs no more than 12 would be all but black.
    """
    if colours.dtype == np.uint8:
        return 8
    tables = [dataset.get(f"{name}Data") for name in _PALETTE]
    top = int(colours.max(initial=0))
    if all(isinstance(table, bytes) for table in tables):  # else in segments: what is used counts
        entries = [np.frombuffer(t[: len(t) // 2 * 2], _words(dataset)) for t in tables]
        top = max(int(e.max(initial=0)) for e in entries)
    return next((bits for bits in (8, 10, 12) if top < 1 << bits), 16)


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


def of_frame(dataset: Any, index: int, sequence: str, key: str) -> Any:
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


def several(value: Any) -> list[Any]:
    """The values of an element, none to many."""
    if value is None or isinstance(value, (str, bytes)):
        return [value] if value else []
    return list(value) if hasattr(value, "__len__") else [value]


def _first(value: Any) -> Any:
    """Of several values the first; None where there is none."""
    return next(iter(several(value)), None)


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
        slope = of_frame(dataset, index, "PixelValueTransformationSequence", "RescaleSlope")
        shift = of_frame(dataset, index, "PixelValueTransformationSequence", "RescaleIntercept")
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
    values' own range is shown, where all that the bits can hold would have few tones in it, or it
    misses values that spread wider than itself. A frame of few tones is remarked either way.
    """
    seen = values[valid & np.isfinite(values)]
    low, high = (float(seen.min()), float(seen.max())) if seen.size else (0.0, 1.0)
    own = (values - low) / ((high - low) or 1.0)
    windows = _windows(dataset, index)
    if not windows:
        return own

    def count(window: tuple[float, float, str], *ends: float) -> float:
        """Tones of 255 between two values."""
        return float(np.ptp(np.clip(_window(np.array(ends), *window), 0, 1))) * 255

    sound = [window for window in windows if count(window, *possible) >= _FEW]
    known = sound or windows
    window = next((w for w in known if low == high or count(w, low, high) >= 1), known[0])
    (centre, width, _), found = window, count(window, low, high)
    if low == high or found >= _FEW:
        return _window(values, *window)
    wrong = not sound or (found < 1 and high - low >= width)
    what = "is off the values" if found < 1 else f"has {found:.0f} of 255 tones for the values"
    done = f"the frame is shown {'without' if found < 1 else 'with little'} contrast"
    done = "their own range is shown" if wrong else done
    remarks[f"window {centre:g} ± {width / 2:g} {what} {low:g} to {high:g}: {done}"] = None
    return own if wrong else _window(values, *window)


def _windows(dataset: Any, index: int) -> list[tuple[float, float, str]]:
    """All usable windows of a frame: centre, width, function."""
    centres, widths = (
        of_frame(dataset, index, "FrameVOILUTSequence", key)
        for key in ("WindowCenter", "WindowWidth")
    )
    function = str(of_frame(dataset, index, "FrameVOILUTSequence", "VOILUTFunction") or "")
    pairs = zip(several(centres), several(widths), strict=False)
    return [(float(c), float(w), function) for c, w in pairs if np.isfinite(c) and 0 < w < np.inf]


def _window(values: np.ndarray, centre: float, width: float, function: str) -> np.ndarray:
    """Window centre and width → 0..1 (PS3.3 C.11.2.1.2 and C.11.2.1.3)."""
    if function == "SIGMOID":
        return 1.0 / (1.0 + np.exp(np.clip(-4.0 * (values - centre) / width, -60, 60)))
    if function == "LINEAR_EXACT" or width <= 1:
        return (values - centre) / width + 0.5
    return (values - (centre - 0.5)) / (width - 1.0) + 0.5
