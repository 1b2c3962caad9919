"""Copies of image files with nothing but the picture in them: no EXIF, no comment, no profile.

Place in the picture: ``data import``, which stores what it is given without its metadata.
"""

from __future__ import annotations

import io

from PIL import Image

from mmedrag.images.files import decode_image

_ORIENTATION = 0x0112  # EXIF tag


def clean_copy(data: bytes, name: str = "image") -> tuple[bytes, str, Image.Image]:
    """An image file's picture without anything else: (bytes, suffix, decoded picture).

    A JPEG that stands upright keeps its compressed data bit by bit (no second loss) and loses
    every application and comment segment and whatever follows its end; all else becomes a PNG
    written from the bare pixels. Colour profiles go too: they carry free text, and
    :func:`load_image` does not use them.
    """
    if data[:3] == b"\xff\xd8\xff" and _exif_orientation(data) in (None, 1):
        bare = strip_jpeg(data)
        if bare is not None:
            return bare, ".jpg", decode_image(bare, name)
    picture = decode_image(data, name)
    return png_bytes(picture), ".png", picture


def png_bytes(picture: Image.Image) -> bytes:
    """PNG of the pixels alone; grey pictures in one channel."""
    red, green, blue = picture.convert("RGB").split()
    grey = red.tobytes() == green.tobytes() == blue.tobytes()
    bare = red if grey else Image.merge("RGB", (red, green, blue))
    out = io.BytesIO()
    bare.save(out, "PNG")
    return out.getvalue()


def _exif_orientation(data: bytes) -> int | None:
    """The orientation tag; 0 (not upright) when the header cannot be read, so pixels decide."""
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG",)) as opened:
            return opened.getexif().get(_ORIENTATION)
    except Exception:
        return 0


def strip_jpeg(data: bytes) -> bytes | None:
    """JPEG without APPn (but a bare JFIF header and Adobe's colour transform) and COM segments.

    Also drops everything after the first picture's end. None if the structure is unsound.
    Markers: ITU-T T.81 table B.1; JFIF: T.871; Adobe APP14 decides how colours are stored.
    """
    out, at, end = [b"\xff\xd8"], 2, len(data)
    while True:
        while at + 1 < end and data[at] == 0xFF and data[at + 1] == 0xFF:
            at += 1  # fill bytes
        if at + 2 > end or data[at] != 0xFF:
            return None
        marker = data[at + 1]
        if marker == 0xD9:  # end of image
            return b"".join(out) + b"\xff\xd9"
        if at + 4 > end:
            return None
        stop = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        segment = data[at:stop]
        if stop > end or len(segment) < 4:
            return None
        if marker == 0xE0 and segment[4:9] == b"JFIF\0" and len(segment) >= 16:
            out.append(b"\xff\xe0\0\x10" + segment[4:16] + b"\0\0")  # no thumbnail
        elif marker == 0xEE and segment[4:9] == b"Adobe" and len(segment) >= 16:
            out.append(b"\xff\xee\0\x0e" + segment[4:16])
        elif not (0xE0 <= marker <= 0xEF or marker == 0xFE):
            out.append(segment)
        at = stop
        if marker == 0xDA:  # entropy-coded data: runs to the next true marker
            while True:
                at = data.find(b"\xff", at)
                if at < 0 or at + 1 >= end:
                    return None
                if data[at + 1] == 0x00 or 0xD0 <= data[at + 1] <= 0xD7:
                    at += 2
                elif data[at + 1] == 0xFF:
                    at += 1
                else:
                    break
            out.append(data[stop:at])
