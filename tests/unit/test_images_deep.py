"""Pictures beyond 8 bits, of every layout, and pixels that are not square: seen as they are."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from mmedrag.cli.main import cli
from mmedrag.data import import_data
from mmedrag.images import load_image
from mmedrag.images.deep import Tiff
from mmedrag.images.files import decode_image, stated_size
from mmedrag.records import UserError
from mmedrag.retrieval.embeddings import EmbeddingCache, HashOnly, embed_images
from mmedrag.runtime.data_folder import DataFolder

H, W = 37, 50
RNG = np.random.default_rng(0)
FILM = np.linspace(0, 4095, H * W).reshape(H, W).astype(np.uint16)  # 12 bits in 16


def colour(channels: int) -> np.ndarray:
    """12 bits of colour, each channel of its own range; a fourth is alpha of 16 bits."""
    found = np.stack([FILM, FILM[::-1] // 2, FILM[:, ::-1] // 3 + 100], axis=-1)
    alpha = np.where(np.arange(W) < 5, 0, 20000 + 900 * np.arange(W)).astype(np.uint16)
    full = np.broadcast_to(alpha[None, :, None], (H, W, 1))
    return np.concatenate([found, full], axis=-1)[..., :channels]


def expected(samples: np.ndarray, alpha: np.ndarray | None = None) -> np.ndarray:
    """One linear range for all channels, of what is visible; laid on black."""
    values = samples.astype(np.float64)
    seen = values if alpha is None else values[alpha > 0]
    shown = (np.clip(values, seen.min(), seen.max()) - seen.min()) / (seen.max() - seen.min()) * 255
    weight = 1.0 if alpha is None else alpha if samples.ndim == 2 else alpha[..., None]
    shown = np.round(np.round(shown) * weight)
    return shown if shown.ndim == 3 else np.stack([shown] * 3, axis=-1)


def png16(samples: np.ndarray, kind: int, *more: bytes) -> bytes:
    """A PNG of 16 bits per channel, every second row filtered (Sub); ``more``: chunks."""
    wide = samples.astype(">u2").tobytes()
    stride, step = len(wide) // H, 2 * (samples.shape[2] if samples.ndim == 3 else 1)
    lines = np.frombuffer(wide, np.uint8).reshape(H, stride)
    raw = b""
    for number, line in enumerate(lines):
        before = np.concatenate([np.zeros(step, np.uint8), line[:-step]])
        raw += b"\1" + (line - before).tobytes() if number % 2 else b"\0" + line.tobytes()
    head = struct.pack(">IIBBBBB", W, H, 16, kind, 0, 0, 0)
    parts = [b"IHDR" + head, *more, b"IDAT" + zlib.compress(raw), b"IEND"]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(p) - 4) + p + struct.pack(">I", zlib.crc32(p)) for p in parts
    )


def lzw(plain: bytes) -> bytes:
    """LZW as Pillow's libtiff writes it: the strips of an 8-bit picture of one row."""
    out = io.BytesIO()
    Image.frombytes("L", (len(plain), 1), plain).save(out, "TIFF", compression="tiff_lzw")
    tags = Tiff.of(out.getvalue())
    at, size = tags.number(273, 0), tags.number(279, 0)
    return out.getvalue()[at : at + size]


CODES = {1: lambda plain: plain, 8: zlib.compress, 5: lzw}
FORMATS = {"u": 1, "i": 2, "f": 3}


def tiff(
    samples: np.ndarray,
    photometric: int,
    *,
    planar: bool = False,
    tile: tuple[int, int] | None = None,
    code: int = 1,
    predictor: int = 1,
    end: str = "<",
    **tags: int | tuple[int, int],
) -> bytes:
    """A TIFF in strips of 16 rows, or tiles (down, across); ``tags``: t338=2 and so on."""
    cube = samples if samples.ndim == 3 else samples[..., None]
    kind = cube.dtype
    parts = [cube[..., n : n + 1] for n in range(cube.shape[2])] if planar else [cube]
    down, across = tile or (16, W)
    blocks = []
    for part in parts:
        for top in range(0, H, down):
            for left in range(0, W, across):
                block = part[top : top + down, left : left + across]
                if tile:
                    short = ((0, down - block.shape[0]), (0, across - block.shape[1]), (0, 0))
                    block = np.pad(block, short)
                if predictor == 2:
                    bare = block.view(f"u{kind.itemsize}")
                    block = np.diff(bare, axis=1, prepend=np.zeros_like(bare[:, :1])).view(kind)
                blocks.append(CODES[code](block.astype(kind.newbyteorder(end)).tobytes()))
    entries: dict[int, tuple[int, list[int]]] = {
        256: (4, [W]), 257: (4, [H]), 258: (3, [8 * kind.itemsize] * cube.shape[2]),
        259: (3, [code]), 262: (3, [photometric]), 277: (3, [cube.shape[2]]),
        284: (3, [2 if planar else 1]), 317: (3, [predictor]),
        339: (3, [FORMATS[kind.kind]] * cube.shape[2]),
    }  # fmt: skip
    starts = np.cumsum([8] + [len(b) for b in blocks])
    where, lengths = (4, [int(s) for s in starts[:-1]]), (4, [len(b) for b in blocks])
    if tile:
        entries |= {322: (4, [across]), 323: (4, [down]), 324: where, 325: lengths}
    else:
        entries |= {278: (4, [down]), 273: where, 279: lengths}
    for name, value in tags.items():
        entries[int(name[1:])] = (5, list(value)) if isinstance(value, tuple) else (3, [value])
    ifd, extra = struct.pack(end + "H", len(entries)), b""
    base = int(starts[-1])
    beyond = base + 2 + 12 * len(entries) + 4
    for tag, (type_, values) in sorted(entries.items()):
        packed = struct.pack(f"{end}{len(values)}{'H' if type_ == 3 else 'I'}", *values)
        if len(packed) > 4:
            packed, extra = struct.pack(end + "I", beyond + len(extra)), extra + packed
        count = 1 if type_ == 5 else len(values)
        ifd += struct.pack(end + "HHI", tag, type_, count) + packed.ljust(4, b"\0")
    head = (b"II*\0" if end == "<" else b"MM\0*") + struct.pack(end + "I", base)
    return head + b"".join(blocks) + ifd + bytes(4) + extra


def seen(data: bytes, name: str = "x") -> np.ndarray:
    return np.asarray(decode_image(data, name)).astype(int)


# --- PNG and PPM


def test_sixteen_bit_png_of_every_kind() -> None:
    grey, rgba = FILM, colour(4)
    alpha = rgba[..., 3]
    both = np.stack([grey, alpha], axis=-1)
    assert (seen(png16(grey, 0)) == expected(grey)).all()
    assert (seen(png16(colour(3), 2)) == expected(colour(3))).all()
    assert (seen(png16(both, 4)) == expected(grey, alpha / 65535)).all()
    assert (seen(png16(rgba, 6)) == expected(rgba[..., :3], alpha / 65535)).all()
    film = seen(png16(np.stack([grey] * 3, -1), 2))
    assert (film == seen(png16(grey, 0))).all() and film.max() == 255


def test_the_hidden_colour_of_a_deep_png_is_compared_in_all_its_bits() -> None:
    grey = FILM.copy()
    grey[0, 0], grey[0, 1] = 60000, 60001  # the same upper byte
    hidden = (grey != 60000).astype(float)
    chunk = b"tRNS" + struct.pack(">H", 60000)
    assert (seen(png16(grey, 0, chunk)) == expected(grey, hidden)).all()
    rgb = np.stack([grey] * 3, -1)
    chunk = b"tRNS" + struct.pack(">HHH", 60000, 60000, 60000)
    found = seen(png16(rgb, 2, chunk))
    assert (found == expected(rgb, hidden)).all()
    assert found[0, 0].max() == 0 and found[0, 1].min() == 255


def test_deep_pictures_are_turned_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = seen(png16(colour(3), 2, b"eXIf" + exif.tobytes().removeprefix(b"Exif\0\0")))
    assert (turned == np.rot90(expected(colour(3)), -1)).all()
    turned = seen(tiff(colour(3), 2, t274=6))
    assert (turned == np.rot90(expected(colour(3)), -1)).all()


@pytest.mark.parametrize("largest", [4095, 65535])
@pytest.mark.parametrize("plain", [False, True])
def test_colour_ppm_beyond_eight_bits(largest: int, plain: bool) -> None:
    pixels = colour(3)
    body = b" ".join(b"%d" % v for v in pixels.ravel()) if plain else pixels.astype(">u2").tobytes()
    data = b"P%d\n%d %d\n%d\n" % (3 if plain else 6, W, H, largest) + body
    assert (seen(data) == expected(pixels)).all()
    with pytest.raises(UserError, match="cut.ppm.*truncated"):
        decode_image(data[:-9], "cut.ppm")


# --- TIFF


LAYOUTS = [
    {},
    {"end": ">"},
    {"planar": True},
    {"tile": (16, 32)},
    {"planar": True, "tile": (32, 16), "end": ">"},
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("code", [1, 8, 5])
@pytest.mark.parametrize("kind", ["u2", "i2", "u4", "f4"])
def test_deep_tiff_of_every_layout_sign_and_code(layout: dict, code: int, kind: str) -> None:
    for predictor in (1, 2) if kind != "f4" else (1,):
        options = layout | {"code": code, "predictor": predictor}
        rgb = colour(3).astype(float) - (1000 if kind[0] != "u" else 0)
        rgb = (rgb / 7.0 if kind[0] == "f" else rgb).astype(kind)
        assert (seen(tiff(rgb, 2, **options)) == expected(rgb)).all()
        grey = rgb[..., 0]
        assert (seen(tiff(grey, 1, **options)) == expected(grey)).all()
        # WhiteIsZero: the lowest value is white
        assert (seen(tiff(grey, 0, **options)) == 255 - expected(grey)).all()


def test_alpha_of_deep_tiff() -> None:
    rgba = colour(4)
    straight = expected(rgba[..., :3], rgba[..., 3] / 65535)
    assert (seen(tiff(rgba, 2, t338=2)) == straight).all()
    assert (seen(tiff(rgba, 2, t338=1)) == expected(rgba[..., :3])).all()  # already multiplied
    assert (seen(tiff(rgba, 2, t338=0)) == expected(rgba[..., :3])).all()  # of unknown meaning
    white = rgba[..., [0, 3]]
    found = seen(tiff(white, 0, t338=2))
    weight = (white[..., 1] / 65535)[..., None]
    assert (
        found == np.round((255 - expected_within(white[..., 0], weight[..., 0])) * weight)
    ).all()


@pytest.mark.parametrize("layout", [*LAYOUTS, {"code": 8, "predictor": 2}, {"code": 5}], ids=str)
@pytest.mark.parametrize("kind", ["u2", "u4", "f4"])
def test_deep_inks_are_what_they_leave_of_the_paper(layout: dict, kind: str) -> None:
    full = 1.0 if kind == "f4" else float(np.iinfo(kind).max)
    shares = np.round(colour(4) / 65535, 3)  # ink of 12 bits, as film in a file of 16
    inks = (shares * full).astype(kind)
    options = layout if kind != "f4" else {k: v for k, v in layout.items() if k != "predictor"}
    found = seen(tiff(inks, 5, **options))
    left = (1 - inks[..., :3] / full) * (1 - inks[..., 3:] / full)
    assert (np.abs(found - expected(left)) <= 1).all()
    assert found.min() == 0 and found.max() == 255
    black = np.zeros((H, W, 4), kind)
    black[..., 3] = np.linspace(0, full, W)
    ramp = seen(tiff(black, 5, **options))
    assert (np.abs(ramp - np.linspace(255, 0, W)[None, :, None]) <= 1).all()
    # an extra channel changes nothing unless it is alpha
    more = np.concatenate([black, np.full((H, W, 1), full, kind)], axis=2)
    assert (seen(tiff(more, 5, t338=2, **options)) == ramp).all()


def test_inks_that_are_not_cmyk_are_named() -> None:
    for data in (tiff(colour(4), 5, t332=2), tiff(colour(3), 5)):
        with pytest.raises(UserError, match=r"x\.tif: TIFF of PhotometricInterpretation 5"):
            decode_image(data, "x.tif")


@pytest.mark.parametrize("scale", [1, 257])
def test_a_colour_map_of_eight_bits_in_sixteen(scale: int) -> None:
    shades = np.arange(256)
    entries = np.concatenate([shades, shades // 2, 255 - shades]) * scale
    out = io.BytesIO()
    indices = (FILM >> 4).astype(np.uint8)
    picture = Image.fromarray(indices, mode="P")
    picture.putpalette(bytes(768))
    picture.save(out, "TIFF")
    data, tags = out.getvalue(), Tiff.of(out.getvalue())
    at = data.index(struct.pack("<HHI", 320, 3, 768)) + 8
    at = struct.unpack_from("<I", data, at)[0]
    data = data[:at] + entries.astype("<u2").tobytes() + data[at + 2 * 768 :]
    assert tags.photometric == 3
    wanted = np.stack([indices, indices // 2, 255 - indices.astype(int)], axis=-1)
    assert (seen(data) == wanted).all()


def expected_within(grey: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Scaled by the range of what is visible, not yet laid on black."""
    inside = grey[alpha > 0]
    return expected(np.clip(grey, inside.min(), inside.max()))


def test_signed_bytes_and_twelve_bits_in_a_row() -> None:
    signed = (FILM // 16 - 128).astype(np.int8)
    assert (seen(tiff(signed, 1)) == expected(signed)).all()
    assert (seen(tiff(signed, 0)) == 255 - expected(signed)).all()
    bits = (FILM[..., None] >> np.arange(12)[::-1]) & 1
    rows = np.packbits(bits.reshape(H, -1).astype(np.uint8), axis=1)
    size = struct.pack("<HHII", 256, 4, 1, W)
    strips = struct.pack("<HHII", 278, 4, 1, 16)
    packed = rows.tobytes()
    cut = [packed[n : n + 16 * rows.shape[1]] for n in range(0, len(packed), 16 * rows.shape[1])]
    body = b"".join(cut)
    offsets = struct.pack("<3I", *(8 + sum(map(len, cut[:n])) for n in range(3)))
    lengths = struct.pack("<3I", *map(len, cut))
    at = 8 + len(body)
    entries = size + struct.pack("<HHII", 257, 4, 1, H) + struct.pack("<HHIHH", 258, 3, 1, 12, 0)
    entries += struct.pack("<HHIHH", 259, 3, 1, 1, 0) + struct.pack("<HHIHH", 262, 3, 1, 0, 0)
    beyond = at + 2 + 12 * 8 + 4
    entries += struct.pack("<HHII", 273, 4, 3, beyond) + strips
    entries += struct.pack("<HHII", 279, 4, 3, beyond + 12)
    file = b"II*\0" + struct.pack("<I", at) + body + struct.pack("<H", 8) + entries + bytes(4)
    assert (seen(file + offsets + lengths) == 255 - expected(FILM)).all()


def test_deep_tiff_that_pillow_wrote() -> None:
    for compression in ("tiff_lzw", "tiff_adobe_deflate", "packbits", None):
        for image in (Image.fromarray(FILM), Image.fromarray(FILM.astype(np.float32))):
            out = io.BytesIO()
            image.save(out, "TIFF", compression=compression)
            assert (seen(out.getvalue()) == expected(FILM)).all()


def test_tiff_that_cannot_be_read_right_is_named() -> None:
    with pytest.raises(UserError, match=r"a\.tif: TIFF of Photo.*SampleFormat 5.*not read"):
        decode_image(tiff(FILM, 1, t339=5), "a.tif")
    with pytest.raises(
        UserError, match=r"a\.tif: TIFF of Photo.*Compression 7.*expected none, LZW"
    ):
        decode_image(tiff(FILM, 1, t259=7), "a.tif")
    with pytest.raises(UserError, match=r"a\.tif: TIFF of PhotometricInterpretation 3.*not read"):
        decode_image(tiff(FILM, 3), "a.tif")
    with pytest.raises(UserError, match=r"a\.tif: TIFF of .*Predictor 9"):
        decode_image(tiff(FILM, 1, t317=9), "a.tif")
    with pytest.raises(UserError, match=r"a\.tif: TIFF is truncated"):
        decode_image(tiff(FILM, 1, t278=1), "a.tif")
    with pytest.raises(UserError, match=r"a\.tif: 65535 x 65535 pixels"):
        decode_image(tiff(FILM, 1, t256=65535, t257=65535), "a.tif")
    assert stated_size(tiff(colour(3).astype("f4"), 2)) == ("TIFF", (W, H))


def test_damaged_deep_files_give_one_line() -> None:
    whole = [png16(colour(4), 6), tiff(colour(3), 2, code=5), tiff(FILM, 0, code=8, predictor=2)]
    for number in range(300):
        data = bytearray(whole[number % 3])
        for _ in range(1 + number % 5):
            data[int(RNG.integers(len(data)))] = int(RNG.integers(256))
        cut = bytes(data[: int(RNG.integers(8, len(data)))] if number % 7 == 0 else data)
        try:
            picture = decode_image(cut, "bad")
        except UserError as error:
            assert str(error).startswith("bad: ") and "\n" not in str(error)
        else:
            assert picture.mode == "RGB"


def test_alpha_of_an_array_does_not_set_the_range(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", picture=colour(4))
    assert (np.asarray(load_image(tmp_path / "a.npz")) == expected(colour(3))).all()


# --- pixels that are not square


def dense(kind: str, across: int, down: int) -> bytes:
    """40 x 20 pixels of 1/across x 1/down, said in each format's own way."""
    image = Image.new("L", (40, 20), 200)
    out = io.BytesIO()
    if kind == "TIFF":
        image.save(out, kind, x_resolution=float(across), y_resolution=float(down))
        return out.getvalue()
    if kind == "aspect":
        image.save(out, "PNG")
        chunk = b"pHYs" + struct.pack(">IIB", across, down, 0)
        packed = struct.pack(">I", 9) + chunk + struct.pack(">I", zlib.crc32(chunk))
        return out.getvalue()[:33] + packed + out.getvalue()[33:]
    image.save(out, kind, dpi=(across, down))
    return out.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "aspect", "JPEG", "TIFF", "BMP"])
def test_pixels_that_are_not_square_become_square(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert decode_image(dense(kind, 100, 100)).size == (40, 20)
    assert decode_image(dense(kind, 200, 100)).size == (40, 40)  # half as wide as high
    assert decode_image(dense(kind, 100, 200)).size == (80, 20)
    # no scanner's: a damaged header of a sound picture is named, and no reason to refuse it
    assert decode_image(dense(kind, 10000, 100)).size == (40, 20)
    assert "pixels per length: ignored" in caplog.text


def test_the_side_follows_the_turn() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    out = io.BytesIO()
    Image.new("RGB", (40, 20), (9, 9, 9)).save(out, "PNG", dpi=(200, 100), exif=exif)
    assert decode_image(out.getvalue()).size == (40, 40)
    out = io.BytesIO()
    Image.new("RGB", (40, 20), (9, 9, 9)).save(out, "PNG", dpi=(100, 200), exif=exif)
    assert decode_image(out.getvalue()).size == (20, 80)
    assert decode_image(tiff(FILM, 1, t282=(2, 1), t283=(1, 1), t274=6)).size == (2 * H, W)


# --- through the command


def test_import_stores_deep_pictures_as_they_are_and_names_views(tmp_path: Path) -> None:
    (tmp_path / "film.png").write_bytes(png16(np.stack([FILM] * 3, -1), 2))
    (tmp_path / "white.tif").write_bytes(tiff(FILM, 0))
    (tmp_path / "odd.tif").write_bytes(tiff(FILM, 1, t339=5))
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "m.jsonl").write_text(
        '{"id": "a", "domain": "radiology", "text": "Clear lungs.", "text_kind": "report", '
        '"image": ["film.png", "white.tif"]}\n'
        '{"id": "b", "domain": "radiology", "text": "No mass.", "text_kind": "report", '
        '"image": ["film.png", "odd.tif", "text.png"]}\n'
    )
    args = ["data", "import", "manifest", str(tmp_path / "m.jsonl"), str(tmp_path / "out")]
    result = CliRunner().invoke(cli, args)
    assert result.exit_code == 1
    assert f"refused: m.jsonl:2: {tmp_path / 'odd.tif'}: TIFF of" in result.output
    assert f"; {tmp_path / 'text.png'}: not an image" in result.output  # every view that is bad
    row = DataFolder(tmp_path / "out").corpus()[0]
    film, white = (np.asarray(load_image(path)).astype(int) for path in row.images)
    assert (film == expected(FILM)).all() and (white == 255 - expected(FILM)).all()
    assert import_data("manifest", tmp_path / "m.jsonl", tmp_path / "two").corpus == 1


def test_several_views_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    """Each of a row's views that is bad, not the first alone."""
    good, bad = tmp_path / "good.png", [tmp_path / "one.png", tmp_path / "two.png"]
    Image.new("RGB", (8, 8), (90, 20, 60)).save(good)
    for path in bad:
        path.write_text("no picture")
    found = embed_images([[good, *bad], [good]], None, EmbeddingCache(None, HashOnly(), "image"))
    assert list(found.errors) == [0]
    assert all(f"{path}: not an image" in found.errors[0] for path in bad)
