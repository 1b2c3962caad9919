"""Hostile input: seeded mutations of images, JSON rows, tables and DICOM files.

Every mutated input must give a valid row or a named refusal; none may hang, crash, or stop the
good rows beside it. ``python tests/hostile.py --count 2000 --seed 0`` runs as many and prints
one line per kind; a crash of the interpreter shows in the exit code of the process.
"""

from __future__ import annotations

import argparse
import faulthandler
import io
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mmedrag.data import check, import_data
from mmedrag.images.files import load_image
from mmedrag.records.records import UserError
from mmedrag.runtime.data_folder import DataFolder
from mmedrag.runtime.files import BadRow, read_jsonl

BATCH = 50  # mutated inputs per import
SLOW = 20.0  # seconds that one batch may take per mutated input, at most
NUMBERS = (0, 1, 2, 3, 7, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF)


def picture(seed: int, size: int = 48) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC)


# --- mutations of bytes


def mutate(data: bytes, rng: random.Random) -> bytes:
    """One to four random injuries: flips, cuts, repeats, insertions, extreme numbers."""
    body = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = (
            rng.randrange(len(body) + 1)
            if rng.random() < 0.5
            else rng.randrange(min(len(body), 200) + 1)
        )
        kind = rng.randrange(7)
        if kind == 0 and body:
            for _ in range(rng.randint(1, 8)):
                body[rng.randrange(len(body))] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del body[at:]
        elif kind == 2:
            del body[at : at + rng.randint(1, 64)]
        elif kind == 3:
            body[at:at] = body[at : at + rng.randint(1, 256)]
        elif kind == 4:
            body[at:at] = rng.randbytes(rng.randint(1, 64))
        elif kind == 5:
            width, order = rng.choice((1, 2, 4, 8)), rng.choice(("big", "little"))
            number = rng.choice(NUMBERS) % (1 << 8 * width)
            body[at : at + width] = number.to_bytes(width, order)  # type: ignore[arg-type]
        else:
            body[at : at + 32] = bytes(len(body[at : at + 32]))
    return bytes(body)


# --- images


def image_bases() -> dict[str, bytes]:
    def save(kind: str, shown: Image.Image | None = None, **options: Any) -> bytes:
        out = io.BytesIO()
        (shown or picture(1)).save(out, kind, **options)
        return out.getvalue()

    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "someone"
    deep = Image.fromarray(np.arange(48 * 48, dtype=np.uint16).reshape(48, 48) * 20)
    arrays = io.BytesIO()
    np.savez(arrays, slo_fundus=np.asarray(picture(2)), age=np.array(61.0))
    return {
        "png": save("PNG"),
        "jpg": save("JPEG", exif=exif, comment=b"someone"),
        "progressive.jpg": save("JPEG", progressive=True),
        "deep.png": save("PNG", deep),
        "palette.png": save("PNG", picture(3).convert("P")),
        "alpha.png": save("PNG", picture(3).convert("RGBA")),
        "tif": save("TIFF", compression="tiff_lzw"),
        "bmp": save("BMP"),
        "ppm": save("PPM"),
        "webp": save("WEBP"),
        "npz": arrays.getvalue(),
    }


def run_images(folder: Path, count: int, rng: random.Random) -> tuple[int, int]:
    bases = image_bases()
    rows = []
    for n in range(count):
        suffix = rng.choice(sorted(bases))
        (folder / f"bad{n}.{suffix}").write_bytes(mutate(bases[suffix], rng))
        rows.append({"id": f"bad{n}", "image": f"bad{n}.{suffix}", "text": "t", "domain": "d"})
    picture(0).save(folder / "good.png")
    good = [{"id": f"good{n}", "image": "good.png", "text": "t", "domain": "d"} for n in range(2)]
    rows = [good[0], *rows, good[1]]
    (folder / "m.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return imported("manifest", folder, folder / "out", {"good0", "good1"}, len(rows))


# --- JSON rows


ROWS: dict[str, dict[str, Any]] = {
    "manifest": {
        "id": "r",
        "domain": "radiology",
        "modality": "X-ray",
        "image": None,
        "text": "A report.",
        "text_kind": "report",
        "labels": {"a": 1},
        "qa": [{"question": "Is it?", "answer": "yes", "answer_type": "CLOSED"}],
        "patient": "p",
        "source": "s",
        "licence": "CC0",
        "attribution": "us",
    },
    "released": {
        "question_id": 1,
        "question": "Is it?\n<image>",
        "answer": "Yes.",
        "image": "slo_fundus_00001.jpg",
        "report": "A report.",
    },
    "llava": {
        "id": "c",
        "image": "x.png",
        "conversations": [
            {"from": "human", "value": "<image>\nIs it?"},
            {"from": "gpt", "value": "No."},
        ],
    },
    "vqa": {
        "qid": 1,
        "image_name": "x.png",
        "question": "Is it?",
        "answer": "yes",
        "answer_type": "CLOSED",
        "q_lang": "en",
    },
    "pair": {
        "id": "",
        "image": "p10/p10000001/s5/a.jpg",
        "rejected_noised": 1,
        "conversations": [
            {"from": "human", "value": "<image>\nQ"},
            {"from": "gpt", "value": "Yes."},
        ],
        "rejected_conversations": [
            {"from": "human", "value": "<image>\nQ"},
            {"from": "gpt", "value": "No."},
        ],
    },
    "iu": {
        "id": "CXR1_IM-1",
        "report": "Clear.",
        "image_path": ["CXR1_IM-1/0.png"],
        "split": "val",
    },
}
ODD: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    -1,
    1.5,
    10**40,
    "",
    " ",
    "\0",
    "a" * 5000,
    "../../etc/passwd",
    "/etc/passwd",
    "C:\\x.png",
    [],
    {},
    [[]],
    [None],
    [1, 2],
    {"a": {"b": {}}},
    "\u202e\u0000",
    "😀",
    "<image>" * 9,
    "unknown",
    "{{7*7}}",
    "%s%n",
    ["x.png", 3],
    {"from": "human"},
    [{"from": "gpt", "value": None}],
    "x/" * 300 + "y.png",
    "n" * 300 + ".png",
    "-0",
    "NaN",
)


def mutate_row(row: Any, rng: random.Random) -> str:
    """A JSON text: the row with odd values, lost, doubled or renamed fields, or broken syntax."""
    value = json.loads(json.dumps(row))
    for _ in range(rng.randint(1, 3)):
        holder, keys = value, []
        while isinstance(holder, (dict, list)) and holder:
            keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
            key = rng.choice(keys)
            if rng.random() < 0.6 or not isinstance(holder[key], (dict, list)) or not holder[key]:
                break
            holder = holder[key]
        if not keys or not holder:
            break
        action = rng.randrange(4)
        if action == 0:
            del holder[key]
        elif action == 1 and isinstance(holder, dict):
            holder[str(key) + rng.choice(("s", "_", " ", "\n"))] = holder.pop(key)
        else:
            holder[key] = rng.choice(ODD)
    text = json.dumps(value, ensure_ascii=rng.random() < 0.5)
    broken = rng.random()
    if broken < 0.15:
        text = text[: rng.randrange(len(text))]
    elif broken < 0.25:
        at = rng.randrange(len(text))
        extra = rng.choice(("\\", '"', "}", "\t", "NaN", "\\ud83d", "0x1", ","))
        text = text[:at] + extra + text[at:]
    elif broken < 0.28:
        text = rng.choice("[{") * 50_000
    elif broken < 0.31:
        text = text.replace(":", ": NaN,", 1)
    return text.replace("\n", " ").replace("\r", " ")


def run_rows(folder: Path, count: int, rng: random.Random) -> tuple[int, int]:
    kind = rng.choice(sorted(ROWS))
    fmt = {"pair": "released", "iu": "released"}.get(kind, kind)
    name = "radiology_val" if kind == "iu" else "rows"
    good = dict(ROWS[kind])
    lines: list[bytes] = []
    for _ in range(count):
        line = mutate_row(ROWS[kind], rng).encode("utf-8", "surrogatepass")
        lines.append(mutate(line, rng).replace(b"\n", b" ") if rng.random() < 0.2 else line)
    keys = {"manifest": "id", "released": "question_id", "vqa": "qid"}
    for end, number in ((0, 900001), (count + 1, 900002)):
        good |= {keys.get(kind, "id"): f"g{number}" if kind == "manifest" else number}
        lines.insert(end, json.dumps(good).encode())
    (folder / f"{name}.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    marks = {"900001", "900002"}
    done = imported(fmt, folder / f"{name}.jsonl", folder / "out", marks, None)
    if kind in ("released", "pair", "iu"):
        check([folder / f"{name}.jsonl"], images=False)
    (folder / "data").mkdir()
    (folder / "data" / "examples.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    check([folder / "data"])
    return done


# --- tables


def run_tables(folder: Path, count: int, rng: random.Random) -> tuple[int, int]:
    base = 'id,image,report,patient,split\n1,a.png,"One, two.",p1,train\n2,,Three.,p2,test\n'
    src = folder / "tables"
    src.mkdir()
    for n in range(count):
        data = base.encode()
        if rng.random() < 0.5:
            cell = str(rng.choice(ODD))
            rows = [r.split(",") for r in base.splitlines()]
            rows[rng.randrange(3)][rng.randrange(3)] = cell
            data = "\n".join(",".join(r) for r in rows).encode("utf-8", "surrogatepass")
        if rng.random() < 0.8:
            data = mutate(data, rng)
        data = data.decode("latin-1").encode("utf-16") if rng.random() < 0.05 else data
        (src / f"bad{n:04d}{rng.choice(('.csv', '.csv', '.tsv'))}").write_bytes(data)
    for name in ("aaa.csv", "zzz.csv"):
        (src / name).write_text(base)
    return imported("table", src, folder / "out", {"aaa/1", "aaa/2", "zzz/1", "zzz/2"}, None)


# --- DICOM


def dicom_bases() -> list[bytes]:
    import pydicom

    made = pydicom.Dataset()
    made.SOPClassUID, made.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.1", "1.2.3.4"
    made.PatientID, made.PatientName, made.StudyDate = "1", "Some^One", "20200101"
    made.Rows = made.Columns = 16
    made.SamplesPerPixel, made.PhotometricInterpretation = 1, "MONOCHROME1"
    made.BitsAllocated, made.BitsStored, made.HighBit, made.PixelRepresentation = 16, 12, 11, 0
    made.WindowCenter, made.WindowWidth = 100, 200
    made.PixelData = np.arange(256, dtype=np.uint16).tobytes()
    made.file_meta = pydicom.dataset.FileMetaDataset()
    made.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    out = io.BytesIO()
    made.save_as(out, enforce_file_format=True)
    found = [out.getvalue()]
    own = Path(pydicom.__file__).parent / "data" / "test_files"
    for path in sorted(p for p in own.glob("*.dcm") if p.stat().st_size < 12_000):
        try:
            load_image(path)
        except UserError:
            continue  # no picture in it: mutations would be refused for that reason
        found.append(path.read_bytes())
    return found


def run_dicom(folder: Path, count: int, rng: random.Random) -> tuple[int, int]:
    bases = dicom_bases()
    src = folder / "dicom"
    src.mkdir()
    for n in range(count):
        data = rng.choice(bases)
        injured = mutate(data, rng)
        if rng.random() < 0.3:  # aim at the pixel description: group 0028
            at = data.find(b"\x28\x00", 132)
            if at > 0:
                cut = at + rng.randrange(120)
                body = bytearray(data)
                body[cut : cut + 2] = rng.choice(NUMBERS).to_bytes(4, "little")[:2]
                injured = bytes(body)
        (src / f"bad{n:04d}.dcm").write_bytes(injured)
    (src / "aaa.dcm").write_bytes(bases[0])
    (src / "zzz.dcm").write_bytes(bases[0].replace(b"1.2.3.4\0", b"1.2.3.5\0"))
    key = folder / "secret.key"
    key.write_text("0" * 64)
    done = imported("dicom", src, folder / "out", set(), count + 2, ocr="off", key=key)
    refused = (
        {int(bad.line) for bad in read_jsonl(folder / "out" / "rejected.jsonl", BadRow)}
        if (folder / "out" / "rejected.jsonl").exists()
        else set()
    )
    assert not refused & {1}, "a good DICOM file was refused"
    return done


# --- judging


def imported(
    fmt: str, src: Path, out: Path, good: set[str], rows: int | None, **options: Any
) -> tuple[int, int]:
    """Import, and see that every row is either valid or refused with a reason."""
    result = import_data(fmt, src, out, **options)
    data = DataFolder(out)
    kept = [*data.corpus(), *data.examples()]
    ids = {row.id for row in kept}
    for mark in good:
        held = any(mark in i for i in ids) or result.pairs > 0
        assert held, f"good row {mark} of {src} is lost"
    bad = list(read_jsonl(out / "rejected.jsonl", BadRow)) if result.rejected else []
    assert all(b.reason.strip() and "\n" not in b.reason for b in bad)
    assert result.exit_code == (1 if bad else 0) and len(bad) == result.rejected
    if rows is not None:
        assert result.corpus + result.rejected >= rows, "a row is neither valid nor refused"
    for row in kept:
        for path in row.images:
            assert path.resolve().is_relative_to(out.resolve()), path
            load_image(path)
    return len(kept), len(bad)


KINDS: dict[str, Callable[[Path, int, random.Random], tuple[int, int]]] = {
    "images": run_images,
    "rows": run_rows,
    "tables": run_tables,
    "dicom": run_dicom,
}


def run(count: int, seed: int, kinds: list[str] | None = None) -> dict[str, tuple[int, int, int]]:
    """{kind: (mutated inputs, valid rows, refusals)}; raises on the first broken promise."""
    names = kinds or list(KINDS)
    totals = {}
    for name in names:
        left, valid, refused, batch = count // len(names), 0, 0, 0
        while left > 0:
            size = min(BATCH, left)
            rng = random.Random(f"{seed}/{name}/{batch}")
            begun = time.monotonic()
            with tempfile.TemporaryDirectory(prefix="hostile-") as scratch:
                print(f"# {name} batch {batch} seed {seed}", file=sys.stderr, flush=True)
                try:
                    kept, bad = KINDS[name](Path(scratch), size, rng)
                except UserError as error:
                    raise AssertionError(f"{name} batch {batch}: stopped: {error}") from error
            took = time.monotonic() - begun
            assert took < SLOW * size, f"{name} batch {batch}: {took:.0f} s for {size} inputs"
            left, batch, valid, refused = left - size, batch + 1, valid + kept, refused + bad
        totals[name] = (count // len(names), valid, refused)
    return totals


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", action="append", choices=list(KINDS))
    given = parser.parse_args()
    faulthandler.enable()
    faulthandler.dump_traceback_later(3000, exit=True)
    for name, (mutated, valid, refused) in run(given.count, given.seed, given.kind).items():
        print(f"{name}: {mutated} mutated inputs, {valid} valid rows, {refused} refusals")


if __name__ == "__main__":
    main()
