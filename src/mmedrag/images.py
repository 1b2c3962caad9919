"""Image files in, RGB pixels out; noise at model resolution; a hash of what is seen.

Place in the picture: the left edge (every stage that looks at pixels) and ``data import``,
which stores images without the metadata they came with. Readable are PNG, JPEG, TIFF, BMP,
PPM, WebP, NPZ (the array ``slo_fundus`` of Harvard-FairVLMed, or the only image-like one) and
DICOM (with the extra ``dicom``). Whatever is wrong with a file becomes one
:class:`~mmedrag.types.UserError` that names it.
"""

from __future__ import annotations

import hashlib
import io
import warnings
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from mmedrag.types import Noise, UserError

MAX_PIXELS = 100_000_000  # a 10,000 x 10,000 image; more is refused before it is decoded
FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "PPM", "WEBP")
EXPECTED = "expected PNG, JPEG, TIFF, BMP, PPM, WebP, NPZ or DICOM"
_ORIENTATION = 0x0112  # EXIF tag


def load_image(path: str | Path) -> Image.Image:
    """The picture in a file, mode ``RGB``, upright, with an empty ``info``.

    EXIF orientation is applied. Transparency is laid on black. More than 8 bits per channel
    (and floats) are scaled linearly from the picture's own minimum..maximum to 0..255. Of
    several pages or frames the first is taken (``mmedrag.dicom.frames`` gives all of a DICOM).

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
        return _from_array(_npz(data, name), name)
    if looks_like_dicom(data) or name.lower().endswith((".dcm", ".dicom")):
        from mmedrag.dicom import frames  # pydicom only when a DICOM file comes

        return frames(data, name)[0]
    # Whatever a decoder throws at hostile bytes (struct.error, IndexError, ...) is bad input.
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's bomb warning; the guard below is stricter
            with Image.open(io.BytesIO(data), formats=FORMATS) as opened:
                _guard(opened.size, name)
                return _upright_rgb(opened, name)
    except UserError:
        raise
    except Image.UnidentifiedImageError:
        raise UserError(f"{name}: not an image in a known format, {EXPECTED}") from None
    except Image.DecompressionBombError:
        raise UserError(f"{name}: more than {MAX_PIXELS:,} pixels, refused") from None
    except Exception as error:
        raise UserError(f"{name}: image cannot be decoded: {_short(error)}") from None


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


def _guard(size: tuple[int, int], name: str) -> None:
    width, height = size
    if width * height > MAX_PIXELS:
        raise UserError(
            f"{name}: {width} x {height} pixels, refused above {MAX_PIXELS:,} (decompression bomb)"
        )
    if width < 1 or height < 1:
        raise UserError(f"{name}: image has no pixels")


def _short(error: Exception) -> str:
    return f"{' '.join(str(error).split()) or 'unknown reason'} ({type(error).__name__})"[:200]


def _upright_rgb(opened: Image.Image, name: str) -> Image.Image:
    opened.load()
    # the EXIF block of a damaged file can itself be damaged: then the picture counts as upright
    try:
        turned = ImageOps.exif_transpose(opened)
    except Exception:
        turned = opened
    if turned.mode.startswith(("I", "F")):
        return _from_array(np.asarray(turned), name)
    if turned.has_transparency_data:
        rgba = turned.convert("RGBA")
        turned = Image.alpha_composite(Image.new("RGBA", rgba.size, (0, 0, 0, 255)), rgba)
    # a new image from the bare pixels: nothing of the old ``info`` (comments, EXIF) comes along
    rgb = turned if turned.mode == "RGB" else turned.convert("RGB")
    return Image.frombytes("RGB", rgb.size, rgb.tobytes())


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
    values = np.where(finite, values, low)
    return np.round((values - low) * (255.0 / (high - low or 1.0))).astype(np.uint8)


def _from_array(pixels: np.ndarray, name: str) -> Image.Image:
    pixels = np.squeeze(pixels)
    if pixels.ndim == 3 and pixels.shape[0] in (1, 3) and pixels.shape[2] not in (1, 3, 4):
        pixels = np.moveaxis(pixels, 0, 2)  # channels first, as in torch-made arrays
    if pixels.ndim not in (2, 3) or (pixels.ndim == 3 and pixels.shape[2] not in (3, 4)):
        raise UserError(f"{name}: array of shape {pixels.shape}, expected (H, W) or (H, W, 3)")
    _guard((pixels.shape[1], pixels.shape[0]), name)
    if pixels.dtype.kind not in "buif":
        raise UserError(f"{name}: array of {pixels.dtype}, expected numbers")
    try:
        data = np.ascontiguousarray(scale_to_bytes(pixels)[..., :3] if pixels.ndim == 3
                                    else scale_to_bytes(pixels))  # fmt: skip
    except ValueError as error:
        raise UserError(f"{name}: {error}") from None
    return Image.fromarray(data).convert("RGB")


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
        raise UserError(f"{name}: NPZ cannot be read: {_short(error)}") from None
    raise UserError(f"{name}: no image array in NPZ (arrays: {', '.join(sorted(sizes)) or 'none'})")


# --- storing without metadata ------------------------------------------------------------------


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


# --- noise --------------------------------------------------------------------------------------


def fit(picture: Image.Image, size: int, fill: tuple[int, int, int] = (0, 0, 0)) -> Image.Image:
    """Padded to a centred square and resized (bicubic) to size x size, RGB."""
    rgb = picture.convert("RGB")
    side = max(rgb.size)
    if rgb.width != rgb.height:
        square = Image.new("RGB", (side, side), fill)
        square.paste(rgb, ((side - rgb.width) // 2, (side - rgb.height) // 2))
        rgb = square
    return rgb if side == size else rgb.resize((size, size), Image.Resampling.BICUBIC)


def apply_noise(picture: Image.Image, noise: Noise, size: int) -> Image.Image:
    """x_v* = I(x_v): the degraded picture, RGB size x size, the same for the same seed.

    Drawn at the model's resolution, so that resizing cannot average it away (released fault
    B9: drawn at native size, a large film became near-uniform grey). Kinds and params:

    - ``gaussian_clip``: clip(N(0,1), 0, 1) · 255 as released (train_dpo_2stages.py:93-98); the
      picture is ignored: half of the values are 0, 16 % are 255.
    - ``additive``: picture/255 + sigma · N(0,1), clipped (released report generation);
      ``sigma`` 1.0.
    - ``blank``: one ``value`` everywhere (0..255, 127).
    - ``other_patient``: another picture, the file ``path``.
    - ``shuffle_patches``: squares of ``patch`` pixels (size/8) in random order.
    """
    rng = np.random.Generator(np.random.PCG64(noise.seed))
    params = dict(noise.params)

    def number(key: str, default: float) -> float:
        value = params.get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise UserError(f"noise {noise.kind}: {key}: got {value!r}, expected a number")
        return float(value)

    if noise.kind == "gaussian_clip":
        drawn = np.clip(rng.standard_normal((size, size, 3)), 0, 1) * 255
    elif noise.kind == "additive":
        base = np.asarray(fit(picture, size), dtype=np.float64) / 255
        drawn = base + number("sigma", 1.0) * rng.standard_normal((size, size, 3))
        drawn = np.clip(drawn, 0, 1) * 255
    elif noise.kind == "blank":
        drawn = np.full((size, size, 3), np.clip(number("value", 127), 0, 255))
    elif noise.kind == "other_patient":
        other = params.get("path")
        if not isinstance(other, (str, Path)) or not str(other):
            raise UserError("noise other_patient: path: missing, expected the other image's file")
        return fit(load_image(other), size)
    elif noise.kind == "shuffle_patches":
        patch = int(number("patch", max(1, size // 8)))
        if not 1 <= patch <= size:
            raise UserError(f"noise shuffle_patches: patch: got {patch}, expected 1..{size}")
        drawn = _shuffled(np.asarray(fit(picture, size)), patch, rng)
    else:
        raise UserError(f"noise: kind {noise.kind!r} is not known")
    return Image.fromarray(drawn.astype(np.uint8))


def _shuffled(pixels: np.ndarray, patch: int, rng: np.random.Generator) -> np.ndarray:
    """Whole patches permuted; a remainder at the right and lower edge stays in place."""
    out, count = pixels.copy(), pixels.shape[0] // patch
    order = rng.permutation(count * count)
    for target, origin in enumerate(order):
        (ty, tx), (oy, ox) = divmod(target, count), divmod(int(origin), count)
        out[ty * patch : (ty + 1) * patch, tx * patch : (tx + 1) * patch] = pixels[
            oy * patch : (oy + 1) * patch, ox * patch : (ox + 1) * patch
        ]
    return out


# --- hash -------------------------------------------------------------------------------------


def pixel_hash(picture: Image.Image) -> str:
    """sha256 of size and decoded RGB pixels: equal for the same picture in another container."""
    rgb = picture if picture.mode == "RGB" else picture.convert("RGB")
    return hashlib.sha256(f"{rgb.width}x{rgb.height}:".encode() + rgb.tobytes()).hexdigest()
