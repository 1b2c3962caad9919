"""images.py: what is read, what is refused, what is stored, and the hashes."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from scipy.fft import dctn

from mmedrag.images import files
from mmedrag.images.alike import Look, hamming, near_identical, perceptual_hash, pixel_hash
from mmedrag.images.noise import apply_noise, pad_to_square
from mmedrag.images.strip import clean_copy
from mmedrag.records.records import Noise, UserError

SECRET = b"Doe^Jane 1950-01-02"


def picture(seed: int = 0, size: tuple[int, int] = (48, 32)) -> Image.Image:
    """Smooth random colours: survives JPEG, and has structure for the hashes."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
    return coarse.resize(size, Image.Resampling.BICUBIC)


def with_metadata(kind: str, orientation: int = 1) -> bytes:
    out = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = orientation
    exif[0x010E] = SECRET.decode()
    if kind == "png":
        info = PngInfo()
        info.add_text("PatientName", SECRET.decode())
        info.add_itxt("note", SECRET.decode(), zip=False)
        picture().save(out, "PNG", pnginfo=info, exif=exif)
    elif kind == "tiff":
        picture().save(out, "TIFF", description=SECRET.decode())
    else:
        picture().save(
            out,
            "JPEG",
            quality=90,
            exif=exif,
            comment=SECRET,
            icc_profile=b"icc" + SECRET,
            progressive=kind == "progressive",
        )
        return out.getvalue() + b"trailing " + SECRET
    return out.getvalue()


@pytest.mark.parametrize("kind", ["jpeg", "progressive", "png", "tiff"])
@pytest.mark.parametrize("orientation", [1, 6])
def test_a_stored_copy_has_the_pixels_and_nothing_else(kind: str, orientation: int) -> None:
    data = with_metadata(kind, orientation)
    assert SECRET in data
    bare, suffix, shown = clean_copy(data)
    assert SECRET not in bare
    assert pixel_hash(shown) == pixel_hash(files.decode_image(data))
    assert pixel_hash(shown) == pixel_hash(files.decode_image(bare))
    assert shown.info == {}
    jpeg = kind in ("jpeg", "progressive") and orientation == 1
    assert suffix == (".jpg" if jpeg else ".png")
    with Image.open(io.BytesIO(bare)) as again:
        again.load()
        assert (
            not again.getexif() and "comment" not in again.info and "icc_profile" not in again.info
        )


def test_saving_a_loaded_image_does_not_bring_the_comment_back(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(with_metadata("jpeg"))
    files.load_image(tmp_path / "a.jpg").save(tmp_path / "b.jpg")
    assert SECRET not in (tmp_path / "b.jpg").read_bytes()


def test_orientation_is_applied() -> None:
    upright = files.decode_image(with_metadata("png", 1))
    turned = files.decode_image(with_metadata("png", 6))  # 6: rotate 90 degrees clockwise
    assert turned.size == (32, 48)
    assert pixel_hash(turned.rotate(90, expand=True)) == pixel_hash(upright)


def save(image: Image.Image, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def test_sixteen_bits_are_scaled_and_not_clipped() -> None:
    values = (np.arange(64, dtype=np.uint16) * 60 + 1000).reshape(8, 8)
    shown = np.asarray(files.decode_image(save(Image.fromarray(values), "PNG")))
    assert shown.min() == 0 and shown.max() == 255
    assert len(np.unique(shown)) == 64
    assert (shown[..., 0] == shown[..., 2]).all()


def test_transparency_lies_on_black_and_hides_what_is_below() -> None:
    rgba = np.full((4, 4, 4), 200, dtype=np.uint8)
    rgba[:2, :, 3] = 0
    shown = np.asarray(files.decode_image(save(Image.fromarray(rgba), "PNG")))
    assert (shown[:2] == 0).all() and (shown[2:] == round(200 * 200 / 255)).all()


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "CMYK", "I;16", "F"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    if mode == "I;16":
        source = Image.fromarray(np.asarray(picture().convert("L"), dtype=np.uint16) * 100)
    else:
        source = (
            picture().convert("L").convert(mode) if mode in ("1", "F") else picture().convert(mode)
        )
    shown = files.decode_image(save(source, "TIFF"))
    assert shown.mode == "RGB" and shown.size == (48, 32)


def test_npz_prefers_the_fundus_array_and_never_unpickles(tmp_path: Path) -> None:
    pixels = np.asarray(picture())
    path = tmp_path / "data_00001.npz"
    np.savez(
        path,
        age=np.array(61.5),
        note=np.array([{"x": 1}], dtype=object),
        slo_fundus=pixels,
        a_first=np.zeros((9, 9)),
    )
    assert (np.asarray(files.load_image(path)) == pixels).all()
    np.savez(path, note=np.array([{"x": 1}], dtype=object))
    with pytest.raises(UserError, match=r"data_00001\.npz: no image array"):
        files.load_image(path)


def test_refusals_name_the_file(tmp_path: Path) -> None:
    whole = save(picture(size=(200, 200)), "JPEG")
    bad = {
        "empty.png": b"",
        "text.jpg": b"this is no image",
        "cut.jpg": whole[: len(whole) // 2],
        "cut.png": save(picture(size=(200, 200)), "PNG")[:400],
        "cut.npz": b"PK\x03\x04 damaged",
        "bomb.png": _bomb(),
        "cut.dcm": b"\0" * 128 + b"DICM" + b"\x02\x00",
    }
    for name, data in bad.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match=name.replace(".", r"\.")):
            files.load_image(tmp_path / name)
    with pytest.raises(UserError, match=r"gone\.png: image cannot be read"):
        files.load_image(tmp_path / "gone.png")
    with pytest.raises(UserError, match="cannot be read"):
        files.load_image(tmp_path)


def _bomb() -> bytes:
    """A valid PNG header that promises 50,000 x 50,000 pixels."""
    import struct
    import zlib

    head = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + head
    return (
        b"\x89PNG\r\n\x1a\n"
        + struct.pack(">I", 13)
        + chunk
        + struct.pack(">I", zlib.crc32(chunk))
        + struct.pack(">I", 8)
        + b"IDAT"
        + bytes(12)
    )


def test_the_bomb_is_refused_before_it_is_decoded() -> None:
    with pytest.raises(UserError, match="50000 x 50000|100,000,000 pixels"):
        files.decode_image(_bomb(), "bomb.png")


# --- hashes


def test_hashes_tell_same_similar_and_different() -> None:
    base = picture(1, (320, 240))
    png, jpeg = save(base, "PNG"), save(base, "JPEG", quality=40)
    assert pixel_hash(base) == pixel_hash(files.decode_image(png))
    assert pixel_hash(base) != pixel_hash(files.decode_image(jpeg))
    assert pixel_hash(base) != pixel_hash(base.resize((240, 320)))
    assert 0 <= perceptual_hash(base) < 1 << 64
    near = [files.decode_image(jpeg), base.resize((160, 120)), base.point(lambda v: v * 0.85)]
    for other in near:
        assert near_identical(Look.of(base), Look.of(other))
    for seed in range(2, 12):
        other = picture(seed, (320, 240))
        assert hamming(perceptual_hash(base), perceptual_hash(other)) > 8
        assert not near_identical(Look.of(base), Look.of(other))


def test_perceptual_hash_is_the_transform_above_its_median() -> None:
    """Against scipy's DCT: 8 x 8 frequencies, row by row, the first in the highest bit."""
    for seed in range(5):
        grey = picture(seed).convert("L").resize((32, 32), Image.Resampling.BOX)
        low = dctn(np.asarray(grey, dtype=float))[1:9, 1:9].ravel()
        bits = "".join("1" if value > np.median(low) else "0" for value in low)
        assert f"{perceptual_hash(picture(seed)):064b}" == bits


def test_uniform_pictures_are_alike_only_when_equal() -> None:
    black, white = (Image.new("RGB", (40, 40), c) for c in ((0, 0, 0), (255, 255, 255)))
    assert not near_identical(Look.of(black), Look.of(white))
    assert near_identical(Look.of(black), Look.of(black.copy()))


# --- noise


@pytest.mark.parametrize("kind", ["gaussian_clip", "additive", "blank", "shuffle_patches"])
@pytest.mark.parametrize("size", [32, 57])
def test_noise_has_model_size_and_depends_on_its_seed_alone(kind: str, size: int) -> None:
    base = picture(3, (90, 60))
    made = [apply_noise(base, Noise(kind=kind, seed=s), size) for s in (5, 5, 6)]
    assert all(m.size == (size, size) and m.mode == "RGB" for m in made)
    hashes = [pixel_hash(m) for m in made]
    assert hashes[0] == hashes[1]
    assert (hashes[0] != hashes[2]) == (kind != "blank")


def test_gaussian_clip_has_the_released_distribution_and_ignores_the_picture() -> None:
    noise = Noise(kind="gaussian_clip", seed=0)
    a, b = (np.asarray(apply_noise(picture(s), noise, 336)) for s in (1, 2))
    assert (a == b).all()
    # clip(N(0,1), 0, 1): P(0) = 1/2, P(255) = 1 - Phi(1) = 0.1587; a truncated uint8 of < 1
    # is 0 for another (Phi(1/255) - Phi(0)) = 0.0016
    assert abs((a == 0).mean() - 0.5016) < 0.004
    assert abs((a == 255).mean() - 0.1587) < 0.004


def test_shuffled_patches_are_the_same_patches() -> None:
    base = picture(4, (64, 64))
    noise = Noise(kind="shuffle_patches", seed=1, params={"patch": 16})
    made = np.asarray(apply_noise(base, noise, 64))

    def patches(pixels: np.ndarray) -> list[bytes]:
        return sorted(
            pixels[y : y + 16, x : x + 16].tobytes()
            for y in range(0, 64, 16)
            for x in range(0, 64, 16)
        )

    assert patches(made) == patches(np.asarray(base))
    assert (made != np.asarray(base)).any()


def test_other_patient_and_bad_parameters(tmp_path: Path) -> None:
    path = tmp_path / "other.png"
    picture(9, (40, 40)).save(path)
    noise = Noise(kind="other_patient", seed=0, params={"path": str(path)})
    shown = apply_noise(picture(1), noise, 40)
    assert pixel_hash(shown) == pixel_hash(picture(9, (40, 40)))
    for bad in (
        Noise(kind="other_patient", seed=0),
        Noise(kind="shuffle_patches", seed=0, params={"patch": 0}),
        Noise(kind="additive", seed=0, params={"sigma": "much"}),
    ):
        with pytest.raises(UserError, match=f"noise {bad.kind}"):
            apply_noise(picture(1), bad, 32)


def test_additive_noise_keeps_some_of_the_picture() -> None:
    base = picture(5, (64, 64))
    noise = Noise(kind="additive", seed=0, params={"sigma": 0.3})
    made = np.asarray(apply_noise(base, noise, 64), dtype=float)
    assert np.corrcoef(made.ravel(), np.asarray(base, dtype=float).ravel())[0, 1] > 0.4


def test_fit_pads_to_a_square() -> None:
    wide = Image.new("RGB", (40, 20), (255, 255, 255))
    square = np.asarray(pad_to_square(wide, 40))
    assert (square[:10] == 0).all() and (square[10:30] == 255).all() and (square[30:] == 0).all()
