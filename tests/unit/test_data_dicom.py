"""DICOM: pixels as they should be seen, and nothing of the patient in what is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

pydicom = pytest.importorskip("pydicom", reason="needs the extra 'dicom'")
pytest.importorskip("dicomanonymizer", reason="needs the extra 'dicom'")

from mmedrag.data import import_data, ocr  # noqa: E402
from mmedrag.data.deidentify import Pseudonyms, deidentify, read_key  # noqa: E402
from mmedrag.images import dicom  # noqa: E402
from mmedrag.images.files import load_image  # noqa: E402
from mmedrag.records.records import UserError  # noqa: E402
from mmedrag.runtime.data_folder import DataFolder  # noqa: E402

# pixels that tell orientation: bright in the upper left corner
CORNER = np.zeros((40, 40), dtype=np.uint16)
CORNER[:10, :10] = 3000
SECRETS = (
    "Roe",
    "Jill",
    "MRN12345",
    "ACC777",
    "StMary",
    "Dr^Who",
    "19610203",
    "20200417",
    "Private note",
    "1.2.826.0.1.77",
)


def make(pixels: np.ndarray = CORNER, frames: int = 0, **changes: Any) -> Any:
    """A data set with identity in every usual and some unusual places."""
    item = pydicom.Dataset()
    found = pydicom.Dataset()
    found.SOPClassUID = "1.2.840.10008.5.1.4.1.1.1"
    found.SOPInstanceUID = "1.2.826.0.1.77.1"
    found.StudyInstanceUID = "1.2.826.0.1.77.2"
    found.SeriesInstanceUID = "1.2.826.0.1.77.3"
    found.PatientName, found.PatientID, found.PatientBirthDate = "Roe^Jill", "MRN12345", "19610203"
    found.AccessionNumber, found.InstitutionName = "ACC777", "StMary"
    found.ReferringPhysicianName = "Dr^Who"
    found.StudyDate, found.StudyTime, found.Modality = "20200417", "101112", "DX"
    found.AcquisitionDateTime = "20200417101112.5"
    found.StudyDescription = "Chest of Jill Roe"
    item.CodeMeaning, item.CodeValue = "Chest", "T-D3000"
    item.PersonName = "Roe^Jill"
    item.ReferencedSOPInstanceUID = "1.2.826.0.1.77.9"
    item.ContentDate = "20200417"
    found.AnatomicRegionSequence = [item]
    found.add_new((0x0009, 0x0010), "LO", "SHOP")
    found.add_new((0x0009, 0x1001), "LO", "Private note")
    found.Rows, found.Columns = pixels.shape[-2:] if not frames else pixels.shape[1:3]
    found.SamplesPerPixel, found.PhotometricInterpretation = 1, "MONOCHROME2"
    found.BitsAllocated, found.BitsStored, found.HighBit = 16, 12, 11
    found.PixelRepresentation = 0
    if frames:
        found.NumberOfFrames = frames
    found.PixelData = pixels.astype(np.uint16).tobytes()
    found.file_meta = pydicom.dataset.FileMetaDataset()
    found.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    found.file_meta.SourceApplicationEntityTitle = "StMary"
    for key, value in changes.items():
        setattr(found, key, value)
    return found


def save(dataset: Any, path: Path, preamble: bytes = b"Roe^Jill".ljust(128, b"\0")) -> Path:
    dataset.preamble = preamble
    dataset.save_as(path, enforce_file_format=True)
    return path


def shown(dataset: Any, tmp_path: Path) -> np.ndarray:
    return np.asarray(load_image(save(dataset, tmp_path / "one.dcm")))[..., 0]


# --- pixels


def test_window_inversion_and_rescale(tmp_path: Path) -> None:
    ramp = np.tile(np.arange(4000, dtype=np.uint16)[::100], (40, 1))
    plain = shown(make(ramp), tmp_path)
    assert plain[0, 0] == 0 and plain[0, -1] == 255 and (np.diff(plain[0].astype(int)) > 0).all()
    assert (
        shown(make(ramp, PhotometricInterpretation="MONOCHROME1"), tmp_path) == 255 - plain
    ).all()
    window = shown(make(ramp, WindowCenter=1000, WindowWidth=200), tmp_path)
    # PS3.3 C.11.2.1.2: black up to c - 0.5 - (w-1)/2 = 900, white above c - 0.5 + (w-1)/2 = 1099
    assert (window[0, :10] == 0).all() and (window[0, 11:] == 255).all()
    assert window[0, 10] == round(((1000 - 999.5) / 199 + 0.5) * 255)
    several = make(ramp, WindowCenter=[1000, 50], WindowWidth=[200, 400])
    assert (shown(several, tmp_path) == window).all()
    hounsfield = make(ramp, RescaleSlope=1, RescaleIntercept=-1000, WindowCenter=0, WindowWidth=200)
    assert (shown(hounsfield, tmp_path) == window).all()
    exact = make(ramp, WindowCenter=1000, WindowWidth=200, VOILUTFunction="LINEAR_EXACT")
    assert shown(exact, tmp_path)[0, 10] == 128
    sigmoid = make(ramp, WindowCenter=1000, WindowWidth=200, VOILUTFunction="SIGMOID")
    assert shown(sigmoid, tmp_path)[0, 10] == 128


def test_a_voi_lut_and_padding(tmp_path: Path) -> None:
    ramp = np.tile(np.arange(40, dtype=np.uint16), (40, 1))
    table = pydicom.Dataset()
    table.LUTDescriptor = [40, 0, 8]
    table.add_new("LUTData", "OW", bytes((np.arange(40) * 6).astype(np.uint8).repeat(1)))
    table["LUTData"].value = (np.arange(40) * 6).astype("<u2").tobytes()
    inverse = shown(make(ramp, VOILUTSequence=[table]), tmp_path)
    assert inverse[0, 0] == 0 and inverse[0, 39] == 234
    padded = ramp.copy()
    padded[:, :5] = 4000
    dark = shown(make(padded, PixelPaddingValue=4000), tmp_path)
    assert (dark[:, :5] == 0).all() and dark[0, -1] == 255  # padding does not set the range
    white = make(padded, PixelPaddingValue=4000, PhotometricInterpretation="MONOCHROME1")
    assert (shown(white, tmp_path)[:, :5] == 0).all()


@pytest.mark.parametrize(
    ("orientation", "corner"),
    [
        (["L", "F"], "top left"),
        (["R", "F"], "top right"),
        (["L", "H"], "bottom left"),
        (["R", "H"], "bottom right"),
        (["P", "F"], "top left"),
        (["F", "L"], "top left"),
        (None, "top left"),
        ([1, 0, 0, 0, 1, 0], "top left"),
        ([-1, 0, 0, 0, -1, 0], "bottom right"),
        ([0, 1, 0, 0, 0, -1], "top left"),
        ([1, 0, 0, 0, 0, 1], "bottom left"),
    ],
)
def test_pictures_stand_as_films_are_read(orientation: Any, corner: str, tmp_path: Path) -> None:
    key = (
        "PatientOrientation"
        if orientation and isinstance(orientation[0], str)
        else ("ImageOrientationPatient")
    )
    dataset = make(**({key: orientation} if orientation else {}))
    pixels = shown(dataset, tmp_path)
    rows, columns = ("top" in corner, "left" in corner)
    spot = pixels[:10] if rows else pixels[-10:]
    spot = spot[:, :10] if columns else spot[:, -10:]
    assert (spot == 255).all() and (pixels == 255).sum() == 100


def test_missing_preamble_and_meta_header(tmp_path: Path) -> None:
    dataset = make()
    whole = save(dataset, tmp_path / "a.dcm").read_bytes()
    bare = tmp_path / "b"
    bare.write_bytes(whole[whole.index(b"\x08\x00\x16\x00") :])  # starts at SOPClassUID
    assert (np.asarray(load_image(bare)) == np.asarray(load_image(tmp_path / "a.dcm"))).all()


def test_frames_are_decoded_one_by_one(tmp_path: Path) -> None:
    stack = np.stack([np.full((8, 8), n * 100, dtype=np.uint16) for n in range(5)])
    stack[:, 0, 0] = 0
    stack[:, 0, 1] = 500
    data = save(make(stack, frames=5), tmp_path / "m.dcm").read_bytes()
    pictures = dicom.frames(data, limit=None)
    assert [p.getpixel((4, 4))[0] for p in pictures] == [0, 51, 102, 153, 204]
    assert len(dicom.frames(data)) == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"Rows": 0},
        {"Rows": 65535, "Columns": 65535},
        {"NumberOfFrames": 10**8},
        {"PhotometricInterpretation": "SMELL"},
        {"PixelData": b"\0\0"},
        {"BitsAllocated": 7},
    ],
    ids=str,
)
def test_unusable_pixels_are_refused_with_a_reason(changes: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"bad\.dcm"):
        load_image(save(make(**changes), tmp_path / "bad.dcm"))


def test_all_of_pydicoms_own_files_give_a_picture_or_a_reason() -> None:
    own = Path(pydicom.__file__).parent / "data" / "test_files"
    decoded, refused = 0, 0
    for path in sorted(p for p in own.rglob("*") if p.is_file()):
        try:
            picture = load_image(path)
        except UserError as error:
            assert str(error).startswith(str(path)) and "\n" not in str(error)
            refused += 1
        else:
            assert picture.mode == "RGB" and picture.width > 0
            decoded += 1
    assert decoded >= 85 and refused >= 1, (decoded, refused)


# --- what a file states and its pixels contradict

RAMP = np.tile(np.linspace(0, 4095, 64).astype(np.uint16), (8, 1))
SHADES = np.round(RAMP / 4095 * 255)  # what it should look like


def table(entries: np.ndarray, first: int, bits: int, count: int | None = None) -> Any:
    found = pydicom.Dataset()
    found.add_new((0x0028, 0x3002), "US" if first >= 0 else "SS", [count or len(entries), 0, bits])
    found.LUTDescriptor = [count or len(entries), first, bits]
    data = entries.tobytes()
    found.add_new((0x0028, 0x3006), "OW", data + bytes(len(data) % 2))
    return found


@pytest.mark.parametrize("pixel_sign", [0, 1])
@pytest.mark.parametrize("value_vr", ["SS", "US"])
@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_padding_of_either_sign_is_no_part_of_the_picture(
    pixel_sign: int, value_vr: str, photometric: str, tmp_path: Path
) -> None:
    """A CT whose surroundings are -2000 .. -1990, stated with and without a sign."""
    pixels = np.tile(np.linspace(0, 1000, 64).astype(np.int16), (8, 1))
    clean = shown(
        make(pixels[:, 8:], BitsStored=16, HighBit=15, PhotometricInterpretation=photometric),
        tmp_path,
    )
    pixels[:4, :8], pixels[4:, :8] = -2000, -1990
    changes = {
        "BitsStored": 16,
        "HighBit": 15,
        "PixelRepresentation": pixel_sign,
        "PhotometricInterpretation": photometric,
    }
    dataset = make(pixels.view(np.uint16), **changes)
    wrap = 65536 if value_vr == "US" else 0
    dataset.add_new((0x0028, 0x0120), value_vr, -2000 + wrap)
    dataset.add_new((0x0028, 0x0121), value_vr, -1990 + wrap)
    found = shown(dataset, tmp_path)
    assert (found[:, :8] == 0).all() and (found[:, 8:] == clean).all()
    del dataset[0x0028, 0x0121]  # one value alone: the other shade of padding is picture
    alone = shown(dataset, tmp_path)
    assert (alone[:4, :8] == 0).all() and not (alone[:, 8:] == clean).all()


def test_padding_beyond_the_stored_bits(tmp_path: Path) -> None:
    """12 bits stored, padding written over the whole word: it is found, and black stays picture."""
    words = RAMP.copy()
    words[:, :8] = 0xF830
    dataset = make(words)
    dataset.add_new((0x0028, 0x0120), "SS", -2000)
    found = shown(dataset, tmp_path)
    assert (found[:, :8] == 0).all()
    assert (found[:, 8:] == shown(make(RAMP[:, 8:]), tmp_path)).all()
    zero = make(RAMP + 100 * (RAMP == 0))
    zero.add_new((0x0028, 0x0120), "US", 0x8000)  # no 12 bits: stands for no pixel, not for 0
    assert (shown(zero, tmp_path) == shown(make(RAMP + 100 * (RAMP == 0)), tmp_path)).all()


def test_padding_that_covers_every_pixel_is_ignored_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dataset = make(RAMP, PixelPaddingValue=0, PixelPaddingRangeLimit=4095)
    assert (shown(dataset, tmp_path) == SHADES).all()
    assert "one.dcm: PixelPaddingValue covers every pixel: ignored" in caplog.text


@pytest.mark.parametrize(("stated", "held"), [(16, 12), (16, 10), (8, 12), (12, 12), (16, 16)])
def test_a_voi_lut_has_the_bits_that_its_entries_need(
    stated: int, held: int, tmp_path: Path
) -> None:
    entries = np.linspace(0, (1 << held) - 1, 4096).astype("<u2")
    found = shown(make(RAMP, VOILUTSequence=[table(entries, 0, stated)]), tmp_path)
    assert (np.abs(found - SHADES) <= 1).all() and found.max() == 255
    inverse = shown(make(RAMP, VOILUTSequence=[table(entries[::-1], 0, stated)]), tmp_path)
    assert (np.abs(inverse - (255 - SHADES)) <= 1).all()


def test_voi_luts_of_odd_sizes(tmp_path: Path) -> None:
    half = np.linspace(0, 65535, 2048).astype("<u2")
    short = shown(make(RAMP, VOILUTSequence=[table(half, 0, 16, count=4096)]), tmp_path)
    assert (short[:, RAMP[0] >= 2047] == 255).all()  # beyond the table: its last entry
    assert (np.abs(short - np.minimum(RAMP / 2047, 1) * 255) <= 1).all()
    bytes_ = np.linspace(0, 255, 4096).astype(np.uint8)
    for bits in (8, 16):  # two entries in a word, whatever is stated
        packed = shown(make(RAMP, VOILUTSequence=[table(bytes_, 0, bits)]), tmp_path)
        assert (np.abs(packed - SHADES) <= 1).all()
    grey = make(RAMP, VOILUTSequence=[table(np.array([], "<u2"), 0, 16, count=4096)])
    with pytest.raises(UserError, match=r"one\.dcm.*LUTData"):
        shown(grey, tmp_path)


def test_the_first_value_of_a_table_may_have_the_other_sign(tmp_path: Path) -> None:
    entries = np.linspace(0, 65535, 4096).astype("<u2")
    hounsfield = {"RescaleSlope": 1, "RescaleIntercept": -1024}
    for first in (-1024, 65536 - 1024):
        lut = table(entries, 0, 16)
        lut.add_new((0x0028, 0x3002), "SS" if first < 0 else "US", [4096, first, 16])
        found = shown(make(RAMP, VOILUTSequence=[lut], **hounsfield), tmp_path)
        assert (np.abs(found - SHADES) <= 1).all(), first


def test_a_modality_lut_shorter_than_stated(tmp_path: Path) -> None:
    entries = (np.arange(2048) * 2).astype("<u2")
    found = shown(make(RAMP, ModalityLUTSequence=[table(entries, 0, 16, count=4096)]), tmp_path)
    assert (np.abs(found - np.minimum(RAMP / 2047, 1) * 255) <= 1).all()


@pytest.mark.parametrize("signed", [0, 1])
@pytest.mark.parametrize("high", [11, 13, 15])
def test_values_lie_where_high_bit_says(signed: int, high: int, tmp_path: Path) -> None:
    values = RAMP.astype(int) - (2048 if signed else 0)
    words = ((values & 0xFFF) << (high - 11)).astype(np.uint16)
    words |= 1 if high > 11 else 0  # an overlay below
    words |= 0x8000 if high < 15 else 0  # and one above
    found = shown(make(words, HighBit=high, PixelRepresentation=signed), tmp_path)
    assert (found == SHADES).all()


@pytest.mark.parametrize("high", [0, 7, 10, 16, 31])
def test_an_impossible_high_bit_is_ignored_and_named(
    high: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert (shown(make(RAMP, HighBit=high), tmp_path) == SHADES).all()
    assert f"one.dcm: HighBit {high} contradicts BitsStored 12: ignored" in caplog.text


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_a_window_far_off_the_values_is_named_and_not_shown(
    photometric: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shades = SHADES if photometric == "MONOCHROME2" else 255 - SHADES
    for centre, width in ((40000, 400), (-9000, 2000), (100000, 9000)):
        caplog.clear()
        changes = {"PhotometricInterpretation": photometric, "WindowWidth": width}
        found = shown(make(RAMP, WindowCenter=centre, **changes), tmp_path)
        assert (found == shades).all()
        assert f"window {centre:g} ± {width / 2:g} is off the values 0 to 4095" in caplog.text
    caplog.clear()
    several = make(RAMP, WindowCenter=[40000, 2048], WindowWidth=[400, 4096])
    assert (np.abs(shown(several, tmp_path) - SHADES) <= 1).all() and not caplog.text


def test_air_outside_of_a_window_stays_black(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The first slice of a CT: noise about -1000 that a window of soft tissue does not show."""
    air = RAMP // 100
    changes = {"RescaleIntercept": -1024, "RescaleSlope": 1, "WindowCenter": 40, "WindowWidth": 400}
    assert (shown(make(air, **changes), tmp_path) == 0).all()
    assert "is off the values -1024 to -984: the frame is shown without contrast" in caplog.text


@pytest.mark.parametrize("width", [65536, 40000])
def test_a_window_far_wider_than_the_bits_is_named_and_not_shown(
    width: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    wide = {"WindowCenter": width // 2, "WindowWidth": width}
    assert (shown(make(RAMP, **wide), tmp_path) == SHADES).all()
    tones = round(4095 / (width - 1) * 255)
    assert f"has {tones} of 255 tones for the values 0 to 4095: their own range" in caplog.text
    caplog.clear()
    both = make(RAMP, WindowCenter=[width // 2, 2048], WindowWidth=[width, 4096])
    assert (np.abs(shown(both, tmp_path) - SHADES) <= 1).all() and not caplog.text
    # where the bits could hold more than these values, it is as stated, and named
    deep = make(RAMP, BitsStored=16, HighBit=15, **wide)
    found = shown(deep, tmp_path)
    assert found.max() == tones and "the frame is shown with little contrast" in caplog.text


@pytest.mark.parametrize(
    ("changes", "size"),
    [
        ({"PixelSpacing": [0.2, 0.2]}, (64, 8)),
        ({"PixelSpacing": [0.4, 0.1]}, (64, 32)),  # between rows, between columns
        ({"PixelSpacing": [0.1, 0.2]}, (128, 8)),
        ({"ImagerPixelSpacing": [0.3, 0.1]}, (64, 24)),
        ({"NominalScannedPixelSpacing": [0.1, 0.3]}, (192, 8)),
        ({"PixelAspectRatio": [2, 1]}, (64, 16)),  # vertical \\ horizontal
        ({"PixelAspectRatio": [1, 2], "PixelSpacing": [0.1, 0.1]}, (64, 8)),
        ({"PixelSpacing": [0, 0]}, (64, 8)),
        ({"PixelAspectRatio": [2, 1], "PatientOrientation": ["F", "L"]}, (16, 64)),
    ],
    ids=str,
)
def test_pixels_that_are_not_square(changes: Any, size: tuple[int, int], tmp_path: Path) -> None:
    assert shown(make(RAMP, **changes), tmp_path).shape == size[::-1]


def test_sides_that_no_scanner_has_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"one\.dcm: pixels of 1 x 100 .*within 32 times"):
        shown(make(RAMP, PixelAspectRatio=[100, 1]), tmp_path)


def region(down: float, across: float, *, units: int = 3, kind: int = 1, right: int = 63) -> Any:
    """An ultrasound region (PS3.3 C.8.5.5.1) of 8 rows that ends at column ``right``."""
    found = pydicom.Dataset()
    found.PhysicalDeltaX, found.PhysicalDeltaY = across, down
    found.PhysicalUnitsXDirection = found.PhysicalUnitsYDirection = units
    found.RegionSpatialFormat = kind
    found.RegionLocationMinX0, found.RegionLocationMinY0 = 0, 0
    found.RegionLocationMaxX1, found.RegionLocationMaxY1 = right, 7
    return found


@pytest.mark.parametrize(
    ("regions", "size", "remark"),
    [
        ([region(0.1, 0.05)], (64, 16), ""),
        ([region(-0.05, 0.1)], (128, 8), ""),  # a delta may run upwards
        ([region(0.1, 0.1)], (64, 8), ""),
        ([region(0.1, 0.05, kind=2)], (64, 8), ""),  # M-mode
        ([region(0.1, 0.05, units=4)], (64, 8), ""),  # seconds
        ([region(0, 0)], (64, 8), ""),
        ([region(0.1, 0.05), region(0.01, 3, kind=3)], (64, 16), ""),
        ([region(0.1, 0.1, right=9), region(0.1, 0.05)], (64, 16), "pixels of several shapes"),
        ([region(5, 0.05)], (64, 8), "ultrasound pixels of 0.05 x 5 cm: ignored"),
    ],
    ids=str,
)
def test_ultrasound_regions_say_how_wide_a_pixel_is(
    regions: list[Any], size: tuple[int, int], remark: str, tmp_path: Path, caplog: Any
) -> None:
    dataset = make(RAMP, Modality="US", SequenceOfUltrasoundRegions=regions)
    assert shown(dataset, tmp_path).shape == size[::-1]
    assert remark in caplog.text and bool(remark) == bool(caplog.text)


@pytest.mark.parametrize("high", [11, 13, 15])
@pytest.mark.parametrize("photometric", ["YBR_FULL", "YBR_FULL_422"])
def test_luminance_and_chroma_beyond_eight_bits(
    photometric: str, high: int, tmp_path: Path
) -> None:
    """Colours of a wheel, two equal pixels side by side, through BT.601 and back."""
    rgb = np.stack([RAMP, RAMP[:, ::-1], RAMP // 3], axis=-1)[:, ::2].repeat(2, axis=1)
    bt601 = np.array(
        [[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]]
    )
    ybr = np.clip(np.round(rgb @ bt601.T + [0, 2048, 2048]), 0, 4095).astype("<u2") << high - 11
    changes = {"SamplesPerPixel": 3, "PlanarConfiguration": 0, "HighBit": high}
    dataset = make(RAMP, PhotometricInterpretation=photometric, **changes)
    if photometric == "YBR_FULL_422":  # Y Y B R
        ybr = np.concatenate([ybr[:, ::2, :1], ybr[:, ::2]], axis=-1)
    dataset.PixelData = ybr.tobytes()
    found = np.asarray(load_image(save(dataset, tmp_path / "y.dcm"))).astype(int)
    assert (np.abs(found - rgb / 4095 * 255) <= 1).all()


def test_run_lengths_of_words_whose_values_lie_high(tmp_path: Path) -> None:
    dataset = make(RAMP << 4, HighBit=15)
    dataset.compress(pydicom.uid.RLELossless, generate_instance_uid=False)
    assert (shown(dataset, tmp_path) == SHADES).all()


def test_colour_of_twelve_bits_in_sixteen(tmp_path: Path) -> None:
    rgb = np.stack([RAMP, RAMP // 2, RAMP[:, ::-1]], axis=-1)
    changes = {"SamplesPerPixel": 3, "PlanarConfiguration": 0, "PhotometricInterpretation": "RGB"}
    dataset = make(RAMP, BitsStored=16, HighBit=15, **changes)
    dataset.PixelData = rgb.tobytes()
    found = np.asarray(load_image(save(dataset, tmp_path / "c.dcm")))
    assert (found == np.round(rgb / 4095 * 255)).all()
    dataset.BitsStored, dataset.HighBit, dataset.PixelData = 8, 7, (rgb >> 4).tobytes()
    assert (np.asarray(load_image(save(dataset, tmp_path / "c.dcm"))) == rgb >> 4).all()


@pytest.mark.parametrize(
    ("top", "stated"), [(255, 16), (1023, 16), (4095, 16), (65535, 16), (4095, 12)]
)
def test_a_palette_narrower_than_declared(top: int, stated: int, tmp_path: Path) -> None:
    dataset = make(RAMP // 16, PhotometricInterpretation="PALETTE COLOR", BitsStored=8, HighBit=7)
    for number, name in enumerate(("Red", "Green", "Blue")):
        entries = (np.arange(256) * top // 255 // (number + 1)).astype("<u2")
        setattr(dataset, f"{name}PaletteColorLookupTableDescriptor", [256, 0, stated])
        setattr(dataset, f"{name}PaletteColorLookupTableData", entries.tobytes())
    found = np.asarray(load_image(save(dataset, tmp_path / "p.dcm"))).astype(int)
    for number in range(3):
        assert (np.abs(found[..., number] - RAMP // 16 // (number + 1)) <= 1).all()


def test_an_import_names_what_it_ignored(tmp_path: Path) -> None:
    src = tmp_path / "src"
    src.mkdir()
    save(make(RAMP, HighBit=3), src / "a.dcm")
    save(make(RAMP, HighBit=3, SOPInstanceUID="1.2.826.0.1.77.5"), src / "b.dcm")
    save(make(RAMP, SOPInstanceUID="1.2.826.0.1.77.6"), src / "c.dcm")
    for _ in range(2):  # the second time from what the first remembered
        result = import_data("dicom", src, tmp_path / "out", ocr="off")
        assert "a.dcm and 1 more: HighBit 3 contradicts BitsStored 12: ignored" in result.notes
    rows = DataFolder(tmp_path / "out").corpus()
    assert sum("remarks" in row.meta for row in rows) == 2


# --- identity


def test_nothing_of_the_patient_is_written(tmp_path: Path) -> None:
    src = tmp_path / "Roe^Jill"
    src.mkdir()
    overlay = make(StudyDate="20200418", SOPInstanceUID="1.2.826.0.1.77.11")
    overlay.add_new((0x6000, 0x4000), "LT", "Roe Jill")
    save(make(), src / "Roe_Jill_1.dcm")
    save(overlay, src / "Roe_Jill_2.dcm")
    save(make(PatientID="OTHER", SOPInstanceUID="1.2.826.0.1.77.12"), src / "3.dcm")
    (src / "broken_Roe.dcm").write_bytes(b"\0" * 128 + b"DICM" + b"Roe^Jill")
    (src / "notes.txt").write_text("Roe")
    result = import_data("dicom", src, tmp_path / "out", ocr="off")
    assert (result.corpus, result.rejected) == (3, 1)
    assert "broken_Roe.dcm" in result.refusals[0]  # shown to the user, not written
    for path in (tmp_path / "out").rglob("*"):
        if path.is_file():
            data = path.read_bytes() + path.name.encode()
            for secret in (*SECRETS, "Roe_Jill"):
                assert secret.encode() not in data, (path.name, secret)
    rows = {r.id: r for r in DataFolder(tmp_path / "out").corpus()}
    assert len(rows) == 3 and all(r.text == "" for r in rows.values())
    patients = sorted(str(r.patient) for r in rows.values())
    assert (
        len(set(patients)) == 2
        and len({r.split for r in rows.values() if patients.count(str(r.patient)) == 2}) == 1
    )
    dates = sorted(r.meta["date"] for r in rows.values())
    from datetime import date

    mine = [
        date.fromisoformat(r.meta["date"])
        for r in rows.values()
        if patients.count(str(r.patient)) == 2
    ]
    assert abs((mine[0] - mine[1]).days) == 1 and max(dates) < "2020-04-17"


def test_deidentified_data_set_holds_no_secret_anywhere() -> None:
    names = Pseudonyms(b"k" * 32)
    before = str(make()) + str(make().file_meta)
    assert all(secret in before for secret in SECRETS)
    cleaned = deidentify(make(), names)
    text = str(cleaned) + str(cleaned.file_meta)
    for secret in SECRETS:
        assert secret not in text, secret
    assert cleaned.PatientIdentityRemoved == "YES" and cleaned.PatientID
    assert cleaned.PatientBirthDate in ("", "00010101")
    again = deidentify(make(), names)
    assert str(again.SOPInstanceUID) == str(cleaned.SOPInstanceUID)  # repeatable with the key
    other = deidentify(make(), Pseudonyms(b"z" * 32))
    assert other.PatientID != cleaned.PatientID
    assert str(other.StudyInstanceUID) != str(cleaned.StudyInstanceUID)


def test_import_repeats_itself_and_the_key_stays_outside(tmp_path: Path) -> None:
    src = tmp_path / "src"
    src.mkdir()
    stack = np.stack([CORNER // (n + 1) for n in range(30)])
    save(make(stack, frames=30), src / "m.dcm")
    result = import_data("dicom", src, tmp_path / "out", ocr="off", max_frames=4)
    row = DataFolder(tmp_path / "out").corpus()[0]
    assert len(row.images) == 4 and row.meta["frames"] == 30 and result.images == 4
    key = tmp_path / "out.key"
    assert key.stat().st_mode & 0o077 == 0 and not list((tmp_path / "out").rglob("*.key"))
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    import_data("dicom", src, tmp_path / "out", ocr="off", max_frames=4)
    after = {p.name: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert before == after
    (tmp_path / "short.key").write_text("abc")
    with pytest.raises(UserError, match="expected at least 16"):
        read_key(tmp_path / "short.key")


def burned_in(text: str, side: str = "L") -> np.ndarray:
    picture = Image.fromarray((np.random.default_rng(0).random((400, 400)) * 40).astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    draw.text((20, 20), text, fill=255, font=ImageFont.load_default(22))
    draw.text((360, 350), side, fill=255, font=ImageFont.load_default(30))
    return np.asarray(picture).astype(np.uint16) * 12


@pytest.mark.skipif(not ocr.available(), reason="needs the extra 'ocr'")
def test_burned_in_text_is_masked_or_refused(tmp_path: Path) -> None:
    src = tmp_path / "src"
    src.mkdir()
    save(make(burned_in("ROE, JILL 03.02.1961")), src / "a.dcm")
    import_data("dicom", src, tmp_path / "out")
    row = DataFolder(tmp_path / "out").corpus()[0]
    assert row.meta["masked_text"] >= 1
    picture = load_image(row.images[0])
    assert not [line for line in ocr.find_text(picture) if line.tells]
    marker = np.asarray(picture)[350:385, 355:385]
    assert marker.max() > 200  # the side marker stays
    refused = import_data("dicom", src, tmp_path / "o2", ocr="refuse")
    assert refused.corpus == 0 and "burned-in text" in refused.refusals[0]


@pytest.mark.skipif(not ocr.available(), reason="needs the extra 'ocr'")
def test_text_is_found_before_a_picture_is_turned(tmp_path: Path) -> None:
    """A film stored with its rows running to the right is mirrored: so would be its text."""
    written = make(burned_in("ROE, JILL 03.02.1961"), PatientOrientation=["R", "F"])
    save(written, tmp_path / "a.dcm")
    import_data("dicom", tmp_path / "a.dcm", tmp_path / "out")
    row = DataFolder(tmp_path / "out").corpus()[0]
    mirrored = np.asarray(load_image(row.images[0]))[:, ::-1]
    assert row.meta["masked_text"] >= 1
    assert mirrored[15:50, 15:200].max() < 100  # the name, where it stood
    assert mirrored[350:385, 355:385].max() > 200  # the side marker


@pytest.mark.skipif(not ocr.available(), reason="needs the extra 'ocr'")
def test_anatomy_that_resembles_a_sign_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    class Reading:
        boxes = [[[5, 0], [60, 0], [60, 64], [5, 64]], [[2, 2], [9, 2], [9, 12], [2, 12]]]
        txts, scores = ["9", "7"], [0.9, 0.9]

    monkeypatch.setattr(ocr, "_engine", lambda: lambda pixels: Reading)
    found = ocr.find_text(Image.new("RGB", (800, 64)))
    assert [(line.text, line.tells) for line in found] == [("7", True)]
    assert ocr.find_text(Image.new("RGB", (10, 10))) == []  # no room for text


def test_the_same_instance_again_is_refused_by_its_reason(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    save(make(), tmp_path / "src" / "a.dcm")
    save(make(), tmp_path / "src" / "b.dcm", preamble=b"again".ljust(128, b"\0"))
    result = import_data("dicom", tmp_path / "src", tmp_path / "out", ocr="off")
    assert (result.corpus, result.rejected) == (1, 1)
    assert result.refusals[0].endswith(
        "b.dcm: SOPInstanceUID is that of a file before it: the same image again"
    )


def test_failed_decoders_are_named_in_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broken = make()
    broken.PixelData = pydicom.encaps.encapsulate([b"no JPEG 2000"])
    broken.file_meta.TransferSyntaxUID = pydicom.uid.JPEG2000Lossless
    save(broken, tmp_path / "a.dcm")
    with pytest.raises(UserError, match="cannot be decoded.*JPEG 2000.*image file data") as refused:
        load_image(tmp_path / "a.dcm")
    assert "\n" not in str(refused.value) and not caplog.records


def test_declared_burned_in_text_is_not_trusted_without_ocr(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ocr, "available", lambda: False)
    src = tmp_path / "src"
    src.mkdir()
    save(make(BurnedInAnnotation="YES"), src / "a.dcm")
    save(make(SOPInstanceUID="1.2.826.0.1.77.5"), src / "b.dcm")
    result = import_data("dicom", src, tmp_path / "out")
    assert (result.corpus, result.rejected) == (1, 1) and "not looked for" in result.notes[0]
    assert json.loads((tmp_path / "out" / "rejected.jsonl").read_text())["file"] == "dicom-0"
