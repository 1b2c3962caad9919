"""Pictures of more than 8 bits per channel that Pillow would cut down: PNG, PPM and TIFF samples.

Place in the picture: behind ``files.decode_image``. Pillow has no mode for colour beyond 8 bits: it
keeps the upper byte, and 12 bits of film in a 16-bit file come out black. Of TIFF it drops the sign
of samples and, beyond 8 bits, PhotometricInterpretation (TIFF 6.0, sections 3, 14, 16, 18 and 19).
"""

from __future__ import annotations

import io
import math
import struct
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image, ImageFile, ImagePalette, TiffImagePlugin

from mmedrag.images.pixels import MAX_PIXELS, check_size, picture_from_array
from mmedrag.records import UserError

# Pillow's raw mode of a 16-bit PNG -> the two that give upper and lower bytes
_HALVES = {"RGB;16B": ("RGB;16B", "RGB;16L"), "RGBA;16B": ("RGBA;16B", "RGBA;16L")}
_BYTES_OF_TWO = "LA;16B"  # grey and alpha: four bytes, read as such under the raw mode RGBA
TIFF_HEADS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB, _PALETTE, _CMYK = 0, 1, 2, 3, 5
_COLOURS = {_WHITE_IS_ZERO: 1, _BLACK_IS_ZERO: 1, _RGB: 3, _CMYK: 4}
_KINDS = {1: "u", 2: "i", 3: "f", 4: "u"}
# what turns a segment into its bytes; JPEG and fax codes belong to 8 bits and 1
_BYTE_CODES = {1: "none", 5: "LZW", 8: "Deflate", 32773: "PackBits", 32946: "Deflate"} | {
    34925: "LZMA",
    50000: "Zstandard",
}


def on_black(
    colour: np.ndarray, alpha: np.ndarray | None, name: str, inverted: bool = False
) -> Image.Image:
    """RGB of samples [H, W] or [H, W, 3] scaled by the range of what is visible, on black.

    Args:
        alpha: [H, W], 0 (not seen) to 1; None: all is seen. inverted: the lowest value is white.
    """
    if alpha is None:
        shown = np.asarray(picture_from_array(colour, name))
    else:
        within = colour[alpha > 0] if (alpha > 0).any() else colour
        shown = np.asarray(picture_from_array(np.clip(colour, within.min(), within.max()), name))
    if inverted:
        shown = 255 - shown
    if alpha is not None:
        shown = np.round(shown * alpha[..., None]).astype(np.uint8)
    return Image.fromarray(shown)


def png(data: bytes, opened: Image.Image, name: str) -> Image.Image | None:
    """A PNG of 16 bits per channel, not yet turned; None: Pillow reads it whole."""
    assert isinstance(opened, ImageFile.ImageFile)
    mode = opened.tile[0].args
    mode = mode[0] if isinstance(mode, tuple) else str(mode)
    hidden = opened.info.get("transparency")
    if mode == "I;16B" and isinstance(hidden, int):
        grey = np.asarray(opened)
        return on_black(grey, (grey != hidden).astype(np.float64), name)
    if mode == _BYTES_OF_TWO:
        four = _as(data, "RGBA").astype(np.uint16)
        both = four[..., ::2] << 8 | four[..., 1::2]
        return on_black(both[..., 0], both[..., 1] / 65535, name)
    if mode not in _HALVES:
        return None
    upper, lower = (_as(data, half).astype(np.uint16) for half in _HALVES[mode])
    whole = upper << 8 | lower
    alpha = None
    if mode == "RGBA;16B":
        alpha = whole[..., 3] / 65535
    elif isinstance(hidden, tuple):
        alpha = (whole != np.asarray(hidden)).any(axis=2).astype(np.float64)
    return on_black(whole[..., :3], alpha, name)


def _as(data: bytes, mode: str) -> np.ndarray:
    """The samples that Pillow's PNG decoder unpacks under another raw mode: [H, W, 3 or 4]."""
    with Image.open(io.BytesIO(data), formats=("PNG",)) as opened:
        opened.tile = [opened.tile[0]._replace(args=mode)]
        return np.array(opened)


def ppm(data: bytes, opened: Image.Image, name: str) -> Image.Image | None:
    """A colour PPM whose largest value is above 255; None: Pillow reads it whole."""
    assert isinstance(opened, ImageFile.ImageFile)
    tile = opened.tile[0]
    largest = tile.args[-1] if isinstance(tile.args, tuple) else 255
    if opened.mode != "RGB" or not isinstance(largest, int) or largest <= 255:
        return None
    count = opened.width * opened.height * 3
    if tile.codec_name == "ppm_plain":
        words = data[tile.offset :].split(maxsplit=count)[:count]
        samples = np.array([int(word) for word in words], dtype=np.uint16)
    else:
        whole = data[tile.offset :][: 2 * count]
        samples = np.frombuffer(whole, ">u2", len(whole) // 2).astype(np.uint16)
    if len(samples) < count:
        raise UserError(f"{name}: image is truncated: {len(samples):,} of {count:,} samples")
    return on_black(samples.reshape(opened.height, opened.width, 3), None, name)


@dataclass(frozen=True)
class Tiff:
    """The first picture of a TIFF: its tags, by number, as the specification names them."""

    tags: TiffImagePlugin.ImageFileDirectory_v2
    end: Literal["<", ">"]

    @classmethod
    def of(cls, data: bytes) -> Tiff:
        """The first directory. Raises whatever Pillow does at damaged bytes."""
        head = data[: 16 if 43 in data[2:4] else 8]
        tags = TiffImagePlugin.ImageFileDirectory_v2(head)
        reader = io.BytesIO(data)
        reader.seek(tags.next)
        tags.load(reader)
        return cls(tags, "<" if data[:2] == b"II" else ">")

    def number(self, tag: int, default: int) -> int:
        value = self.tags.get(tag, default)
        return int(value[0] if isinstance(value, tuple) else value)

    def numbers(self, tag: int) -> list[int]:
        value = self.tags.get(tag, ())
        return [int(v) for v in value] if isinstance(value, tuple) else [int(value)]

    @property
    def size(self) -> tuple[int, int]:
        return self.number(256, 0), self.number(257, 0)

    @property
    def samples(self) -> int:
        return self.number(277, 1)

    @property
    def bits(self) -> int:
        return max(self.numbers(258) or [1])

    @property
    def photometric(self) -> int:
        """PhotometricInterpretation; where it is missing, as libtiff guesses."""
        return self.number(262, _RGB if self.samples >= 3 else _BLACK_IS_ZERO)

    @property
    def deep(self) -> bool:
        """Grey, RGB or CMYK samples that Pillow cuts, misreads or does not know."""
        plain = self.bits <= 8 and self.number(339, 1) in (1, 4)
        return self.photometric in _COLOURS and not (plain and self.inks == 1)

    @property
    def inks(self) -> int:
        """InkSet: 1 is CMYK, 2 other inks."""
        return self.number(332, 1) if self.photometric == _CMYK else 1

    @property
    def palette(self) -> ImagePalette.ImagePalette | None:
        """The colours of a ColorMap whose 16-bit entries hold 8 bits, as libtiff takes them."""
        entries = self.numbers(320) if self.photometric == _PALETTE else []
        narrow = entries and max(entries) < 256
        return ImagePalette.raw("RGB;L", bytes(entries)) if narrow else None

    @property
    def kind(self) -> str:
        """What decides how it is read, for an error."""
        bits = "/".join(map(str, self.numbers(258)[:4])) or "1"
        return (
            f"PhotometricInterpretation {self.photometric}, BitsPerSample {bits}, "
            f"SampleFormat {self.number(339, 1)}, Compression {self.number(259, 1)}"
        )

    def sample_type(self, name: str) -> np.dtype:
        """Type of one sample in native order.

        Raises:
            UserError: complex, mixed or odd sizes.
        """
        sizes, formats = set(self.numbers(258)), set(self.numbers(339))
        letter = _KINDS.get(self.number(339, 1), "")
        packed = letter == "u" and self.bits < 16
        known = self.bits in (16, 32, 64) or (letter == "i" and self.bits == 8) or packed
        if not letter or not known or len(sizes) > 1 or len(formats) > 1:
            raise UserError(f"{name}: TIFF of {self.kind}: samples of this kind are not read")
        return np.dtype("u2" if packed else f"{letter}{self.bits // 8}")


def tiff(data: bytes, header: Tiff, name: str) -> Image.Image:
    """A deep grey, RGB or CMYK TIFF, not yet turned: any layout, byte order, sign and sample size.

    Alpha is laid on black; channels beyond the photometric ones are left out.

    Raises:
        UserError: a kind that is not read, too large, or truncated.
    """
    check_size(header.size, name)
    pixels = _tiff_samples(data, header, name)
    colours, sign = _COLOURS[header.photometric], pixels.dtype.kind
    if header.samples < colours or header.inks != 1:
        raise UserError(
            f"{name}: TIFF of {header.kind}, {header.samples} samples, expected {colours}"
            + (" of cyan, magenta, yellow and black" if header.inks != 1 else "")
        )
    full = 1.0 if sign == "f" else float((1 << header.bits - (sign == "i")) - 1)
    colour = pixels[..., 0] if colours == 1 else pixels[..., :colours]
    if header.photometric == _CMYK:
        paper = 1 - colour / np.float32(full)  # what the inks leave, as Pillow does it for bytes
        colour = paper[..., :3] * paper[..., 3:]
    extra = header.numbers(338)
    alpha = None
    # 1: already multiplied by its alpha, as it lies on black; 2: not yet
    if header.samples > colours and extra[:1] == [2]:
        alpha = np.clip(pixels[..., colours].astype(np.float64) / full, 0, 1)
    return on_black(colour, alpha, name, inverted=header.photometric == _WHITE_IS_ZERO)


def _tiff_samples(data: bytes, header: Tiff, name: str) -> np.ndarray:
    """All samples of the first picture: [H, W, samples]."""
    kind, (width, height), samples = header.sample_type(name), header.size, header.samples
    code = header.number(259, 1)
    if code not in _BYTE_CODES:
        known = ", ".join(dict.fromkeys(_BYTE_CODES.values()))
        raise UserError(f"{name}: TIFF of {header.kind}: beyond 8 bits expected {known}")
    if width * height * samples * kind.itemsize > 8 * MAX_PIXELS:
        raise UserError(f"{name}: {width} x {height} x {samples} samples of {kind}, refused")
    tiled = 324 in header.tags
    across, down = (header.number(322, 0), header.number(323, 0)) if tiled else (width, 0)
    if not tiled:
        down = min(header.number(278, height) or height, height)
    offsets, sizes = header.numbers(324 if tiled else 273), header.numbers(325 if tiled else 279)
    if across < 1 or down < 1:
        raise UserError(f"{name}: TIFF tiles of {across} x {down}, expected at least 1 x 1")
    planes = samples if header.number(284, 1) == 2 else 1
    columns, rows = math.ceil(width / across), math.ceil(height / down)
    if code == 1 and not sizes and planes * rows * columns == 1:
        sizes = [len(data)]
    if min(len(offsets), len(sizes)) < planes * rows * columns:
        raise UserError(f"{name}: TIFF is truncated: {len(offsets)} of its strips or tiles")
    found = np.zeros((height, width, samples), dtype=kind)
    for number in range(planes * rows * columns):
        plane, place = divmod(number, rows * columns)
        top, left = place // columns * down, place % columns * across
        tall = down if tiled else min(down, height - top)
        shape = (tall, across, samples if planes == 1 else 1)
        if shape[0] * shape[1] * shape[2] * kind.itemsize > 8 * MAX_PIXELS:
            raise UserError(f"{name}: TIFF tiles of {across} x {down}, refused")
        coded = data[offsets[number] : offsets[number] + sizes[number]]
        part = _segment(coded, header, shape, kind, name)
        part = part[: height - top, : width - left]
        into = found[top : top + len(part), left : left + part.shape[1]]
        into[..., plane : plane + shape[2]] = part
    return found


def _segment(
    coded: bytes, header: Tiff, shape: tuple[int, int, int], kind: np.dtype, name: str
) -> np.ndarray:
    """One strip or tile: [rows, columns, samples] in native order, its predictor undone."""
    rows, columns, samples = shape
    stride = (columns * samples * header.bits + 7) // 8
    if header.number(266, 1) == 2:  # FillOrder: the lowest bit of a byte comes first
        coded = np.packbits(np.unpackbits(np.frombuffer(coded, "u1"), bitorder="little")).tobytes()
    code, predictor = header.number(259, 1), header.number(317, 1)
    plain = coded if code == 1 else _expand(coded, code, rows * stride)
    if len(plain) < rows * stride:
        raise UserError(f"{name}: TIFF is truncated: a strip or tile ends early")
    lines = np.frombuffer(plain, "u1", rows * stride).reshape(rows, stride)
    if predictor == 3 and kind.kind == "f":  # bytes by significance, each the difference (TIFF TN3)
        steps = lines.reshape(rows, -1, samples)
        summed = np.cumsum(steps, axis=1, dtype="u1").reshape(rows, kind.itemsize, -1)
        whole = np.ascontiguousarray(summed.swapaxes(1, 2)).view(kind.newbyteorder(">"))
        return whole.reshape(shape).astype(kind)
    if predictor not in (1, 2) or (predictor == 2 and header.bits % 8):
        raise UserError(f"{name}: TIFF of {header.kind}: Predictor {predictor} is not read")
    if header.bits % 8:
        bits = np.unpackbits(lines, axis=1)[:, : columns * samples * header.bits]
        places = (1 << np.arange(header.bits)[::-1]).astype(np.uint16)
        return (bits.reshape(rows, columns, samples, -1) * places).sum(-1, dtype=np.uint16)
    whole = lines.view(kind.newbyteorder(header.end)).reshape(shape).astype(kind)
    if predictor == 2:
        bare = np.dtype(f"u{kind.itemsize}")
        whole = np.cumsum(whole.view(bare), axis=1, dtype=bare).view(kind)
    return whole


def _expand(coded: bytes, code: int, size: int) -> bytes:
    """``size`` bytes from a segment, by libtiff: as the one row of an 8-bit TIFF around it."""
    tags = {256: size, 257: 1, 258: 8, 259: code, 262: 1, 273: 8, 277: 1, 278: 1, 279: len(coded)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    at = 8 + len(coded) + len(coded) % 2
    head = b"II*\0" + struct.pack("<I", at) + coded.ljust(at - 8, b"\0")
    file = head + struct.pack("<H", len(tags)) + entries + bytes(4)
    with Image.open(io.BytesIO(file), formats=("TIFF",)) as opened:
        return opened.tobytes()
